"""Compiled scoring: the same scores, few compilations, nothing compiled where it would be wrong."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_lrm import RewardModel
from tests.families import FAMILIES
from tests.tiny import make_tiny_reward, tiny_conditioning, tiny_latents

SCRIPT = Path(__file__).parents[2] / "compiled_counts.py"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called compiled, by name."""
    made: list[str] = []

    def compile(function: Callable[..., Any], *, backend: str) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            made.append(function.__qualname__)
            return function(*args, **kwargs)

        return called

    monkeypatch.setattr(torch, "compile", compile)
    return made


@pytest.fixture
def model(tiny_pipeline: Path) -> RewardModel:
    return make_tiny_reward(tiny_pipeline)


def score(model: RewardModel) -> torch.Tensor:
    return model.score_latents(tiny_latents(2), tiny_conditioning(2), [0.2, 0.5], seed=0)


def test_blocks_and_head_are_compiled(model: RewardModel, calls: list[str]) -> None:
    wanted = score(model)
    assert not calls
    assert torch.equal(score(model.compile()), wanted)
    assert calls == [
        *["JointTransformerBlock.forward"] * model.backbone.num_blocks,
        "RewardHead.aggregate",
        "RewardHead.score_tokens",
    ]


def test_training_and_blocks_with_hooks_run_as_they_are(model: RewardModel, calls: list[str]) -> None:
    model.compile().train()
    score(model)
    assert not calls
    model.eval()
    seen: list[str] = []
    model.backbone.kept_blocks[0].register_forward_hook(lambda *_: seen.append("hook"))
    score(model)
    assert seen == ["hook"]
    assert calls.count("JointTransformerBlock.forward") == model.backbone.num_blocks - 1


def test_copies_and_pickles_are_compiled_too(model: RewardModel, calls: list[str]) -> None:
    wanted = score(model.compile())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert torch.equal(score(other), wanted)
        assert calls


def test_a_reward_is_loaded_compiled(
    model: RewardModel, tiny_pipeline: Path, tmp_path: Path, calls: list[str]
) -> None:
    folder = model.save_pretrained(tmp_path / "reward")
    loaded = RewardModel.from_pretrained(folder, str(tiny_pipeline), compile=True)
    assert torch.equal(score(loaded), score(model))
    assert calls


def counted(backend: str, family: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), backend, family, str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_compilations_of_each_family(family: str, tmp_path: Path) -> None:
    """Whole graphs; after a few sizes no new ones are made."""
    found = counted("aot_eager", family, tmp_path)
    assert found["difference"] < 1e-5
    assert found["gradient_difference"] < 1e-5
    assert found["graph_breaks"] == {}
    assert found["after_batches"] <= 16
    assert found["after_sizes"][-1] - found["after_batches"] <= 12
    assert found["after_sizes"][-1] == found["after_sizes"][-2]


@pytest.mark.long
def test_the_compilers_code_gives_the_same_scores(tmp_path: Path) -> None:
    found = counted("inductor", "sd3", tmp_path)
    assert found["difference"] < 1e-5
    assert found["gradient_difference"] < 1e-5
