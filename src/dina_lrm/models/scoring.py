"""What callers may pass to the scoring methods, put into one form; and what they get back."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dina_lrm.checkpoints.config import Calibration, RewardModelConfig
from dina_lrm.core.likelihood import win_probability
from dina_lrm.core.tensors import Score
from dina_lrm.errors import InvalidInputError

NoiseLevels = float | int | np.number | Sequence[float | int | np.number] | np.ndarray | Tensor | None


@dataclass(frozen=True)
class ScoreOutput:
    """Scores of a batch of pictures."""

    scores: Score
    standard_errors: Score | None
    """Standard error of the mean over noise draws; None for a single draw."""
    num_draws: Tensor | None = None
    """(batch,) noise draws of each picture, where a target error decided it."""


@dataclass(frozen=True)
class RankedImage:
    """One picture of a ranking."""

    index: int
    """Its place in the list that was given."""
    image: Any
    score: float
    num_levels: int | None = None
    """Scores that it took, where the number adapts to the picture."""


def resolve_levels(levels: NoiseLevels, default: Sequence[float], batch: int) -> Float[Tensor, "level batch"]:
    """Noise levels as (level, batch): more than one row is an ensemble.

    A number holds for all samples; a sequence of numbers is an ensemble; a tensor or array (batch,) gives
    each sample its own level, one (level, batch) its own ensemble.
    """
    if levels is None:
        levels = list(default)
    if isinstance(levels, np.ndarray):
        if not np.issubdtype(levels.dtype, np.number):
            raise InvalidInputError(f"noise_levels is an array of {levels.dtype}: it must hold numbers")
        levels = torch.from_numpy(levels.astype(np.float32))
    if isinstance(levels, Tensor):
        if levels.ndim == 0:
            resolved = levels.detach().expand(1, batch)
        elif levels.ndim == 1 and levels.shape[0] == batch:
            resolved = levels.detach()[None]
        elif levels.ndim == 2 and levels.shape[1] == batch:
            resolved = levels.detach()
        else:
            raise InvalidInputError(
                f"noise_levels has shape {tuple(levels.shape)}: it must be ({batch},), one per "
                f"sample, or (level, {batch}); for an ensemble give a list of numbers"
            )
    else:
        numbers = list(levels) if isinstance(levels, Sequence) else [levels]
        if any(isinstance(number, bool) or not isinstance(number, Real) for number in numbers):
            raise InvalidInputError(
                f"noise_levels = {levels!r}: give a number, a list of numbers, an array or a tensor"
            )
        resolved = torch.tensor([float(number) for number in numbers], dtype=torch.float32)
        resolved = resolved[:, None].expand(-1, batch)
    if resolved.shape[0] == 0:
        raise InvalidInputError("noise_levels is empty: give at least one level")
    resolved = resolved.to(torch.float32)
    check_sigma(resolved, "noise_levels")
    return resolved


def check_sigma(sigma: Tensor, name: str) -> None:
    """Every level in [0, 1]."""
    if not torch.equal(sigma, sigma.clamp(0, 1)):  # NaN is equal to nothing
        outside = sigma[~((sigma >= 0) & (sigma <= 1))]
        raise InvalidInputError(
            f"{name} = {outside[0].item():.6g} is outside [0, 1] (0 is clean, 1 is pure noise)"
        )


def resolve_seeds(seed: Any, batch: int) -> list[int]:
    """One seed per sample, from -2^63 to 2^64 - 1. A single whole number is shared by all, so that a sample
    scores the same alone and in any batch.

    Args:
        seed: a whole number of Python, NumPy or torch, or a sequence of them. None draws fresh ones from
            torch's global generator.

    Raises:
        InvalidInputError: anything else, such as a bool, a text or 1.5, or another number of seeds.
    """
    if seed is None:
        return torch.randint(2**62, (batch,)).tolist()
    many = isinstance(seed, Sequence) and not isinstance(seed, str | bytes)
    if isinstance(seed, Tensor | np.ndarray):
        many, seed = seed.ndim > 0, seed.tolist()
    values = list(seed) if many else [seed] * batch
    if len(values) != batch:
        raise InvalidInputError(f"{len(values)} seeds for {batch} samples: give one int, or one per sample")
    return [whole_number(value, "seed", -(2**63), 2**64 - 1) for value in values]


def whole_number(value: Any, name: str, low: int, high: int | None = None) -> int:
    """A whole number of Python or NumPy as an int; no bool, no text, no float.

    Raises:
        InvalidInputError: it is no whole number, or outside [low, high]; the message says `name`.
    """
    bounds = f"at least {low}" if high is None else f"from {low} to {high}"
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        raise InvalidInputError(f"{name} = {value!r}: it must be a whole number {bounds}")
    return number


def perceived_variance(levels: Sequence[float], config: RewardModelConfig) -> float | None:
    """v of P(a preferred to b) = Phi((score_a - score_b) / sqrt(2 v)), scores being read at these levels.

    From the calibration stored for these levels if there is one. At others the training likelihood's v, times
    what calibration has found beside it at the nearest level, or for an ensemble at the ensemble with the
    nearest smallest level: margins of a trained reward are larger by much the same factor at all of them
    (docs/method.md). None for a logistic likelihood without a calibration here, which has no such v.
    """
    exact = config.calibration_at(levels)
    if exact is not None:
        return exact.scale**2 / 2  # Phi(m / sqrt(2 v)) with 2 v = scale^2
    variance = training_variance(levels, config)
    if variance is None or not config.calibrations:
        return variance

    def distance(fitted: Calibration) -> tuple[bool, float]:
        other_kind = (len(fitted.noise_levels) > 1) != (len(levels) > 1)
        return other_kind, abs(min(fitted.noise_levels) - min(levels))

    nearest = min(config.calibrations, key=distance)
    trained = training_variance(nearest.noise_levels, config)
    return None if trained is None else variance * nearest.scale**2 / (2 * trained)


def training_variance(levels: Sequence[float], config: RewardModelConfig) -> float | None:
    """v of the likelihood that a reward was trained with: 2 v is the variance of what decides besides the
    margin. An ensemble knows all that its cleanest level tells, so its v is that level's."""
    match config.likelihood.kind:
        case "thurstone":
            return config.likelihood.slope * min(levels) ** 2 + config.likelihood.floor
        case "thurstone_constant":
            return 0.5
    return None


def preference_probability(margin: float, levels: Sequence[float], config: RewardModelConfig) -> float:
    """P(a preferred to b) for score_a - score_b = margin, scores being read at these noise levels.

    Phi(margin / sqrt(2 v)) with v = `perceived_variance`, or the logistic of the margin where there is none.
    """
    variance, lead = perceived_variance(levels, config), torch.tensor([margin], dtype=torch.float64)
    if variance is None:
        return win_probability(lead, torch.zeros(1), likelihood="bradley_terry").item()
    return win_probability(lead, torch.zeros(1), slope=0.0, floor=variance).item()
