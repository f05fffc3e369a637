"""The training state on disk: exact, complete, and atomic."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dina_lrm.errors import CheckpointError
from dina_lrm.runs import optimizer as optim
from dina_lrm.runs import state
from dina_lrm.runs.config import OptimizerConfig


def make() -> tuple[nn.Module, torch.optim.AdamW, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 1))
    return (
        model,
        optim.adamw(model, OptimizerConfig(learning_rate=1e-2)),
        optim.weight_average(list(model.parameters()), 0.9),
    )


def steps(model: nn.Module, optimizer: torch.optim.AdamW, average: object, start: int, stop: int) -> None:
    for step in range(start, stop):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(list(model.parameters()))


POSITION = state.Position(
    step=4, seconds=1.5, best_accuracy=0.5, best_step=2, config={"seed": 0}, data_fingerprint="abc"
)


def test_stopped_and_resumed_equals_never_stopped(tmp_path: Path) -> None:
    model, optimizer, average = make()
    steps(model, optimizer, average, 0, 4)
    best = [p.detach().clone() for p in model.parameters()]
    state.save_state(tmp_path, POSITION, dict(model.named_parameters()), optimizer, average, best)
    steps(model, optimizer, average, 4, 8)

    again, other_optimizer, other_average = make()
    steps(again, other_optimizer, other_average, 90, 91)  # it must not matter what was there before
    position, found = state.load_state(
        tmp_path, dict(again.named_parameters()), other_optimizer, other_average
    )
    assert position == POSITION
    assert found is not None
    assert all(torch.equal(a, b) for a, b in zip(found, best, strict=True))
    steps(again, other_optimizer, other_average, 4, 8)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(average.shadow_params, other_average.shadow_params, strict=True):
        assert torch.equal(a, b)


def test_another_model_and_damage_are_errors(tmp_path: Path) -> None:
    model, optimizer, average = make()
    steps(model, optimizer, average, 0, 1)
    state.save_state(tmp_path, POSITION, dict(model.named_parameters()), optimizer, average, None)
    other = nn.Sequential(nn.Linear(3, 5), nn.RMSNorm(5), nn.Linear(5, 1))
    with pytest.raises(CheckpointError, match=r"do not fit this model.*0\.weight"):
        state.load_state(
            tmp_path,
            dict(other.named_parameters()),
            optim.adamw(other, OptimizerConfig(learning_rate=1.0)),
            None,
        )
    tensors = tmp_path / "training_state" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        state.load_state(tmp_path, dict(model.named_parameters()), optimizer, average)
    with pytest.raises(FileNotFoundError, match="resume"):
        state.load_state(tmp_path / "nowhere", dict(model.named_parameters()), optimizer, average)
