"""Pairwise accuracy as each benchmark's own code counts it: what ties are worth, and over what is averaged.

The same scores give accuracies that differ by points under different rules, so a figure means something only
with the name of its rule. A rule says what a pair is worth in five cases:

    raters chose a side    the model agrees: 1, disagrees: 0, scores both the same: `score_tie`
    raters tied            the model prefers a side: `rater_tie`, scores both the same: `both_tie`

and whether pairs or prompts are averaged. None means: not counted. The model "scores both the same" when its
margin is at most a threshold, which is 0 unless the rule fits one on other data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dina_lrm.evaluation.metrics import Interval, cluster_bootstrap

__all__ = [
    "RULES",
    "Rule",
    "RuleAccuracy",
    "accuracy_by_rule",
    "best_threshold",
    "credits",
    "kendall_by_prompt",
    "spearman_by_prompt",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How ties count and what is averaged."""

    name: str
    score_tie: float | None
    rater_tie: float | None
    both_tie: float | None
    average: Literal["pairs", "prompts"]
    source: str
    """Whose code counts so."""
    fits_threshold: bool = False
    """The code first looks for the margin below which it calls a tie, on other pairs."""


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            name="strict",
            score_tie=0.0,
            rater_tie=None,
            both_tie=None,
            average="pairs",
            source="ImageReward test.py; HPSv3 evaluate.py, whose pairs have no rater ties",
        ),
        Rule(
            name="strict-by-prompt",
            score_tie=0.0,
            rater_tie=None,
            both_tie=None,
            average="prompts",
            source="HPSv2 calc_ImageReward: mean of the accuracy of each prompt",
        ),
        Rule(
            name="inversions",
            score_tie=0.5,
            rater_tie=1.0,
            both_tie=1.0,
            average="prompts",
            source="HPSv2 inversion_score on HPDv2: 1 - discordant pairs / all pairs, prompt by prompt; that "
            "code breaks score ties by position, here they count half",
        ),
        Rule(
            name="concordance",
            score_tie=0.0,
            rater_tie=0.0,
            both_tie=0.0,
            average="pairs",
            source="the paper's code, calc_pairwise_accuracy: a rater tie is always wrong",
        ),
        Rule(
            name="three-way",
            score_tie=0.5,
            rater_tie=0.5,
            both_tie=1.0,
            average="pairs",
            source="PickScore eval_preference_predictor.py; the threshold is picked on validation_unique",
            fits_threshold=True,
        ),
        Rule(
            name="soft-labels",
            score_tie=0.0,
            rater_tie=0.5,
            both_tie=0.0,
            average="pairs",
            source="PickScore clip_task.py and LRM: label_0 (p0 > p1) + label_1 (p0 < p1)",
        ),
        Rule(
            name="tie-calibrated",
            score_tie=0.0,
            rater_tie=0.0,
            both_tie=1.0,
            average="pairs",
            source="GenAI-Bench inference.py, where A=B is right for both kinds of tie; VideoAlign with ties "
            "(arXiv:2305.14324)",
            fits_threshold=True,
        ),
    )
}

DEFAULT_RULE = {
    "hpdv3": "strict",
    "hpdv3++": "strict",
    "hpdv2": "inversions",
    "imagereward": "strict",
    "imagerewarddb": "strict",
    "genai-bench": "strict",
    "pickapic": "three-way",
    "folder": "strict",
    "jsonl": "strict",
}
"""The published rule of each source (`data.sources`); for GenAI-Bench the accuracy without ties, which most
papers state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleAccuracy:
    """An accuracy and the rule that makes it one."""

    rule: str
    accuracy: Interval
    """Resamples prompts."""
    num_pairs: int
    """Counted."""
    num_prompts: int
    """With at least one counted pair."""
    num_rater_ties: int
    num_score_ties: int
    threshold: float


def credits(
    rule: Rule, margin: ArrayLike, rater_tie: ArrayLike, *, threshold: float = 0.0
) -> NDArray[np.float64]:
    """What each pair is worth under a rule; NaN where it is not counted.

    Args:
        margin: score_chosen - score_rejected; NaN (a missing score) is an error, since dropping such pairs
            raises the accuracy unseen.
        rater_tie: True where raters had no preference; the sign of the margin means nothing there.
        threshold: largest |margin| that counts as a tie of scores.

    By hand: the model is right, wrong, tied on a strict pair, then decided and tied on two rater ties.

    >>> credits(RULES["three-way"], [1.0, -1.0, 0.0, 2.0, 0.0], [False, False, False, True, True])
    array([1. , 0. , 0.5, 0.5, 1. ])
    >>> credits(RULES["strict"], [1.0, -1.0, 0.0, 2.0, 0.0], [False, False, False, True, True])
    array([ 1.,  0.,  0., nan, nan])
    """
    margins, ties = np.asarray(margin, dtype=np.float64), np.asarray(rater_tie, dtype=bool)
    if margins.shape != ties.shape:
        raise ValueError(f"{margins.size} margins for {ties.size} pairs")
    if np.isnan(margins).any():
        raise ValueError(f"{int(np.isnan(margins).sum())} margins are NaN: every pair needs a score")
    same = np.abs(margins) <= threshold

    def worth(value: float | None) -> float:
        return np.nan if value is None else value

    strict = np.where(same, worth(rule.score_tie), (margins > 0).astype(np.float64))
    tied = np.where(same, worth(rule.both_tie), worth(rule.rater_tie))
    return np.where(ties, tied, strict)


def accuracy_by_rule(
    rule: Rule | str,
    margin: ArrayLike,
    rater_tie: ArrayLike,
    prompts: ArrayLike,
    *,
    threshold: float = 0.0,
    num_resamples: int = 2000,
    seed: int = 0,
) -> RuleAccuracy:
    """Accuracy under a rule, with an interval that resamples prompts.

    Args:
        prompts: the prompt of each pair, any labels.
        threshold: see `credits`; for a rule that fits one, fit it on other pairs with `best_threshold`.
    """
    rule = RULES[rule] if isinstance(rule, str) else rule
    values = credits(rule, margin, rater_tie, threshold=threshold)
    labels = np.asarray(prompts)
    if labels.shape != values.shape:
        raise ValueError(f"{labels.size} prompts for {values.size} pairs")
    counted = ~np.isnan(values)
    used = np.unique(labels[counted])
    if rule.average == "prompts" and len(used):
        means = np.array([values[counted & (labels == label)].mean() for label in used])
        interval = cluster_bootstrap(means, used, num_resamples=num_resamples, seed=seed)
    else:
        interval = cluster_bootstrap(values, labels, num_resamples=num_resamples, seed=seed)
    ties = np.asarray(rater_tie, dtype=bool)
    same = np.abs(np.asarray(margin, dtype=np.float64)) <= threshold
    return RuleAccuracy(
        rule=rule.name,
        accuracy=interval,
        num_pairs=int(counted.sum()),
        num_prompts=len(used),
        num_rater_ties=int(ties.sum()),
        num_score_ties=int((same & ~ties).sum()),
        threshold=threshold,
    )


def best_threshold(rule: Rule | str, margin: ArrayLike, rater_tie: ArrayLike) -> float:
    """The threshold with the highest mean credit; use it on other pairs than these.

    Only the observed |margin| and 0 need to be tried: between two of them nothing changes. Of equally good
    ones the smallest is taken.

    >>> best_threshold("tie-calibrated", [3.0, 2.0, 0.1, -0.2], [False, False, True, True])
    0.2
    """
    rule = RULES[rule] if isinstance(rule, str) else rule
    candidates = np.unique(np.append(np.abs(np.asarray(margin, dtype=np.float64)), 0.0))
    means = [float(np.nanmean(credits(rule, margin, rater_tie, threshold=t))) for t in candidates]
    return float(candidates[int(np.argmax(means))])


def kendall_by_prompt(
    margin: ArrayLike, rater_tie: ArrayLike, prompts: ArrayLike, *, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Kendall's tau-b between scores and the raters' order, mean over prompts, with an interval over prompts.

    It needs every two pictures of a prompt, as ranked lists give them. With C concordant and D discordant of
    n pairs, R ties of the raters and S of the scores, tau_b = (C - D) / sqrt((n - R) (n - S)). A prompt with
    one pair, or on which raters or scores tie everywhere, has no order to compare and is left out.

    >>> kendall_by_prompt([1.0, 2.0, -1.0], [False] * 3, ["p"] * 3).value  # 2 right, 1 wrong of 3
    0.3333333333333333
    """
    margins, ties, labels = np.asarray(margin, float), np.asarray(rater_tie, bool), np.asarray(prompts)
    taus, used = [], []
    for label in np.unique(labels):
        rows = labels == label
        signs = np.where(ties[rows], 0.0, np.sign(margins[rows]))
        pairs, rater, score = rows.sum(), ties[rows].sum(), (margins[rows] == 0).sum()
        if pairs > 1 and rater < pairs and score < pairs:
            taus.append(signs.sum() / np.sqrt((pairs - rater) * (pairs - score)))
            used.append(label)
    return cluster_bootstrap(taus, used, num_resamples=num_resamples, seed=seed)


def spearman_by_prompt(
    pictures: Sequence[tuple[str, str]],
    scores: tuple[ArrayLike, ArrayLike],
    rater_tie: ArrayLike,
    prompts: ArrayLike,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Spearman's rank correlation of scores and the raters' order, mean over prompts, interval over prompts.

    The raters' rank of a picture follows from its wins and losses, so a prompt counts only if every two of
    its pictures, three or more, were compared; one on which raters or scores tie everywhere is left out.

    Args:
        pictures: names of the chosen and the rejected picture of each comparison.
        scores: of the chosen and the rejected pictures.

    >>> pairs = [("a", "b"), ("a", "c"), ("b", "c")]  # raters: a, b, c; scores: b, a, c
    >>> spearman_by_prompt(pairs, ([2.0, 2.0, 3.0], [3.0, 1.0, 1.0]), [False] * 3, ["p"] * 3).value
    0.5
    """
    from scipy.stats import spearmanr  # here, since scipy is slow to load

    ties, labels = np.asarray(rater_tie, bool), np.asarray(prompts)
    chosen, rejected = (np.asarray(side, float) for side in scores)
    correlations, used = [], []
    for label in np.unique(labels):
        wins: dict[str, float] = {}
        score: dict[str, float] = {}
        rows = np.flatnonzero(labels == label)
        for row in rows:
            first, second = pictures[int(row)]
            step = 0.0 if ties[row] else 1.0
            wins[first], wins[second] = wins.get(first, 0.0) + step, wins.get(second, 0.0) - step
            score[first], score[second] = float(chosen[row]), float(rejected[row])
        count = len(wins)
        if count < 3 or len(rows) != count * (count - 1) // 2:
            continue
        if len(set(wins.values())) == 1 or len(set(score.values())) == 1:
            continue
        correlation, _ = spearmanr(list(wins.values()), [score[name] for name in wins])
        correlations.append(float(correlation))  # pyright: ignore[reportArgumentType]  # SciPy is not annotated
        used.append(label)
    return cluster_bootstrap(correlations, used, num_resamples=num_resamples, seed=seed)
