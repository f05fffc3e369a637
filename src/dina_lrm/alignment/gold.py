"""Is the gain real? Proxy and gold on held-out prompts, and what says that the proxy is over-optimised.

The proxy is the reward that is maximised, gold an independent score of the same pictures. Both are taken on
the same prompts and seeds at every evaluation, so what counts are paired differences over prompts.

The rule is asked after every evaluation, so its tests share one error: over all evaluations of a run as it is
planned, the chance of a false alarm is at most `ERROR` = 5 % (Bonferroni). At each of `planned` evaluations

    gold has fallen:       its mean is below that of an earlier evaluation. One t-test for each earlier one,
                           all of them together at ERROR / 2 / planned.
    gold has not followed: with P and G the mean gains of proxy and gold over the last `window` evaluations, p
                           and g those before, P and p above 0, G / P < (g / p) / 2. One test, at
                           ERROR / 2 / planned, of T = G p - g P / 2 < 0, whose standard error follows from
                           the gains of each prompt (delta method).

The first alarm is false where gold has never fallen, the second where gold still brings half of what the same
gain in proxy used to bring; both speak of the means over all prompts that the held-out ones stand for. A run
that is prolonged beyond its plan spends the error again.

A gold score that fails is missing from that evaluation and asked again at the next: it measures a run, and
must not end one. What is compared are the evaluations that have it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import t as student_t

from dina_lrm.errors import ScoringError

__all__ = [
    "Evaluation",
    "Gold",
    "ask_all",
    "best_evaluation",
    "curves",
    "missing_since",
    "overoptimisation",
    "paired_gain",
]

Gold = Callable[[Sequence[str], Sequence[Image.Image]], Sequence[float]]
"""An independent score of pictures for prompts, pair by pair; higher is better."""

Scores = Sequence[float] | NDArray[np.float64]
"""One a prompt."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found on the held-out prompts after `step` updates."""

    step: int
    seconds: float
    """Seconds of training so far."""
    proxy: tuple[float, ...]
    """One score per prompt."""
    gold: dict[str, tuple[float, ...] | None] = field(default_factory=dict)
    """By name; the first is the gold score. All finite; None where it is missing."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a gold score is missing, by name."""
    distance: float = 0.0
    """Relative distance of the adapter from the reference (`Policy.distance`)."""
    diversity: float = 0.0
    """Root mean square difference between latents of one prompt, mean over prompts; near 1.4 for unrelated
    latents of unit variance."""
    overoptimised: str | None = None
    """What shows that the proxy is over-optimised, where anything does."""

    @property
    def main_gold(self) -> tuple[float, ...] | None:
        """The gold score, where there is one."""
        return next(iter(self.gold.values()), None)

    @property
    def mean_gold(self) -> float | None:
        """Over prompts."""
        return None if self.main_gold is None else sum(self.main_gold) / len(self.main_gold)


def ask_all(
    golds: Mapping[str, Gold], prompts: Sequence[str], pictures: Sequence[Image.Image]
) -> tuple[dict[str, tuple[float, ...] | None], dict[str, str]]:
    """All gold scores, as `Evaluation.gold` and `Evaluation.missing`: one that raises, gives a number that is
    not finite or another number of scores is missing."""
    scores: dict[str, tuple[float, ...] | None] = {}
    missing: dict[str, str] = {}
    for name, gold in golds.items():
        try:
            scores[name] = _ask(gold, prompts, pictures)
        except Exception as error:  # whatever a scorer or a server comes up with
            scores[name], missing[name] = None, f"{type(error).__name__}: {error}"
    return scores, missing


def _ask(gold: Gold, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> tuple[float, ...]:
    scores = tuple(float(value) for value in gold(prompts, pictures))
    if len(scores) != len(prompts):
        raise ScoringError(f"{len(scores)} scores for {len(prompts)} pictures")
    bad = [index for index, value in enumerate(scores) if not math.isfinite(value)]
    if bad:
        raise ScoringError(
            f"the scores of {len(bad)} of {len(prompts)} pictures are not finite, first {scores[bad[0]]} for "
            f"prompt {prompts[bad[0]]!r}"
        )
    return scores


def best_evaluation(history: Sequence[Evaluation]) -> Evaluation | None:
    """The first of the highest mean gold score; None while there is no gold score."""
    known = [(mean, evaluation) for evaluation in history if (mean := evaluation.mean_gold) is not None]
    return max(known, key=lambda pair: pair[0])[1] if known else None


def curves(history: Sequence[Evaluation]) -> dict[str, list[tuple[int, tuple[float, ...]]]]:
    """Update and scores of every evaluation that has them, by name: "proxy", then the gold scores."""
    found: dict[str, list[tuple[int, tuple[float, ...]]]] = {}
    for one in history:
        for name, scores in {"proxy": one.proxy, **one.gold}.items():
            if scores is not None:
                found.setdefault(name, []).append((one.step, scores))
    return found


def missing_since(history: Sequence[Evaluation]) -> dict[str, tuple[int, str]]:
    """Gold scores that are missing now: since which update without a break, and why, at the last attempt."""
    found: dict[str, tuple[int, str]] = {}
    for name, reason in history[-1].missing.items():
        since = history[-1].step
        for one in reversed(history):
            if name not in one.missing:
                break
            since = one.step
        found[name] = since, reason
    return found


def paired_gain(now: Scores, before: Scores) -> tuple[float, float, float]:
    """Mean of the paired differences and its 95 % interval (normal), as (mean, low, high).

    By hand: differences 1 and 3 have mean 2 and standard error 1.

    >>> [round(value, 2) for value in paired_gain([2.0, 4.0], [1.0, 1.0])]
    [2.0, 0.04, 3.96]
    """
    difference: NDArray[np.float64] = np.asarray(now, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    mean, error = _mean_and_error(difference) if len(difference) > 1 else (float(difference.mean()), 0.0)
    return mean, mean - 1.96 * error, mean + 1.96 * error


def overoptimisation(
    history: Sequence[Evaluation], *, window: int = 3, planned: int | None = None
) -> str | None:
    """What shows at the last evaluation that the proxy is over-optimised, or None.

    Args:
        window: evaluations with a gold score to look back, at least 1.
        planned: evaluations of the whole run, which share the error; None: those of `history`.
    """
    if not history or history[-1].main_gold is None:
        return None
    known = [evaluation for evaluation in history if evaluation.main_gold is not None]
    gold = [np.asarray(evaluation.main_gold, dtype=np.float64) for evaluation in known]
    error = ERROR / 2 / max(planned or 0, len(known))
    fall = _largest_fall(gold, error / max(len(known) - 1, 1))
    if fall is not None:
        before, mean, low, high = fall
        return (
            f"gold has fallen by {-mean:.3g} (between {-high:.3g} and {-low:.3g}) since update "
            f"{known[before].step}"
        )
    then = len(known) - 1 - window
    if then < 1:
        return None
    proxy = [np.asarray(evaluation.proxy, dtype=np.float64) for evaluation in known]
    late = proxy[-1] - proxy[then], gold[-1] - gold[then]
    early = proxy[then] - proxy[0], gold[then] - gold[0]
    if _follows_less(early, late, error):
        (p, g), (P, G) = map(_means, (early, late))
        return (
            f"since update {known[then].step} the proxy has gained {P:.3g} and gold {G:+.3g}, where as much "
            f"proxy used to bring {P * g / p:+.3g}"
        )
    return None


ERROR = 0.05
"""Chance of a false alarm in a whole run."""


def _largest_fall(
    gold: Sequence[NDArray[np.float64]], error: float
) -> tuple[int, float, float, float] | None:
    """The earlier evaluation from which gold has fallen most, with the fall and its interval; None where no
    one-sided test at `error` says that it has."""
    quantile = float(student_t.isf(error, len(gold[-1]) - 1))
    falls: list[tuple[float, int, float, float]] = []
    for index, before in enumerate(gold[:-1]):
        mean, deviation = _mean_and_error(gold[-1] - before)
        if mean + quantile * deviation < 0:
            falls.append((mean, index, mean - quantile * deviation, mean + quantile * deviation))
    if not falls:
        return None
    mean, index, low, high = min(falls)
    return index, mean, low, high


Gains = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Of proxy and gold, one a prompt."""


def _follows_less(early: Gains, late: Gains, error: float) -> bool:
    """Whether gold certainly brings less than half as much per proxy lately as it did early."""
    (p, g), (P, G) = map(_means, (early, late))
    count = len(early[0])
    quantile = float(student_t.isf(error, count - 1))
    for proxy in (early[0], late[0]):
        mean, deviation = _mean_and_error(proxy)
        if not mean - 1.96 * deviation > 0:  # a ratio to a gain that may be 0 means nothing
            return False
    influence = late[1] * p + G * early[0] - (early[1] * P + g * late[0]) / 2
    _, deviation = _mean_and_error(influence)
    return G * p - g * P / 2 + quantile * deviation < 0


def _means(gains: Gains) -> tuple[float, float]:
    return float(gains[0].mean()), float(gains[1].mean())


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
