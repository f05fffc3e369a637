"""One reward a process, however many threads ask for it at once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_lrm import Conditioning, InvalidInputError, RewardModel
from dina_lrm.errors import ScoringError
from dina_lrm.integrations import local
from dina_lrm.integrations.local import LocalReward, check_pairs, finite, local_reward


def test_threads_that_ask_at_once_load_once(bundled: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    started = threading.Barrier(4, timeout=30)

    def load(*arguments: Any, **settings: Any) -> RewardModel:
        calls.append((arguments, settings))
        return bundled

    def ask(_: int) -> LocalReward:
        started.wait()
        return local_reward("some/reward", pipeline="some/pipeline", device="cpu", dtype="bfloat16")

    monkeypatch.setattr(RewardModel, "from_pretrained", load)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(ask, range(4)))
        assert calls == [(("some/reward", "some/pipeline"), {"device": "cpu", "dtype": torch.bfloat16})]
        assert len(set(map(id, found))) == 1
        local_reward("some/reward", pipeline="some/pipeline", device="cpu")
        assert len(calls) == 2, "other arguments, another reward"
    finally:
        local._loaded.cache_clear()


def test_one_thread_at_a_time(bundled: RewardModel) -> None:
    reward = LocalReward(bundled)
    inside = threading.Event()
    with ThreadPoolExecutor(1) as pool:

        def enter() -> None:
            with reward.turn():
                inside.set()

        with reward.turn():
            waiting = pool.submit(enter)
            assert not inside.wait(0.1)
        waiting.result(timeout=30)
    assert inside.is_set()


def test_autocast_of_the_trainer_does_not_reach_the_score(
    bundled: RewardModel, latents: Tensor, conditioning: Conditioning
) -> None:
    expected = bundled.score_latents(latents, conditioning, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16), LocalReward(bundled).turn() as model:
        scores = model.score_latents(latents, conditioning, seed=0)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="device = 'cuda'"):
        local_reward("bundled")


@pytest.mark.parametrize("dtype", ["float23", "nn"])
def test_an_unknown_dtype_is_said(dtype: str) -> None:
    with pytest.raises(InvalidInputError, match=f"dtype = '{dtype}'"):
        local_reward("bundled", device="cpu", dtype=dtype)


def test_scores_that_are_not_finite_are_errors() -> None:
    good = torch.tensor([1.0, -2.0])
    assert finite(good) is good
    with pytest.raises(ScoringError, match=r"2 of 3 scores.* nan at index 1"):
        finite(torch.tensor([1.0, torch.nan, torch.inf]))


def test_prompts_come_in_pairs_with_pictures() -> None:
    assert check_pairs(("a", "b"), 2, "images") == ["a", "b"]
    with pytest.raises(InvalidInputError, match="1 prompts for 2 images"):
        check_pairs(["a"], 2, "images")
    with pytest.raises(InvalidInputError, match="one string for 2 images"):
        check_pairs("ab", 2, "images")
