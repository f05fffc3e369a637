"""What the demo measured, and figures of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from dina_lrm.evaluation.benchmarks import EvaluationResult
from dina_lrm.evaluation.metrics import Interval
from dina_lrm.evaluation.noise_sweep import SettingResult

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class JudgedPicture:
    """A generated picture with the learned reward's opinion and the gold judge's."""

    image: "Image"
    made_with: str
    """Sampler settings, such as "8 steps"."""
    score: float
    utility: float
    """The gold judge's, in [0, 1]: does it show the caption, and is it clean?"""
    full_match: bool
    """Everything that the caption asks for is there."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Pictures of one caption, the reward's favourite first."""

    caption: str
    pictures: Sequence[JudgedPicture]


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    steps: Sequence[int]
    accuracy: Sequence[float]
    """Accuracy on each step's batch."""
    validation_steps: Sequence[int]
    validation_accuracy: Mapping[str, Sequence[float]]
    """By noise level, at those steps."""


@dataclass(frozen=True, kw_only=True)
class MeasuredReward:
    """A reward and what was measured of it."""

    label: str
    """An adjective, such as "shipped"."""
    result: EvaluationResult
    trainable_parameters: int
    num_train_pairs: int | None = None
    train_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class DemoResults:
    samples: Sequence[tuple[str, "Image"]]
    """Captions, and what the generator made of them with its default sampler."""
    rankings: Sequence[Ranking]
    curve: LearningCurve
    fresh: MeasuredReward
    shipped: MeasuredReward
    stages: Sequence[tuple[str, float, str]]
    """What was done, seconds, and how much of it."""
    milliseconds_per_score: float
    peak_memory_bytes: int
    environment: str


def token_ensemble(result: EvaluationResult) -> SettingResult | None:
    """The first ensemble that joins tokens."""
    several = (item for item in result.ensembles if item.setting.combine == "tokens")
    return next(several, None)


def shown_settings(result: EvaluationResult) -> list[SettingResult]:
    """The default, the other single levels, and the ensembles, once each."""
    wanted = [result.default, *result.sweep, *result.ensembles]
    return list({item.setting.label: item for item in wanted}.values())


def setting_name(item: SettingResult) -> str:
    if len(item.setting.noise_levels) == 1:
        return f"σ = {item.setting.label}"
    return f"ensemble {item.setting.label}" if item.setting.combine == "tokens" else item.setting.label


def best_of_group(rankings: Iterable[Ranking]) -> tuple[float, float, float]:
    """Judged utility: of all pictures on average, of the reward's favourites, and of the judge's own."""
    utilities = [[picture.utility for picture in ranking.pictures] for ranking in rankings]
    return (
        float(np.mean([np.mean(group) for group in utilities])),
        float(np.mean([group[0] for group in utilities])),
        float(np.mean([max(group) for group in utilities])),
    )


def rank_correlation(rankings: Iterable[Ranking]) -> float:
    """Kendall's tau of reward and judge within a caption, averaged over captions where the judge differs."""
    taus: list[float] = []
    for ranking in rankings:
        scores, utilities = [p.score for p in ranking.pictures], [p.utility for p in ranking.pictures]
        if len(set(utilities)) > 1 and len(set(scores)) > 1:
            taus.append(kendall_tau(scores, utilities))
    return float(np.mean(taus)) if taus else 0.0


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    result: Any = stats.kendalltau(first, second)  # SciPy's stub calls it a plain tuple
    return float(result.statistic)


def worst_disagreement(rankings: Iterable[Ranking]) -> tuple[str, JudgedPicture, JudgedPicture] | None:
    """Caption, what the reward prefers, what the judge prefers: where both are surest of opposite things."""
    worst, largest = None, 0.0
    for ranking in rankings:
        spread = float(np.std([picture.score for picture in ranking.pictures])) or 1.0
        for preferred in ranking.pictures:
            for other in ranking.pictures:
                margin, gap = (preferred.score - other.score) / spread, other.utility - preferred.utility
                if margin > 0 and gap > 0 and margin * gap > largest:
                    worst, largest = (ranking.caption, preferred, other), margin * gap
    return worst


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def percent_range(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}%"


def millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 100_000 else f"{count:,}"
