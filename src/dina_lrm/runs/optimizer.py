"""AdamW on the right parameters, the learning rate as a function of the position, the average of the weights.

The rate is computed from the step and never stored, so a resumed run cannot be off by one. Warm-up multiplies
any schedule (the reference honours it with the cosine only).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from dina_lrm.errors import InvalidInputError
from dina_lrm.runs.config import OptimizerConfig, Schedule

__all__ = ["adamw", "averaged", "learning_rate_factor", "set_learning_rate", "weight_average"]


def adamw(model: nn.Module, settings: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters of `model` that require gradients.

    Weight decay acts on the matrices of linear and convolution layers, adapters included, and on nothing
    else: pulling a norm's scale, a bias, a query or an embedding towards 0 is no prior that anyone holds.

    Args:
        model: parameters whose name starts with "backbone." take `settings.backbone_learning_rate`.
    """
    matrices = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("backbone."), id(parameter) in matrices)
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise InvalidInputError("the model has no trainable parameter")
    rate, backbone_rate = settings.learning_rate, settings.backbone_learning_rate
    backbone_rate = rate if backbone_rate is None else backbone_rate
    entries = [
        {
            "params": parameters,
            "lr": backbone_rate if in_backbone else rate,
            "peak_lr": backbone_rate if in_backbone else rate,
            "weight_decay": settings.weight_decay if is_matrix else 0.0,
        }
        for (in_backbone, is_matrix), parameters in groups.items()
    ]
    return torch.optim.AdamW(entries, lr=rate, betas=settings.betas, eps=settings.eps, fused=True)


def learning_rate_factor(
    step: int,
    *,
    num_steps: int,
    schedule: Schedule = "constant",
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
    elapsed_fraction: float = 0.0,
) -> float:
    """Learning rate of `step` (from 0) as a fraction of its peak: warm-up times decay.

        warm-up = min(1, (step + 1) / warmup_steps)
        q       = max( (step - warmup_steps) / (num_steps - warmup_steps), elapsed_fraction ), within [0, 1]
        decay   = 1,  or  1 - (1 - f) q,  or  f + (1 - f) (1 + cos(pi q)) / 2,     f = final_fraction

    Args:
        elapsed_fraction: of a time budget. A run that will be stopped by the clock then still ends its decay.

    By hand: 10 steps with 2 of warm-up: halfway up at step 0; at step 6, q = 4/8 and the cosine is halfway.

    >>> [learning_rate_factor(s, num_steps=10, schedule="cosine", warmup_steps=2) for s in (0, 1, 2)]
    [0.5, 1.0, 1.0]
    >>> round(learning_rate_factor(6, num_steps=10, schedule="cosine", warmup_steps=2), 6)
    0.5
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    done = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    q = min(max(done, elapsed_fraction, 0.0), 1.0)
    match schedule:
        case "constant":
            decay = 1.0
        case "linear":
            decay = 1 - (1 - final_fraction) * q
        case "cosine":
            decay = final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * q)) / 2
    return warmup * decay


def set_learning_rate(optimizer: Any, factor: float) -> float:
    """Set every group's rate to `factor` of its peak; returns the rate of the last group."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
    return float(optimizer.param_groups[-1]["lr"])


@contextmanager
def averaged(average: EMAModel | None, parameters: Sequence[Tensor]) -> Iterator[None]:
    """The averaged weights inside, the raw ones again after, to the last bit; without an average, no
    change."""
    if average is None:
        yield
        return
    average.store(parameters)  # type: ignore[arg-type]
    average.copy_to(parameters)  # type: ignore[arg-type]
    try:
        yield
    finally:
        average.restore(parameters)  # type: ignore[arg-type]


def weight_average(parameters: Sequence[Tensor], decay: float) -> EMAModel:
    """Moving average, from diffusers; after n steps its decay is min(decay, (1 + n) / (10 + n))."""
    return EMAModel(parameters, decay=decay, foreach=True)  # type: ignore[arg-type]
