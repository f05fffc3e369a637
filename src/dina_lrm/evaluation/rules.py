"""Pairwise accuracy as each benchmark's own code counts it: what ties are worth, and over what is averaged.

The same scores give accuracies that differ by points under different rules, so a figure means something only
with the name of its rule. A rule says what a pair is worth in five cases:

    raters chose a side    the model agrees: 1, disagrees: 0, scores both the same: `score_tie`
    raters tied            the model prefers a side: `rater_tie`, scores both the same: `both_tie`

and whether pairs or prompts are averaged. None means: not counted. The model "scores both the same" when its
margin is at most a threshold, which is 0 unless the rule fits one on other data.
"""

import math
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
    thresholds: tuple[float, ...] | None = None
    """The margins that it tries; None: it tries all."""


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
            source="PickScore eval_preference_predictor.py; the threshold is picked on validation_unique, "
            "among eleven values of the gap |p0 - p1| = tanh(|margin| / 2) of the two probabilities",
            fits_threshold=True,
            thresholds=(*(2 * math.atanh(gap / 10) for gap in range(10)), math.inf),
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
    "rapidata": "strict",
    "open-image-preferences": "strict",
    "editreward": "strict",
    "folder": "strict",
    "jsonl": "strict",
}
"""The published rule of each source (`data.sources`), strict where none is; for GenAI-Bench the accuracy
without ties, which most papers state. The DiNa-LRM paper's own GenAI-Bench table uses "concordance"."""


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
    used, prompt = np.unique(labels[counted], return_inverse=True)
    if rule.average == "prompts" and len(used):
        means = np.bincount(prompt, values[counted]) / np.bincount(prompt)
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

    Tried are the rule's own thresholds, or where it states none the observed |margin| and 0: between two of
    them nothing changes. Of equally good ones the smallest is taken.

    >>> best_threshold("tie-calibrated", [3.0, 2.0, 0.1, -0.2], [False, False, True, True])
    0.2
    """
    rule = RULES[rule] if isinstance(rule, str) else rule
    margins, ties = np.asarray(margin, dtype=np.float64), np.asarray(rater_tie, dtype=bool)
    order = np.argsort(np.abs(margins), kind="stable")
    decided = credits(rule, margins, ties, threshold=-1.0)[order]
    tied = credits(rule, margins, ties, threshold=np.inf)[order]
    candidates = np.unique(np.append(np.abs(margins), 0.0) if rule.thresholds is None else rule.thresholds)
    num_tied = np.searchsorted(np.abs(margins)[order], candidates, side="right")

    def total(of_decided: NDArray[np.float64], of_tied: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum at each candidate: the smallest margins are tied, the others decided."""
        before, after = (np.append(0.0, np.cumsum(part)) for part in (of_tied, of_decided))
        return before[num_tied] + after[-1] - after[num_tied]

    worth = total(np.nan_to_num(decided), np.nan_to_num(tied))
    counted = total((~np.isnan(decided)).astype(float), (~np.isnan(tied)).astype(float))
    return float(candidates[int(np.argmax(worth / counted))])


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
    margins, ties = np.asarray(margin, float), np.asarray(rater_tie, bool)
    _, prompt = np.unique(np.asarray(prompts), return_inverse=True)
    pairs, rater, score = np.bincount(prompt), np.bincount(prompt, ties), np.bincount(prompt, margins == 0)
    balance = np.bincount(prompt, np.where(ties, 0.0, np.sign(margins)))
    used = np.flatnonzero((pairs > 1) & (rater < pairs) & (score < pairs))
    taus = balance[used] / np.sqrt((pairs - rater)[used] * (pairs - score)[used])
    return cluster_bootstrap(taus, used, num_resamples=num_resamples, seed=seed)


def spearman_by_prompt(
    pictures: ArrayLike,
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
        pictures: (pair, 2), names or numbers of the chosen and the rejected picture of each comparison.
        scores: of the chosen and the rejected pictures.

    >>> pairs = [("a", "b"), ("a", "c"), ("b", "c")]  # raters: a, b, c; scores: b, a, c
    >>> spearman_by_prompt(pairs, ([2.0, 2.0, 3.0], [3.0, 1.0, 1.0]), [False] * 3, ["p"] * 3).value
    0.5
    """
    from scipy.stats import rankdata  # here, since scipy is slow to load

    ties, sides = np.asarray(rater_tie, bool), np.asarray(pictures)
    _, prompt = np.unique(np.asarray(prompts), return_inverse=True)
    names, name = np.unique(sides, return_inverse=True)
    found, picture = np.unique(prompt[:, None] * len(names) + name.reshape(sides.shape), return_inverse=True)
    picture = picture.reshape(sides.shape)  # numbers of a prompt's pictures, prompt after prompt
    step = np.where(ties, 0.0, 1.0)
    wins = np.bincount(picture[:, 0], step, len(found)) - np.bincount(picture[:, 1], step, len(found))
    score = np.empty(len(found))
    score[picture] = np.stack([np.asarray(side, float) for side in scores], axis=1)
    num_pictures, num_pairs = np.bincount(found // len(names)), np.bincount(prompt)
    first = np.cumsum(num_pictures) - num_pictures
    complete = (num_pictures >= 3) & (num_pairs == num_pictures * (num_pictures - 1) // 2)
    correlations = np.full(len(num_pairs), np.nan)
    for count in np.unique(num_pictures[complete]):
        members = np.flatnonzero(complete & (num_pictures == count))
        listed = first[members, None] + np.arange(count)
        ordered = (np.ptp(wins[listed], axis=1) > 0) & (np.ptp(score[listed], axis=1) > 0)
        members, listed = members[ordered], listed[ordered]
        raters, ours = (rankdata(values[listed], axis=1) - (count + 1) / 2 for values in (wins, score))
        spread = np.sqrt(np.square(raters).sum(axis=1) * np.square(ours).sum(axis=1))
        correlations[members] = (raters * ours).sum(axis=1) / spread
    used = np.flatnonzero(~np.isnan(correlations))
    return cluster_bootstrap(correlations[used], used, num_resamples=num_resamples, seed=seed)
