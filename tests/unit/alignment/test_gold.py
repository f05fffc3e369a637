"""The rule that says when proxy and gold part, on curves made by hand; rewards and their sums."""

import numpy as np
import pytest
import torch

from dina_lrm.alignment.gold import Evaluation, overoptimisation, paired_gain
from dina_lrm.errors import InvalidInputError
from dina_lrm.sampling.rewards import RewardError, RewardSum, checked

PROMPTS = 200


def history(
    proxy: list[float], gold: list[float], *, noise: float = 0.05, seed: int = 0, prompts: int = PROMPTS
) -> list[Evaluation]:
    """Evaluations whose means are given; prompts differ a lot, and each changes a little by chance."""
    rng = np.random.default_rng(seed)
    level = rng.normal(size=(2, prompts))
    return [
        Evaluation(
            step=10 * index,
            seconds=0.0,
            proxy=tuple(level[0] + p + noise * rng.normal(size=prompts)),
            gold={"judge": tuple(level[1] + g + noise * rng.normal(size=prompts))},
        )
        for index, (p, g) in enumerate(zip(proxy, gold, strict=True))
    ]


def first_warning(proxy: list[float], gold: list[float], **settings: float) -> int | None:
    """The evaluation at which the rule first speaks, as a run would see them one by one."""
    found = history(proxy, gold, **settings)
    return next((k for k in range(len(found)) if overoptimisation(found[: k + 1], window=3)), None)


def test_a_real_gain_raises_no_warning() -> None:
    proxy = [0.2 * k for k in range(12)]
    assert first_warning(proxy, [0.1 * value for value in proxy]) is None


def test_an_honest_plateau_of_both_raises_none() -> None:
    proxy = [0.0, 0.5, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
    assert first_warning(proxy, [0.2 * value for value in proxy]) is None


def test_the_warning_comes_before_a_tenth_of_the_gain_is_lost() -> None:
    """Gold follows, stalls, falls, while the proxy goes on: the rule speaks while gold stalls."""
    proxy = [0.25 * k for k in range(14)]
    gold = [0.0, 0.05, 0.1, 0.15, 0.19, 0.21, 0.22, 0.22, 0.21, 0.19, 0.16, 0.12, 0.07, 0.01]
    for seed in range(5):
        at = first_warning(proxy, gold, seed=seed)
        assert at is not None
        assert 4 <= at
        assert gold[at] > 0.9 * max(gold)


def test_a_reward_that_never_helped_is_found_out() -> None:
    proxy = [0.25 * k for k in range(8)]
    at = first_warning(proxy, [-0.02 * k for k in range(8)])
    assert at is not None
    assert at <= 4


@pytest.mark.parametrize("slope", [0.0, 0.02])
def test_false_alarms_of_whole_runs_are_rare(slope: float) -> None:
    """Gold is constant, or rises by 0.4 of a prompt's noise at each of 10 evaluations: in 300 runs, at 5 %,
    25 false alarms or more have a chance of 1 in 200."""
    proxy, gold = [0.2 * k for k in range(10)], [slope * k for k in range(10)]
    alarms = 0
    for seed in range(300):
        seen = history(proxy, gold, seed=seed, prompts=40)
        alarms += any(overoptimisation(seen[: k + 1], planned=10) for k in range(1, 10))
    assert alarms < 25


def test_a_fall_is_said_with_its_size() -> None:
    found = overoptimisation(history([0.0, 1.0, 2.0], [0.0, 0.5, 0.2]), window=3)
    assert found is not None
    assert "gold has fallen by 0.299" in found
    assert "update 10" in found


def test_without_gold_nothing_can_part() -> None:
    plain = [Evaluation(step=k, seconds=0.0, proxy=(float(k), float(k))) for k in range(9)]
    assert overoptimisation(plain, window=3) is None


def test_paired_gain_sees_what_prompts_have_in_common() -> None:
    """Prompts vary by 1, changes by 0.01: unpaired intervals would hide the gain of 0.1."""
    rng = np.random.default_rng(0)
    before = rng.normal(size=100)
    mean, low, high = paired_gain(before + 0.1 + 0.01 * rng.normal(size=100), before)
    assert mean == pytest.approx(0.1, abs=0.005)
    assert 0.09 < low < high < 0.11


def test_rewards_add_up_with_their_weights() -> None:
    total = RewardSum(
        (
            lambda latents, prompts, seeds: latents.sum(dim=(1, 2, 3)),
            lambda latents, prompts, seeds: latents[:, 0, 0, 0],
        ),
        (2.0, -1.0),
    )
    latents = torch.arange(8.0).reshape(2, 1, 2, 2)
    assert total(latents, ["a", "b"], [0, 0]).tolist() == [2 * 6.0 - 0.0, 2 * 22.0 - 4.0]
    with pytest.raises(InvalidInputError, match="cannot score noisy states"):
        total.of_state(latents, ["a", "b"], torch.ones(2))
    with pytest.raises(InvalidInputError, match="1 weights for 2 rewards"):
        RewardSum(total.terms, (1.0,))


def test_a_reward_that_is_not_a_number_names_the_prompt() -> None:
    with pytest.raises(RewardError, match=r"1 of 2 pictures.* nan .*'b'"):
        checked(torch.tensor([1.0, float("nan")]), ["a", "b"])
    with pytest.raises(RewardError, match=r"\(3,\) scores.* 2 pictures"):
        checked(torch.zeros(3), ["a", "b"])
