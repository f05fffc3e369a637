"""Accuracy and its ties, intervals, calibration, agreement: by hand, by symmetry, by simulation."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.stats import norm

from dina_lrm.core.calibration import determined_scale, fit_scale
from dina_lrm.evaluation import metrics
from dina_lrm.evaluation.metrics import (
    agreement,
    cluster_bootstrap,
    expected_correctness,
    pair_correctness,
    pairwise_accuracy,
    reliability,
)


def test_accuracy_by_hand() -> None:
    margin = [2.0, 1.0, -1.0, 0.0, 5.0, -3.0]
    target = [1.0, 0.8, 1.0, 1.0, 0.5, 0.2]  # right, right, wrong, score tie, rater tie, right (rejected won)
    strict = pairwise_accuracy(margin, target)
    assert (strict.value, strict.num_pairs, strict.num_rater_ties, strict.num_score_ties) == (3 / 5, 5, 1, 1)
    assert pairwise_accuracy(margin, target, ties="half").value == 3.5 / 5
    skipped = pairwise_accuracy(margin, target, ties="skip")
    assert (skipped.value, skipped.num_pairs) == (3 / 4, 4)


def test_all_score_ties() -> None:
    margin = [0.0] * 4
    assert pairwise_accuracy(margin).value == 0.0
    assert pairwise_accuracy(margin, ties="half").value == 0.5
    skipped = pairwise_accuracy(margin, ties="skip")
    assert math.isnan(skipped.value)
    assert (skipped.num_pairs, skipped.num_score_ties) == (0, 4)


def test_all_rater_ties() -> None:
    result = pairwise_accuracy([1.0, -1.0], [0.5, 0.5])
    assert math.isnan(result.value)
    assert (result.num_pairs, result.num_rater_ties) == (0, 2)


@pytest.mark.parametrize("ties", ["wrong", "half", "skip"])
def test_accuracy_does_not_depend_on_which_side_is_called_chosen(ties: str) -> None:
    rng = np.random.default_rng(0)
    margin, target = rng.normal(size=50).round(0), rng.integers(0, 5, size=50) / 4
    swapped = pairwise_accuracy(-margin, 1 - target, ties=ties)
    assert pairwise_accuracy(margin, target, ties=ties) == swapped


def test_accuracy_ignores_a_monotone_scale_and_refuses_nan() -> None:
    margin = np.array([1.0, -2.0, 3.0])
    assert pairwise_accuracy(margin).value == pairwise_accuracy(1000 * margin).value
    with pytest.raises(ValueError, match="1 margins are NaN"):
        pairwise_accuracy([1.0, float("nan")])
    with pytest.raises(ValueError, match="1 targets for 2 margins"):
        pairwise_accuracy([1.0, 2.0], [1.0])


def test_the_best_reward_reaches_the_bayes_optimum_in_expectation() -> None:
    p = np.array([0.9, 0.4, 0.5, 0.05])
    assert expected_correctness(p - 0.5, p).mean() == np.maximum(p, 1 - p).mean()
    assert expected_correctness(0.5 - p, p).mean() == np.minimum(p, 1 - p).mean()


# --- intervals


def test_bootstrap_of_independent_pairs_is_the_binomial_interval() -> None:
    rng = np.random.default_rng(0)
    correct = (rng.random(2000) < 0.7).astype(float)
    interval = cluster_bootstrap(correct, np.arange(2000))
    half_width = 1.96 * math.sqrt(correct.mean() * (1 - correct.mean()) / 2000)
    assert interval.value == correct.mean()
    assert interval.low == pytest.approx(correct.mean() - half_width, abs=3e-3)
    assert interval.high == pytest.approx(correct.mean() + half_width, abs=3e-3)


def test_interval_widens_when_the_pairs_of_a_prompt_agree() -> None:
    """Ten copies of each outcome hold no more evidence than one: wider by sqrt(10) than if independent."""
    rng = np.random.default_rng(1)
    outcomes = (rng.random(200) < 0.7).astype(float)
    copies, prompts = np.repeat(outcomes, 10), np.repeat(np.arange(200), 10)
    clustered, naive = cluster_bootstrap(copies, prompts), cluster_bootstrap(copies, np.arange(2000))
    once = cluster_bootstrap(outcomes, np.arange(200))
    width = clustered.high - clustered.low
    assert width == pytest.approx(once.high - once.low, rel=0.1)
    assert width / (naive.high - naive.low) == pytest.approx(math.sqrt(10), rel=0.15)


def test_many_clusters_are_resampled_by_the_same_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 1 to 5 pairs: counting those that are alike gives the interval of drawing each."""
    rng = np.random.default_rng(2)
    prompts = np.repeat(np.arange(30_000), rng.integers(1, 6, size=30_000))
    correct = (rng.random(len(prompts)) < 0.7).astype(float)
    correct[rng.random(len(prompts)) < 0.1] = math.nan
    optimal = np.ones_like(correct)
    together = cluster_bootstrap(correct, prompts, reference=optimal, num_resamples=4000, confidence=0.9)
    monkeypatch.setattr(metrics, "MANY_CLUSTERS", 30_000)
    apart = cluster_bootstrap(correct, prompts, reference=optimal, num_resamples=4000, confidence=0.9)
    assert together.value == apart.value
    width = apart.high - apart.low
    assert together != apart  # another stream of random numbers
    # A 5 % quantile of 4,000 normal draws is known to 0.033 deviations, which is 0.01 of the width.
    assert together.low == pytest.approx(apart.low, abs=0.06 * width)
    assert together.high == pytest.approx(apart.high, abs=0.06 * width)
    again = cluster_bootstrap(correct, prompts, reference=optimal, num_resamples=4000, confidence=0.9)
    assert again == apart


def test_many_clusters_of_their_own_are_drawn_each() -> None:
    values = np.random.default_rng(3).standard_normal(25_000)
    interval = cluster_bootstrap(values, np.arange(25_000), num_resamples=500)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 / 25_000**0.5, rel=0.12)


def test_share_of_an_optimum_by_hand_and_paired() -> None:
    correct, optimal = [1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]
    assert cluster_bootstrap(correct, [0, 1, 2, 3], reference=optimal).value == pytest.approx(2 / 3)
    same = cluster_bootstrap(correct, [0, 1, 2, 3], reference=correct, num_resamples=50, seed=3)
    assert same.value == 1.0


def test_bootstrap_edge_cases() -> None:
    assert math.isnan(cluster_bootstrap([float("nan")], [0]).value)
    one = cluster_bootstrap([1.0, 0.0], ["p", "p"])
    assert one.value == 0.5
    assert math.isnan(one.low)
    skipping = cluster_bootstrap([1.0, float("nan"), 1.0], ["a", "a", "b"])
    assert (skipping.value, skipping.low, skipping.high) == (1.0, 1.0, 1.0)
    assert cluster_bootstrap([1.0, 0.0], [0, 1], seed=5) == cluster_bootstrap([1.0, 0.0], [0, 1], seed=5)


# --- calibration


def test_fit_scale_recovers_the_spread_of_simulated_raters() -> None:
    rng = np.random.default_rng(0)
    margin = rng.normal(size=20_000)
    for scale in (0.3, 2.0):
        target = (rng.random(20_000) < stats.norm.cdf(margin / scale)).astype(float)
        assert fit_scale(torch.tensor(margin), torch.tensor(target)) == pytest.approx(scale, rel=0.06)


def test_fit_scale_is_equivariant_and_symmetric() -> None:
    margin = torch.tensor([1.0, 0.5, -0.3, 2.0, -1.0])
    target = torch.tensor([1.0, 0.7, 0.6, 0.9, 0.4])
    scale = fit_scale(margin, target)
    assert fit_scale(10 * margin, target) == pytest.approx(10 * scale, rel=1e-4)
    assert fit_scale(-margin, 1 - target) == pytest.approx(scale, rel=1e-6)


def test_fit_scale_stays_finite_where_there_is_no_optimum() -> None:
    assert (
        fit_scale(torch.ones(5), torch.ones(5)) == pytest.approx(1e-3, rel=0.01)
        or fit_scale(torch.ones(5), torch.ones(5)) < 0.2
    )  # any small spread is equally likely once every pair is certain
    assert fit_scale(-torch.ones(5), torch.ones(5)) > 100
    with pytest.raises(ValueError, match="no pairs"):
        fit_scale(torch.ones(0), torch.ones(0))


def test_calibrated_probabilities_come_true() -> None:
    rng = np.random.default_rng(2)
    margin = 2 * rng.normal(size=30_000)
    votes = (rng.random(30_000) < stats.norm.cdf(margin / 1.5)).astype(float)
    good = reliability(margin, votes)
    sure = reliability(margin, votes, scale=0.3)
    assert good.expected_calibration_error < 0.01
    assert sure.expected_calibration_error > 0.1
    assert good.log_loss < sure.log_loss
    assert good.brier < sure.brier
    assert sum(good.bin_count) == 30_000
    assert max(good.bin_count) - min(good.bin_count) <= 1


def test_reliability_by_hand_with_votes() -> None:
    """Two bins: margin 0 twice (stated 0.5, observed 0.5) and margin 1 with 3 of 4 votes (stated Phi(1))."""
    result = reliability([0.0, 0.0, 1.0, -1.0], [1.0, 0.2, 0.75, 0.25], scale=1.0, num_bins=2)
    stated = stats.norm.cdf(1.0)
    assert result.bin_probability == pytest.approx((0.5, stated))
    assert result.bin_accuracy == pytest.approx((0.5, 0.75))
    assert result.expected_calibration_error == pytest.approx(0.5 * (stated - 0.75))


def test_all_ties_are_a_coin() -> None:
    result = reliability([0.0] * 6, num_bins=3)
    assert result.bin_probability == (0.5, 0.5, 0.5)
    assert result.expected_calibration_error == 0.0
    assert result.log_loss == pytest.approx(math.log(2))


# --- agreement


def test_agreement_by_hand() -> None:
    assert agreement([[1.0, 1.0], [1.0, -1.0]]) == 0.5
    assert agreement([[0.0], [0.0]]) == 1.0
    assert agreement([[1.0], [2.0], [-1.0], [-2.0]]) == pytest.approx(2 / 6)
    with pytest.raises(ValueError, match="at least 2"):
        agreement([[1.0]])


def test_correctness_marks_uncounted_pairs() -> None:
    assert np.isnan(pair_correctness([1.0], [0.5])).all()
    assert np.isnan(pair_correctness([0.0], [1.0], ties="skip")).all()


def test_a_scale_that_the_pairs_do_not_determine_is_none() -> None:
    """Separated pairs want scale 0, reversed ones infinity, votes both ways something between."""
    margin = torch.tensor([1.0, 2.0, 0.5, -0.3])
    assert determined_scale(margin, (margin > 0).float()) is None
    assert determined_scale(-margin, (margin > 0).float()) is None
    assert determined_scale(torch.zeros(4), torch.ones(4)) is None
    assert determined_scale(margin * 1e-6, torch.tensor([1.0, 1.0, 0.0, 0.0])) is None  # below the bound
    found = determined_scale(margin, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert found == fit_scale(margin, torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_a_scale_is_not_tested_on_what_it_was_fitted_to() -> None:
    """Two prompts whose margins have unlike scales: each is read on the scale of the other."""
    margin, votes = [1.0] * 4 + [3.0] * 4, [1.0, 1.0, 1.0, 0.0] * 2
    prompts = ["a"] * 4 + ["b"] * 4
    one = 1.0 / float(norm.ppf(0.75))  # three of four won at a margin of 1
    result = reliability(margin, votes, prompts=prompts, num_bins=2)
    stated = [float(norm.cdf(1.0 / (3 * one))), float(norm.cdf(3.0 / one))]
    assert result.bin_probability == pytest.approx(stated, abs=1e-4)
    assert result.log_loss > reliability(margin, votes, num_bins=2).log_loss
