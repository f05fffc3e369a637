"""Names for the tensors that travel through the package: one alias a concept, its axes in words.

The annotations document always and are checked under test, where pytest turns jaxtyping and beartype on for
the whole package. Axes that share a name inside one signature must have the same length. Numbers inside are
float32 or wider unless a function says otherwise; what comes in may be bfloat16.
"""

import math

import torch
from jaxtyping import Float, Int64, Real
from torch import Tensor

from dina_lrm.errors import InvalidInputError

__all__ = ["Features", "Latents", "NoiseLevel", "Score", "TableIndex", "Target", "Votes", "check_tensor"]

Latents = Float[Tensor, "batch channel *frame height width"]
"""Unpacked latents, already shifted and scaled; a picture has no frame axis, a video has one."""

NoiseLevel = Float[Tensor, " batch"]
"""sigma in [0, 1] per sample: 0 is clean, 1 is pure noise. Timesteps exist inside backbone adapters only."""

Score = Float[Tensor, " batch"]
"""Output of the head. It has no unit and no zero: only differences mean anything."""

Target = Float[Tensor, " batch"]
"""Share of votes for the chosen side, in [0, 1]; a plain label is 1."""

Votes = Real[Tensor, " batch"]
"""Number of raters who took one side, at least 0."""

Features = Float[Tensor, "batch token dim"]
"""Token sequence of one stream at one tap, or after aggregation."""

TableIndex = Int64[Tensor, " batch"]
"""Row of a scheduler's training table."""


def check_tensor(value: object, name: str, num_axes: int, layout: str, *, finite: bool) -> None:
    """Shape and value checks whose messages name the tensor; `finite` costs a pass over it."""
    if not isinstance(value, Tensor):
        raise InvalidInputError(f"{name} must be a tensor {layout}, not {type(value).__name__}")
    if value.ndim != num_axes:
        raise InvalidInputError(f"{name} has shape {tuple(value.shape)}: it must be {layout}")
    if not value.is_floating_point():
        raise InvalidInputError(f"{name} has dtype {value.dtype}: it must be a floating type")
    if 0 in value.shape:
        raise InvalidInputError(f"{name} has shape {tuple(value.shape)}: no axis may be empty")
    if finite and value.device.type != "meta" and not _is_finite(value):
        raise InvalidInputError(f"{name} holds {int((~torch.isfinite(value)).sum())} NaN or infinite values")


def _is_finite(value: Tensor) -> bool:
    """One pass where all is well: a sum of finite numbers is looked at again only if it overflows."""
    return math.isfinite(value.detach().sum(dtype=torch.float32)) or bool(torch.isfinite(value).all())
