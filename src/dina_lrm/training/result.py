"""What came of a training run."""

from dataclasses import dataclass

from dina_lrm.checkpoints.config import Calibration
from dina_lrm.core.calibration import better_than_chance, determined_scale
from dina_lrm.runs.progress import StepMetrics
from dina_lrm.training.validation import Levels, ValidationMargins

__all__ = ["TrainResult", "calibrated"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended. The model itself was trained in place."""

    steps: int
    seconds: float
    stopped_by: str
    """"steps", "time_budget" or "patience"."""
    best_step: int | None
    best_accuracy: float | None
    """Best candidate on the validation pairs used while training."""
    noise_levels: tuple[float, ...] | None
    """The model's new default for scoring, chosen on all validation pairs. None: it keeps its default."""
    calibration_scale: float | None
    uncalibrated: str | None
    """Why validation pairs gave no calibration; None where they did, and where there are none."""
    validation: dict[str, float]
    """Accuracy of every candidate on all validation pairs, at the end."""
    margins: ValidationMargins | None
    """What that accuracy is of."""
    history: list[StepMetrics]


def calibrated(
    margins: ValidationMargins,
) -> tuple[Levels | None, tuple[Calibration, ...], str | None]:
    """The best candidate; each candidate's scale, the best one's first; why one of the two is missing."""
    accuracies, target = margins.accuracy, margins.target
    levels = max(accuracies, key=lambda one: (accuracies[one], -len(one)))  # a tie: the cheaper
    counted = int((target != 0.5).sum())
    right = round(accuracies[levels] * counted) if counted else 0
    if not better_than_chance(right, counted):
        why = f"the best candidate has {right} of {counted} validation pairs right, which a coin may get too"
        return None, (), f"{why}: no noise level was chosen and no calibration is stored"
    fits = []
    for one in (levels, *(one for one in accuracies if one != levels)):
        scale = determined_scale(margins.by_levels[one], target)
        if scale is not None:
            fits.append(Calibration(noise_levels=one, scale=scale))
        elif one == levels:
            why = f"{counted} validation pairs, {right} of them right, do not determine a scale"
            return levels, (), f"{why} of probabilities: no calibration is stored"
    return levels, tuple(fits), None
