"""A reward under threads and in process pools, from its first use on."""

import copy
import json
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from dina_lrm import RewardModel
from dina_lrm.pipelines.threads import Turn
from tests.tiny import make_tiny_reward, tiny_conditioning, tiny_latents

COLD_START = Path(__file__).parents[2] / "cold_start.py"
PROMPTS = [f"a {colour} circle on a gray background" for colour in ("red", "green", "blue", "white")]


def cold_start(mode: str, count: int) -> list[float]:
    command = [sys.executable, "-W", "error::UserWarning", str(COLD_START), mode, str(count)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def alone() -> float:
    """The score that one worker gets."""
    (score,) = cold_start("one-model", 1)
    return score


@pytest.mark.long
@pytest.mark.parametrize("mode", ["one-model", "own-models"])
def test_threads_from_a_cold_start(alone: float, mode: str) -> None:
    assert cold_start(mode, 4) == [alone] * 4


@pytest.mark.long
def test_processes_from_a_cold_start(alone: float) -> None:
    assert cold_start("processes", 2) == [alone] * 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["one-model", "own-models", "processes"])
def test_twenty_cold_starts_of_four(alone: float, mode: str) -> None:
    assert [cold_start(mode, 4) for _ in range(20)] == [[alone] * 4] * 20


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.from_pretrained("bundled")


def test_one_model_serves_many_threads(model: RewardModel) -> None:
    """Also while somebody reads its weights, for which LoRA is taken out of them."""
    picture = Image.linear_gradient("L").resize((64, 64))
    expected = [model.score(prompt, picture).scores.item() for prompt in PROMPTS]
    stop = threading.Event()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def save() -> None:
        while not stop.is_set():
            found = model.state_dict()
            assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())

    def score(index: int) -> float:
        return model.score(PROMPTS[index % 4], picture).scores.item()

    with ThreadPoolExecutor(5) as pool:
        saving = pool.submit(save)
        found = list(pool.map(score, range(24)))
        stop.set()
        saving.result()
    assert found == expected * 6


@pytest.mark.long
def test_scores_hold_while_another_thread_loads(model: RewardModel) -> None:
    """Libraries that load change the default dtype and where new parameters go, for the whole process."""
    picture = Image.linear_gradient("L").resize((64, 64))
    expected = model.score(PROMPTS[0], picture, seed=5).scores.item()
    started, stop = threading.Event(), threading.Event()

    def load() -> None:
        while not stop.is_set():
            other = RewardModel.from_pretrained("bundled", dtype=torch.float16)
            started.set()
            other.encode_prompts(PROMPTS[1])

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load)
        assert started.wait(60)
        found = []
        for _ in range(20):
            model.state_dict()  # unmerges, so that the score merges again
            found.append(model.score(PROMPTS[0], picture, seed=5).scores.item())
        stop.set()
        loading.result()
    assert found == [expected] * 20


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_can_be_copied_after_it_has_scored(model: RewardModel, copied) -> None:
    picture = Image.linear_gradient("L").resize((64, 64))
    expected = model.score(PROMPTS, picture).scores
    other = copied(model)
    assert torch.equal(other.score(PROMPTS, picture).scores, expected)
    assert torch.equal(other.unmerge().merge().score(PROMPTS[::-1], picture).scores, expected.flip(0))
    assert other.turn is not model.turn
    assert torch.equal(model.score(PROMPTS, picture).scores, expected)


def test_a_copy_with_lora_shares_nothing(tiny_backbone: Path) -> None:
    model = make_tiny_reward(tiny_backbone).requires_grad_(False)
    args = (tiny_latents(), tiny_conditioning(), 0.4)
    expected = model.score_latents(*args, seed=0)
    other = copy.deepcopy(model)
    assert other.adapter is not None
    with torch.no_grad():
        for parameter in other.adapter.parameters():
            parameter.zero_()
    assert not torch.equal(other.score_latents(*args, seed=0), expected)
    assert torch.equal(model.score_latents(*args, seed=0), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda turn: pickle.loads(pickle.dumps(turn))])
def test_the_copy_of_a_turn_that_is_taken_is_free(copied) -> None:
    turn = Turn()
    with turn, turn, ThreadPoolExecutor(1) as pool:  # re-entrant
        pool.submit(copied(turn).__enter__).result(timeout=10)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(turn.__enter__).result(timeout=10)
