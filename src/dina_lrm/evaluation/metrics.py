"""Pairwise accuracy, its interval, calibration: numbers in, numbers out.

Repositories of this field count ties in a dozen ways, and published accuracies differ by points because of
it. Here both kinds of tie are explicit: pairs on which the raters tied are never in the denominator, and
a tie between two scores counts as the policy `ties` says and is reported beside the result.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import log_ndtr, ndtr

from dina_lrm.core.calibration import fit_scale

__all__ = [
    "Accuracy",
    "Interval",
    "Reliability",
    "Ties",
    "agreement",
    "cluster_bootstrap",
    "expected_correctness",
    "pair_correctness",
    "pairwise_accuracy",
    "reliability",
]

MANY_CLUSTERS = 20_000
"""Above it the bootstrap counts clusters that are alike together, if most are."""

Ties = Literal["wrong", "half", "skip"]
"""A tie between two scores is wrong (strict, as most papers count), half right, or not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate and the interval that holds the truth with the stated confidence."""

    value: float
    low: float
    high: float
    confidence: float = 0.95

    def __str__(self) -> str:
        bounds = f"[{self.low:.3f}, {self.high:.3f}]" if self.known else "- (one prompt)"
        return f"{self.value:.3f} {bounds}"

    @property
    def known(self) -> bool:
        """Whether there are bounds: one prompt says nothing about others."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    def percents(self) -> tuple[str, str]:
        """The estimate and its bounds in percent, as tables show them.

        >>> Interval(value=0.5, low=0.25, high=0.75).percents()
        ('50.0', '25.0 to 75.0')
        >>> cluster_bootstrap([1.0, 0.0], ["one prompt"] * 2).percents()
        ('50.0', '- (one prompt)')
        """
        if math.isnan(self.value):
            return "-", "-"
        bounds = f"{100 * self.low:.1f} to {100 * self.high:.1f}"
        return f"{100 * self.value:.1f}", bounds if self.known else "- (one prompt)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Pairwise accuracy with everything that was, and was not, in its denominator."""

    value: float
    num_pairs: int
    """Pairs in the denominator."""
    num_rater_ties: int
    """Pairs left out since the raters were split evenly."""
    num_score_ties: int
    """Pairs, rater ties aside, on which both sides have the same score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability:
    """Do stated probabilities come true?"""

    scale: float
    """P = Phi(margin / scale); fitted to all pairs, or as given."""
    expected_calibration_error: float
    """Mean over pairs of |stated - observed| in the pair's bin."""
    log_loss: float
    """Nats per pair; log 2 = 0.693 is a coin."""
    brier: float
    """Mean squared distance of stated probability and share of votes."""
    bin_probability: tuple[float, ...]
    """Mean stated probability of the favoured side, by bin."""
    bin_accuracy: tuple[float, ...]
    """Observed share of votes for the favoured side, by bin."""
    bin_count: tuple[int, ...]
    """Pairs by bin."""


# --- accuracy ----------------------------------------------------------------------------------------------


def pair_correctness(
    margin: ArrayLike, target: ArrayLike | None = None, *, ties: Ties = "wrong"
) -> NDArray[np.float64]:
    """1 where the higher score is on the side most raters preferred, 0 where not, NaN where not counted.

    >>> pair_correctness([2.0, -1.0, 0.0, 3.0], [1.0, 1.0, 1.0, 0.5], ties="half")
    array([1. , 0. , 0.5, nan])
    """
    margins = np.asarray(margin, dtype=np.float64)
    if np.isnan(margins).any():
        raise ValueError(f"{int(np.isnan(margins).sum())} margins are NaN")
    votes = np.ones_like(margins) if target is None else np.asarray(target, dtype=np.float64)
    if votes.shape != margins.shape:
        raise ValueError(f"{votes.size} targets for {margins.size} margins")
    tie_value = {"wrong": 0.0, "half": 0.5, "skip": np.nan}[ties]
    correct = np.where(margins == 0, tie_value, (margins > 0) == (votes > 0.5))
    return np.where(votes == 0.5, np.nan, correct)


def pairwise_accuracy(
    margin: ArrayLike, target: ArrayLike | None = None, *, ties: Ties = "wrong"
) -> Accuracy:
    """Share of pairs whose preferred side has the higher score.

    Args:
        margin: score_chosen - score_rejected, one per pair.
        target: share of votes for `chosen`; None is 1 everywhere. Above 0.5 `chosen` is the right answer,
            below it `rejected`, and at 0.5 there is none, so the pair is left out.
        ties: what a margin of exactly 0 counts as.

    By hand: five pairs. Margins 2 and 1 are right, -1 is wrong, 0 is a score tie, and the raters tied on the
    last. Strict: 2 of 4 = 0.5. With ties "half": 2.5 of 4 = 0.625. With "skip": 2 of 3.

    >>> pairwise_accuracy([2.0, 1.0, -1.0, 0.0, 5.0], [1.0, 0.8, 1.0, 1.0, 0.5]).value
    0.5
    >>> pairwise_accuracy([2.0, 1.0, -1.0, 0.0, 5.0], [1.0, 0.8, 1.0, 1.0, 0.5], ties="half").value
    0.625

    All ties: 0 when strict, one half, and undefined (NaN) when ties are skipped.

    >>> [pairwise_accuracy([0.0, 0.0], ties=ties).value for ties in ("wrong", "half", "skip")]
    [0.0, 0.5, nan]
    """
    correct = pair_correctness(margin, target, ties=ties)
    counted = ~np.isnan(correct)
    tied_scores = np.asarray(margin, dtype=np.float64) == 0
    rater_ties = np.zeros_like(counted) if target is None else np.asarray(target, dtype=np.float64) == 0.5
    return Accuracy(
        value=float(correct[counted].mean()) if counted.any() else float("nan"),
        num_pairs=int(counted.sum()),
        num_rater_ties=int(rater_ties.sum()),
        num_score_ties=int((tied_scores & ~rater_ties).sum()),
    )


def expected_correctness(margin: ArrayLike, bayes: ArrayLike) -> NDArray[np.float64]:
    """Probability that a fresh rater agrees with the higher score, given the raters' true distribution.

    Free of the luck of the labels: its mean for a perfect reward is the Bayes-optimal accuracy exactly.

    >>> expected_correctness([1.0, -1.0, 0.0], [0.9, 0.9, 0.9])
    array([0.9, 0.1, 0.5])
    """
    margins, p = np.asarray(margin, dtype=np.float64), np.asarray(bayes, dtype=np.float64)
    return np.where(margins > 0, p, np.where(margins < 0, 1 - p, 0.5))


# --- intervals ---------------------------------------------------------------------------------------------


def cluster_bootstrap(
    values: ArrayLike,
    clusters: ArrayLike,
    *,
    reference: ArrayLike | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a mean, or of a ratio of two means, that resamples whole clusters.

    Pairs of one prompt share pictures and raters, so they are not independent; resampling pairs would give
    intervals that are too short. Each resample draws as many prompts as there are, with replacement, and
    takes all their pairs. Since a mean over pairs is a ratio of sums, it is enough to resample the prompts'
    sums, which keeps it a few milliseconds for thousands of pairs; of many prompts whose sums are mostly
    alike, how often each sum occurs, which keeps it below a second for hundreds of thousands.

    Args:
        values: one per pair; NaN is not counted.
        clusters: the prompt of each pair, any labels.
        reference: None for the mean of `values`; otherwise the result is mean(values) / mean(reference) over
            the pairs where both are counted: a share of what is possible.
        confidence: of the interval.
        num_resamples, seed: of the bootstrap; the same seed gives the same interval.

    By hand: two prompts, one all right and one all wrong: 0.5, and resamples are (0, 0.5, 0.5, 1) with equal
    odds, so the interval is [0, 1] although there are 20 pairs.

    >>> print(cluster_bootstrap([1.0] * 10 + [0.0] * 10, [0] * 10 + [1] * 10))
    0.500 [0.000, 1.000]
    """
    numerator = np.asarray(values, dtype=np.float64)
    denominator = np.ones_like(numerator) if reference is None else np.asarray(reference, dtype=np.float64)
    labels = np.asarray(clusters)
    if not (numerator.shape == denominator.shape == labels.shape):
        raise ValueError(
            f"{numerator.size} values, {denominator.size} references, {labels.size} clusters: must match"
        )
    counted = ~(np.isnan(numerator) | np.isnan(denominator))
    if not counted.any():
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"), confidence=confidence)
    _, index = np.unique(labels[counted], return_inverse=True)
    above = np.bincount(index, weights=numerator[counted])
    below = np.bincount(index, weights=denominator[counted])
    value = float(above.sum() / below.sum())
    if len(above) == 1:  # one prompt says nothing about other prompts
        return Interval(value=value, low=float("nan"), high=float("nan"), confidence=confidence)

    def ratio(above: NDArray[np.float64], below: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        total = below.sum(axis=axis)
        # A resample in which nothing is possible has reached all of it.
        return np.divide(above.sum(axis=axis), total, out=np.ones_like(total), where=total > 0)

    rng = np.random.default_rng(seed)
    sums, count = np.unique(above + 1j * below, return_counts=True)
    if len(above) > MANY_CLUSTERS and 10 * len(sums) < len(above):
        # How often each sum is drawn is multinomial: the same bootstrap, without a draw a cluster.
        share, step = count / len(above), max(1, 4_000_000 // len(sums))
        sizes = [min(step, num_resamples - start) for start in range(0, num_resamples, step)]
        drawn = np.concatenate([rng.multinomial(len(above), share, size) @ sums for size in sizes])
        tail = 50 * (1 - confidence)
        low, high = np.percentile(ratio(drawn.real[:, None], drawn.imag[:, None]), [tail, 100 - tail])
    else:
        result: Any = stats.bootstrap(
            (above, below),
            ratio,
            n_resamples=num_resamples,
            batch=max(1, 4_000_000 // len(above)),  # bounds memory at some tens of MB
            paired=True,
            vectorized=True,
            confidence_level=confidence,
            method="percentile",
            rng=rng,
        )
        low, high = result.confidence_interval
    return Interval(value=value, low=float(low), high=float(high), confidence=confidence)


# --- calibration -------------------------------------------------------------------------------------------


def reliability(
    margin: ArrayLike,
    target: ArrayLike | None = None,
    *,
    scale: float | None = None,
    prompts: ArrayLike | None = None,
    num_bins: int = 10,
) -> Reliability:
    """Reliability of P = Phi(margin / scale), over bins that hold equally many pairs.

    The probability is always stated for the favoured side (at least 0.5), so `bin_accuracy` against
    `bin_probability` is the usual reliability diagram and does not depend on which side is called chosen.

    Args:
        margin: score_chosen - score_rejected.
        target: share of votes for `chosen`; None is 1 everywhere.
        scale: None fits the scale to these same pairs; pass the scale fitted on validation pairs to find out
            how it holds on others.
        prompts: the prompt of each pair, any labels. Where the scale is fitted, each half of the prompts is
            then read on the scale of the other half, so that nothing is tested on what it was fitted to.
        num_bins: of equal size by rank, so that no bin is empty; fewer when there are fewer pairs.

    By hand: four pairs of margin 1, three won. The fitted scale is 1 / 0.6745, all are stated at 0.75, 0.75
    is observed, and the error is 0.

    >>> fitted = reliability([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], num_bins=1)
    >>> round(fitted.scale, 4), round(fitted.bin_probability[0], 3), fitted.bin_accuracy[0]
    (1.4826, 0.75, 0.75)

    All ties: every pair is stated at 0.5, and a coin is right half of the time.

    >>> reliability([0.0, 0.0], num_bins=1, scale=1.0).bin_probability
    (0.5,)
    """
    margins = np.asarray(margin, dtype=np.float64)
    votes = np.ones_like(margins) if target is None else np.asarray(target, dtype=np.float64)
    scales = np.full_like(margins, np.nan if scale is None else scale)
    if scale is None:
        scale = _fitted(margins, votes)
        scales[:] = scale
        if prompts is not None:
            _, prompt = np.unique(np.asarray(prompts), return_inverse=True)
            if prompt.max(initial=0) > 0:
                for half in (0, 1):
                    other = prompt % 2 != half
                    scales[~other] = _fitted(margins[other], votes[other])
    z = margins / scales
    probability = ndtr(np.abs(z))
    favoured = np.where(z > 0, votes, np.where(z < 0, 1 - votes, 0.5))
    order = np.argsort(probability, kind="stable")
    bins = [rows for rows in np.array_split(order, min(num_bins, len(order))) if len(rows)]
    stated = [float(probability[rows].mean()) for rows in bins]
    observed = [float(favoured[rows].mean()) for rows in bins]
    counts = [len(rows) for rows in bins]
    error = sum(n * abs(p - q) for n, p, q in zip(counts, stated, observed, strict=True)) / len(margins)
    return Reliability(
        scale=float(scale),
        expected_calibration_error=float(error),
        log_loss=float(-(votes * log_ndtr(z) + (1 - votes) * log_ndtr(-z)).mean()),
        brier=float(((ndtr(z) - votes) ** 2).mean()),
        bin_probability=tuple(stated),
        bin_accuracy=tuple(observed),
        bin_count=tuple(counts),
    )


def _fitted(margins: NDArray[np.float64], votes: NDArray[np.float64]) -> float:
    return float(fit_scale(torch.from_numpy(margins.copy()), torch.from_numpy(votes.copy())))


# --- stability ---------------------------------------------------------------------------------------------


def agreement(margins: ArrayLike) -> float:
    """Probability that two noise draws prefer the same side of a pair, averaged over pairs.

    Args:
        margins: (draw, pair), at least two draws.

    By hand: of three draws two prefer one side, so of the three ways to take two draws one agrees: 1/3.

    >>> round(agreement([[1.0], [1.0], [-1.0]]), 4)
    0.3333
    """
    signs = np.sign(np.asarray(margins, dtype=np.float64))
    num_draws = len(signs)
    if num_draws < 2:
        raise ValueError(f"agreement needs at least 2 noise draws, got {num_draws}")
    counts = np.stack([(signs == sign).sum(axis=0) for sign in (-1, 0, 1)])
    return float((counts * (counts - 1)).sum(axis=0).mean() / (num_draws * (num_draws - 1)))
