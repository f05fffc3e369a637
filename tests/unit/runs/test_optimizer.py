"""Which parameters decay, the learning rate at every position, master weights."""

import pytest
import torch
from torch import nn

from dina_lrm.core.precision import float32_masters
from dina_lrm.errors import InvalidInputError
from dina_lrm.runs import optimizer as optim
from dina_lrm.runs.config import OptimizerConfig


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Conv2d(1, 1, 1))
        self.head = nn.Sequential(nn.RMSNorm(3), nn.Linear(3, 1))
        self.query = nn.Parameter(torch.zeros(1, 2, 3))
        self.embedding = nn.Embedding(4, 3)


def test_only_matrices_decay_and_the_backbone_has_its_own_rate() -> None:
    model = Tiny()
    model.backbone[2].requires_grad_(False)
    optimizer = optim.adamw(
        model, OptimizerConfig(learning_rate=1e-3, backbone_learning_rate=1e-4, weight_decay=0.1)
    )
    settings = {id(p): (g["peak_lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    expected = {
        "backbone.0.weight": (1e-4, 0.1),
        "backbone.0.bias": (1e-4, 0.0),
        "backbone.1.weight": (1e-4, 0.0),
        "backbone.1.bias": (1e-4, 0.0),
        "head.0.weight": (1e-3, 0.0),
        "head.1.weight": (1e-3, 0.1),
        "head.1.bias": (1e-3, 0.0),
        "query": (1e-3, 0.0),
        "embedding.weight": (1e-3, 0.0),
    }
    assert {n: settings[id(p)] for n, p in model.named_parameters() if id(p) in settings} == expected


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="no trainable"):
        optim.adamw(Tiny().requires_grad_(False), OptimizerConfig())


def test_masters_are_float32() -> None:
    model = Tiny().to(torch.bfloat16)
    float32_masters(model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_is_linear_under_every_schedule(schedule: optim.Schedule) -> None:
    factors = [
        optim.learning_rate_factor(s, num_steps=100, schedule=schedule, warmup_steps=5) for s in range(6)
    ]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_decay_by_hand() -> None:
    def at(step: int, schedule: optim.Schedule, **more: float) -> float:
        return optim.learning_rate_factor(step, num_steps=100, schedule=schedule, **more)

    assert at(99, "constant") == 1.0
    assert at(50, "linear") == 0.5
    assert at(50, "linear", final_fraction=0.2) == pytest.approx(0.6)
    assert at(50, "cosine") == pytest.approx(0.5)
    assert at(100, "cosine", final_fraction=0.1) == pytest.approx(0.1)
    assert at(25, "cosine") == pytest.approx((1 + 2**-0.5) / 2)


def test_a_time_budget_takes_over_when_it_is_further_on() -> None:
    early = optim.learning_rate_factor(1, num_steps=1000, schedule="linear", elapsed_fraction=0.75)
    assert early == pytest.approx(0.25)
    late = optim.learning_rate_factor(900, num_steps=1000, schedule="linear", elapsed_fraction=0.1)
    assert late == pytest.approx(0.1)


def test_average_is_the_library_s_and_starts_fast() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    average = optim.weight_average([parameter], 0.9)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.step([parameter])
    assert average.shadow_params[0].item() == 1.0  # the first step copies
    with torch.no_grad():
        parameter.fill_(2.0)
    average.step([parameter])
    decay = 2 / 11  # (1 + 1) / (10 + 1)
    assert average.shadow_params[0].item() == pytest.approx(decay * 1 + (1 - decay) * 2)
