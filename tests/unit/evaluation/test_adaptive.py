"""Learning levels: every join of levels from one pass a level, the greedy order, when to stop."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dina_lrm import RewardModel
from dina_lrm.data.latents import LatentPairs
from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.adaptive import (
    LevelOrder,
    joined_scores,
    learn_levels,
    measure_levels,
    one_pair_a_prompt,
    order_levels,
    stopping_rule,
)
from dina_lrm.evaluation.noise_sweep import PairScores, Setting, score_pairs
from tests.tiny import make_tiny_reward

LEVELS = (0.1, 0.4, 0.8)


@pytest.fixture(scope="module")
def model(tiny_backbone: Path) -> RewardModel:
    return make_tiny_reward(tiny_backbone).requires_grad_(False)


@pytest.fixture(scope="module")
def pairs() -> LatentPairs:
    """200 pairs of 50 prompts, among 150 images."""
    generator = torch.Generator().manual_seed(0)
    return LatentPairs(
        latents=torch.randn(150, 16, 4, 4, generator=generator),
        prompts=[f"p{index}" for index in range(50)],
        prompt_embeds=torch.randn(50, 5, 64, generator=generator),
        pooled_prompt_embeds=torch.randn(50, 64, generator=generator),
        prompt_index=torch.arange(200) % 50,
        chosen=torch.randint(0, 75, (200,), generator=generator),
        rejected=torch.randint(75, 150, (200,), generator=generator),
        target=torch.ones(200),
    )


def test_joins_are_those_of_the_fixed_ensembles(model: RewardModel, pairs: LatentPairs) -> None:
    ensembles = [(0.4,), (0.8, 0.1), LEVELS]
    joined = joined_scores(model, pairs, ensembles, seed=3)
    for row, levels in enumerate(ensembles):
        alone = score_pairs(model, pairs, Setting(noise_levels=levels), seed=3)
        torch.testing.assert_close(joined.chosen[row], alone.chosen[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(joined.rejected[row], alone.rejected[0], atol=1e-5, rtol=0)


def test_the_order_finds_the_levels_that_the_votes_follow(model: RewardModel, pairs: LatentPairs) -> None:
    """Votes follow the ensemble of 0.8 and 0.1: these are the first two, the calibration is its scale, and
    with a third the votes are less likely, so a plan ends before it."""
    truth = score_pairs(model, pairs, Setting(noise_levels=(0.8, 0.1)), seed=3)
    votes = torch.distributions.Normal(0, 1).cdf(truth.margin / (2 * truth.margin.std()))
    voted = replace(pairs, target=votes)
    done: list[tuple[int, int]] = []
    order = order_levels(
        model, voted, levels=LEVELS, num_levels=9, seed=3, on_progress=lambda *now: done.append(now)
    )
    assert set(order.noise_levels[:2]) == {0.8, 0.1}
    assert order.noise_levels[2] == 0.4
    assert order.scales[1] == pytest.approx(2 * float(truth.margin.std()), rel=1e-3)
    assert done[-1][0] == done[-1][1]
    plan = order.until_most_likely()
    assert plan.noise_levels == order.noise_levels[:2]
    assert plan.ensembles == [order.noise_levels[:1], order.noise_levels[:2]]
    torch.testing.assert_close(plan.scores.chosen[1], truth.chosen[0], atol=1e-5, rtol=0)


def by_hand(first: torch.Tensor, last: torch.Tensor) -> LevelOrder:
    return LevelOrder(
        noise_levels=(0.3, 0.6),
        scales=(1.0, 2.0),
        nats=(0.5, 0.4),
        scores=PairScores(chosen=torch.stack([first, last]) + 1, rejected=torch.ones(2, len(first))),
    )


def test_when_to_stop_by_hand() -> None:
    """Learned: first margins of 1, three in four keep their sign, so the spread is 1.4826. Control: of 100
    pairs the three with a first margin of 0.5 turn; at 5 % a decision needs more than 0.5, the next
    threshold above 0.5 / 1.4826 = 0.337 being 0.35."""
    order = by_hand(torch.ones(4), torch.tensor([1.0, 1.0, 1.0, -1.0]))
    margins = torch.full((2, 100), 2.0)
    margins[0, :3], margins[1, :3] = 0.5, -1.0
    levels = stopping_rule(order, margins, error=0.05)
    assert levels.thresholds[0] == pytest.approx(0.35 * 1.4826, rel=1e-4)
    assert levels.scales == (1.0, 2.0)
    assert levels.offsets == pytest.approx((1.5, 1.25))  # means of chosen 2 and 1.5, rejected 1
    assert levels.num_pairs == 104
    found = measure_levels(levels, margins, torch.ones(100))
    assert found["num_levels"] == pytest.approx(1.03)
    assert found["flipped"] == 0.0
    assert found["accuracy"] == found["accuracy_all"] == pytest.approx(0.97)
    loose = measure_levels(replace(levels, thresholds=(0.0,)), margins, torch.ones(100))
    assert loose["num_levels"] == 1.0
    assert loose["flipped"] == pytest.approx(0.03)
    assert loose["accuracy"] == 1.0


def test_too_few_pairs_are_refused(model: RewardModel, pairs: LatentPairs) -> None:
    with pytest.raises(InvalidInputError, match="196 pairs of 49 prompts"):
        learn_levels(model, pairs.subset((pairs.prompt_index < 49).nonzero().flatten()))
    order = by_hand(torch.ones(4), torch.ones(4))
    with pytest.raises(InvalidInputError, match=r"at most 0\.5 %"):
        stopping_rule(order, torch.ones(2, 100), error=0.005)


def test_one_pair_of_each_prompt_is_asked(pairs: LatentPairs) -> None:
    """Pairs of one prompt are not independent, so that all of them would promise more than they can."""
    chosen = one_pair_a_prompt(pairs, seed=3)
    prompts = pairs.prompt_index[chosen].tolist()
    assert sorted(prompts) == sorted(set(pairs.prompt_index.tolist()))
    assert one_pair_a_prompt(pairs, seed=3).tolist() == chosen.tolist()
    assert one_pair_a_prompt(pairs, seed=4).tolist() != chosen.tolist()
