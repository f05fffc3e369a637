"""Each benchmark's rule on cases worked out by hand."""

import itertools

import numpy as np
import pytest

from dina_lrm.data.sources import SOURCES
from dina_lrm.evaluation.rules import (
    DEFAULT_RULE,
    RULES,
    accuracy_by_rule,
    best_threshold,
    credits,
    kendall_by_prompt,
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
    with pytest.raises(ValueError, match="1 margins are NaN: every pair needs a score"):
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
    for rule in ("three-way", "tie-calibrated"):
        best = best_threshold(rule, margin, tie)
        reached = np.nanmean(credits(RULES[rule], margin, tie, threshold=best))
        others = [np.nanmean(credits(RULES[rule], margin, tie, threshold=t)) for t in np.linspace(0, 3, 500)]
        assert reached >= max(others)
        assert best > 0


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
