"""Each benchmark's rule on cases worked out by hand."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from dina_lrm.data.sources.layouts import SOURCES
from dina_lrm.evaluation.rules import (
    DEFAULT_RULE,
    RULES,
    accuracy_by_rule,
    best_threshold,
    credits,
    kendall_by_prompt,
    spearman_by_prompt,
)

MARGIN = [1.0, 2.0, -1.0, 0.0, 3.0, 0.0]
TIE = [False, False, False, False, True, True]
PROMPT = ["p", "p", "p", "q", "q", "r"]
"""Prompt p: right, right, wrong. q: a score tie on a strict pair, a decision on a rater tie. r: both tie."""


@pytest.mark.parametrize(
    ("rule", "expected", "num_pairs"),
    [
        ("strict", 2 / 4, 4),  # 2 right; wrong: 1 and the score tie; two rater ties left out
        ("strict-by-prompt", (2 / 3 + 0) / 2, 4),  # p 2/3, q 0, r has no counted pair
        ("inversions", (2 / 3 + (0.5 + 1) / 2 + 1) / 3, 6),  # p 2/3, q 3/4, r 1
        ("concordance", 2 / 6, 6),  # rater ties are wrong whatever the model says
        ("three-way", (1 + 1 + 0 + 0.5 + 0.5 + 1) / 6, 6),
        ("soft-labels", (1 + 1 + 0 + 0 + 0.5 + 0) / 6, 6),
        ("tie-calibrated", (1 + 1 + 0 + 0 + 0 + 1) / 6, 6),
    ],
)
def test_every_rule_by_hand(rule: str, expected: float, num_pairs: int) -> None:
    found = accuracy_by_rule(rule, MARGIN, TIE, PROMPT)
    assert found.accuracy.value == pytest.approx(expected)
    assert (found.num_pairs, found.num_rater_ties, found.num_score_ties) == (num_pairs, 2, 1)
    assert found.rule == rule


def test_a_model_that_always_ties() -> None:
    """Four strict pairs and two rater ties, all margins 0: what indifference earns under each rule."""
    earned = {rule: accuracy_by_rule(rule, [0.0] * 6, TIE, PROMPT).accuracy.value for rule in RULES}
    assert earned == pytest.approx(
        {
            "strict": 0,
            "strict-by-prompt": 0,
            "inversions": (0.5 + (0.5 + 1) / 2 + 1) / 3,
            "concordance": 0,
            "three-way": (4 * 0.5 + 2) / 6,
            "soft-labels": 0,
            "tie-calibrated": 2 / 6,
        }
    )


def test_the_ceiling_that_concordance_sets_on_imagereward() -> None:
    """6,399 strict and 831 tied pairs: a perfect model gets 6399 / 7230 = 88.5 %."""
    margin, tie = np.ones(7230), np.arange(7230) >= 6399
    found = accuracy_by_rule("concordance", margin, tie, np.arange(7230) % 466, num_resamples=10)
    assert found.accuracy.value == pytest.approx(0.885, abs=5e-4)


def test_one_prompt_has_no_interval() -> None:
    found = accuracy_by_rule("strict", [1.0, -1.0], [False, False], ["p", "p"])
    assert found.accuracy.value == 0.5
    assert np.isnan(found.accuracy.low)
    assert found.num_prompts == 1


def test_only_rater_ties_are_nothing_to_count() -> None:
    found = accuracy_by_rule("strict-by-prompt", [1.0, 0.0], [True, True], ["p", "q"])
    assert np.isnan(found.accuracy.value)
    assert found.num_pairs == 0


def test_missing_scores_are_an_error_and_not_dropped() -> None:
    with pytest.raises(ValueError, match="1 margins are NaN"):
        accuracy_by_rule("strict", [1.0, float("nan")], [False, False], ["p", "q"])
    with pytest.raises(ValueError, match="2 margins for 1 pairs"):
        credits(RULES["strict"], [1.0, 2.0], [False])
    with pytest.raises(ValueError, match="1 prompts for 2 pairs"):
        accuracy_by_rule("strict", [1.0, 2.0], [False, False], ["p"])


def test_a_threshold_turns_small_margins_into_ties() -> None:
    """Margins 0.3 and -0.3 are ties at 0.3: three-way gives each strict one a half, and the rater tie 1."""
    margin, tie = [0.3, -0.3, 2.0, 0.1], [False, False, False, True]
    assert credits(RULES["three-way"], margin, tie, threshold=0.3).tolist() == [0.5, 0.5, 1.0, 1.0]
    assert credits(RULES["three-way"], margin, tie).tolist() == [1.0, 0.0, 1.0, 0.5]


def test_the_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    tie = rng.random(200) < 0.3
    margin = np.where(tie, 0.2, 1.0) * rng.standard_normal(200) + np.where(tie, 0.0, 0.8)
    gaps = [2 * math.atanh(gap / 10) for gap in range(10)]  # of two probabilities, as PickScore's code tries
    for rule, tried in (("three-way", gaps), ("tie-calibrated", np.linspace(0, 3, 500))):
        best = best_threshold(rule, margin, tie)
        reached = np.nanmean(credits(RULES[rule], margin, tie, threshold=best))
        others = [np.nanmean(credits(RULES[rule], margin, tie, threshold=t)) for t in tried]
        assert reached >= max(others)
        assert best > 0
    assert best_threshold("three-way", margin, tie) in gaps


def test_the_smallest_of_equally_good_thresholds() -> None:
    """The first pair is right if decided, the second, a rater tie, if tied; 0.7 adds nothing to 0.5."""
    assert best_threshold("tie-calibrated", [2.0, 0.5, -0.7], [False, True, False]) == 0.5
    assert best_threshold("tie-calibrated", [2.0, 1.0], [False, False]) == 0.0


@pytest.mark.long
def test_the_interval_covers() -> None:
    """A known accuracy of 70 %, prompts of 5 pairs with an effect of their own, 1,000 repetitions."""
    rng = np.random.default_rng(1)
    covered = 0
    for repetition in range(1000):
        ability = rng.choice([0.55, 0.85], size=60)  # by prompt, 0.7 on average
        right = rng.random((60, 5)) < ability[:, None]
        margin = np.where(right, 1.0, -1.0).ravel()
        found = accuracy_by_rule(
            "strict", margin, np.zeros(300, bool), np.arange(300) // 5, num_resamples=400, seed=repetition
        ).accuracy
        covered += found.low <= 0.7 <= found.high
    assert 930 <= covered <= 970


def test_every_source_has_a_published_rule() -> None:
    assert set(DEFAULT_RULE) == {*SOURCES, "jsonl", "folder"}
    assert set(DEFAULT_RULE.values()) <= set(RULES)


def test_kendall_is_scipys_tau_b() -> None:
    from scipy.stats import kendalltau

    rng = np.random.default_rng(3)
    margin, tie, prompt, expected = [], [], [], []
    for label in range(20):
        ranks = rng.integers(1, 4, size=6)  # with ties
        scores = np.round(rng.standard_normal(6) - 0.5 * ranks, 0 if label % 2 else 3)  # sometimes with ties
        expected.append(kendalltau(-ranks, scores, variant="b").statistic)
        for i, j in itertools.combinations(range(6), 2):
            better, worse = (i, j) if ranks[i] <= ranks[j] else (j, i)
            margin.append(scores[better] - scores[worse])
            tie.append(ranks[i] == ranks[j])
            prompt.append(label)
    found = kendall_by_prompt(margin, tie, prompt)
    assert found.value == pytest.approx(np.nanmean(expected))
    assert found.low < found.value < found.high


def test_kendall_leaves_out_prompts_without_an_order() -> None:
    margin, tie = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0], [False, False, True, False, False, False]
    found = kendall_by_prompt(margin, tie, ["p", "p", "p", "q", "q", "r"])
    # p: C = 2 of 3 pairs, one rater tie: 2 / sqrt(2 * 3); q: scores tie everywhere; r: one pair
    assert found.value == pytest.approx(2 / 6**0.5)
    assert np.isnan(kendall_by_prompt([0.0], [False], ["p"]).value)


def test_spearman_is_scipys() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(4)
    pictures, chosen, rejected, tie, prompt, expected = [], [], [], [], [], []
    for label in range(20):
        count = 3 + label % 4
        ranks = rng.integers(1, 4, size=count)  # with ties
        scores = np.round(rng.standard_normal(count) - 0.5 * ranks, 0 if label % 2 else 3)
        if len(set(ranks.tolist())) > 1 and len(set(scores.tolist())) > 1:
            wins = [np.sign(ranks - rank).sum() for rank in ranks]
            expected.append(spearmanr(wins, scores).statistic)
        for i, j in itertools.combinations(range(count), 2):
            better, worse = (i, j) if ranks[i] <= ranks[j] else (j, i)
            pictures.append((f"{better}.png", f"{worse}.png"))  # the same names under every prompt
            chosen.append(scores[better])
            rejected.append(scores[worse])
            tie.append(ranks[i] == ranks[j])
            prompt.append(label)
    order = rng.permutation(len(tie))  # prompts need not stand together
    pictures, prompt, tie = ([column[i] for i in order] for column in (pictures, prompt, tie))
    sides = np.array(chosen)[order], np.array(rejected)[order]
    found = spearman_by_prompt(pictures, sides, tie, prompt)
    assert len(expected) > 12
    assert found.value == pytest.approx(np.mean(expected))
    assert found.low < found.value < found.high


def test_spearman_needs_every_pair_of_three_pictures() -> None:
    pairs = [("a", "b"), ("a", "c"), ("a", "b"), ("a", "b"), ("a", "c"), ("b", "c")]
    prompts = ["p", "p", "q", "r", "r", "r"]  # r alone is complete, and its scores tie everywhere
    found = spearman_by_prompt(pairs, ([1.0] * 6, [1.0] * 6), [False] * 6, prompts)
    assert np.isnan(found.value)


def test_many_prompts_take_no_longer_each() -> None:
    """300,000 comparisons of 100,000 prompts of three pictures. Scores follow the raters but for every fourth
    prompt, where the last two pictures are turned around: there 2 of 3 pairs are right, tau is 1/3 and rho
    1/2. A statistic that is quadratic in prompts would need hours."""
    prompts = np.arange(100_000)
    turned = prompts % 4 == 0
    score = np.stack([np.full(len(prompts), 3.0), np.where(turned, 1.0, 2.0), np.where(turned, 2.0, 1.0)])
    better, worse = [0, 0, 1], [1, 2, 2]
    chosen, rejected = (score[side].T.ravel() for side in (better, worse))
    pictures = np.stack([(3 * prompts[:, None] + side).ravel() for side in (better, worse)], axis=1)
    labels, ties = np.repeat(prompts, 3), np.zeros(3 * len(prompts), bool)
    margin = chosen - rejected
    for rule in ("strict", "strict-by-prompt"):
        assert accuracy_by_rule(rule, margin, ties, labels).accuracy.value == pytest.approx(11 / 12)
    assert kendall_by_prompt(margin, ties, labels).value == pytest.approx(5 / 6)
    found = spearman_by_prompt(pictures, (chosen, rejected), ties, labels)
    assert found.value == pytest.approx(7 / 8)
    # By prompt 1 or 1/2, the latter with p = 1/4: the mean's deviation is sqrt(p (1 - p)) / 2 / sqrt(n).
    half_width = 1.96 * (3 / 16) ** 0.5 / 2 / len(prompts) ** 0.5
    assert (found.high - found.low) / 2 == pytest.approx(half_width, rel=0.05)
    # Moved up by up to 0.0003, wrong pairs have margins of 1 - 2e-9 at most, right ones of 1 and more.
    rule = replace(RULES["three-way"], thresholds=None)
    best = best_threshold(rule, margin + np.arange(len(margin)) / 1e9, ties)
    assert best == pytest.approx(1 - 2e-9, abs=1e-12)
