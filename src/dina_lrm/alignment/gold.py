"""Is the gain real? Proxy and gold on held-out prompts, and the rule that says when they part.

The proxy is the reward that is maximised, gold an independent score of the same pictures. Both are taken on
the same prompts and seeds at every evaluation, so what counts are paired differences over prompts.

The rule. Let P and G be the mean gains of proxy and gold over the first evaluation, now and `window`
evaluations ago. The reward is over-optimised when over that window

    the proxy has gained:      the 95 % interval of its paired difference lies above 0, and
    gold has not followed:     the 95 % interval of gold's paired difference lies below half of what the same
                               gain in proxy used to bring, (G / P before) times the proxy's gain, or below 0

or when gold has lost for certain: the interval of its difference to its best evaluation lies below 0. The
first part speaks at the peak of gold, before anything is lost; the exchange rate is 0 while gold has never
gained.

A gold score that fails is missing from that evaluation and asked again at the next: it measures a run, and
must not end one. What is compared are the evaluations that have it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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
    mean = float(difference.mean())
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return mean, mean - 1.96 * error, mean + 1.96 * error


def overoptimisation(history: Sequence[Evaluation], *, window: int = 3) -> str | None:
    """What shows at the last evaluation that the proxy is over-optimised, gaining where gold does not; or
    None.

    Args:
        window: evaluations with a gold score to look back, at least 1.
    """
    known = [(evaluation, evaluation.main_gold) for evaluation in history if evaluation.main_gold is not None]
    if len(known) < 2 or history[-1].main_gold is None:
        return None
    history, scores = [one for one, _ in known], [gold for _, gold in known]
    best = max(range(len(scores)), key=lambda index: float(np.mean(scores[index])))
    lost = paired_gain(scores[-1], scores[best])
    if best < len(scores) - 1 and lost[2] < 0:
        return (
            f"gold has fallen by {-lost[0]:.3g} (95 % interval {-lost[2]:.3g} to {-lost[1]:.3g}) since its "
            f"best, at update {history[best].step}"
        )
    if len(history) <= window:
        return None
    then = len(history) - 1 - window
    proxy_gain = paired_gain(history[-1].proxy, history[then].proxy)
    gold_gain = paired_gain(scores[-1], scores[then])
    earlier_proxy = paired_gain(history[then].proxy, history[0].proxy)[0]
    earlier_gold = paired_gain(scores[then], scores[0])[0]
    rate = earlier_gold / earlier_proxy if earlier_proxy > 0 and earlier_gold > 0 else 0.0
    if proxy_gain[1] > 0 and gold_gain[2] < max(0.5 * rate * proxy_gain[0], 0.0):
        return (
            f"since update {history[then].step} the proxy has gained {proxy_gain[0]:.3g} and gold "
            f"{gold_gain[0]:+.3g} (interval {gold_gain[1]:+.3g} to {gold_gain[2]:+.3g}), where that used "
            f"to bring {rate * proxy_gain[0]:+.3g}"
        )
    return None
