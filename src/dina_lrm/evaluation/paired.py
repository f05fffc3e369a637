"""Is one model better than another on the same comparisons? A paired test sees what two intervals do not.

Two models err on much the same pairs, so the difference of their accuracies is known far better than either
accuracy; intervals that overlap say nothing about it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dina_lrm.evaluation.metrics import Interval, cluster_bootstrap

__all__ = ["PairedDifference", "paired_difference"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedDifference:
    """Accuracy of the first model minus that of the second."""

    difference: Interval
    """Resamples prompts, both models' pairs together."""
    num_pairs: int
    """Counted for both."""
    only_first: int
    """Pairs worth more under the first model."""
    only_second: int
    p_value: float
    """McNemar's exact test, two-sided: would equal models split those pairs so unevenly? It takes pairs as
    independent, which those of one prompt are not; the interval does not."""


def paired_difference(
    first: ArrayLike, second: ArrayLike, clusters: ArrayLike, *, seed: int = 0
) -> PairedDifference:
    """Compare two models by what each pair is worth for them (`evaluation.rules.credits`).

    Args:
        first, second: one entry a pair, NaN where it is not counted; a pair counts if it does for both.
        clusters: the prompt of each pair.

    By hand: of five pairs the first model alone gets three right, the second alone none. The difference is
    0.6, and equal models would split three pairs 3 : 0 or 0 : 3 in a quarter of the cases.

    >>> found = paired_difference([1, 1, 1, 1, 0], [0, 0, 0, 1, 0], [0, 1, 2, 3, 4])
    >>> round(found.difference.value, 3), found.only_first, found.only_second, found.p_value
    (0.6, 3, 0, 0.25)
    """
    from scipy.stats import binomtest

    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    labels = np.asarray(clusters)
    if not a.shape == b.shape == labels.shape:
        raise ValueError(f"{a.size} and {b.size} pairs, {labels.size} clusters: must match")
    counted = ~(np.isnan(a) | np.isnan(b))
    difference = a[counted] - b[counted]
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return PairedDifference(
        difference=cluster_bootstrap(difference, labels[counted], seed=seed),
        num_pairs=int(counted.sum()),
        only_first=wins,
        only_second=losses,
        p_value=float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
    )
