"""How a reward judges candidates that are still being sampled, and where it moves a state."""

import torch
from torch import Tensor

from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.likelihood import win_probability
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.reward_model import RewardModel

__all__ = ["SCORED_LEVEL", "check_steps", "gradient_step", "score_predicted", "to_drop"]

SCORED_LEVEL = 0.4
"""Noise level at which predicted clean latents are scored."""


def to_drop(model: RewardModel, scores: Tensor, sigma: float, confidence: float) -> Tensor:
    """Which candidates (bool) to drop: the leader is preferred with at least `confidence` at noise level
    `sigma`, by the reward's own likelihood; never more than half of them, the worst first.

    A confidence of 0.5 drops just the worse half.
    """
    likelihood = model.config.likelihood
    lead = (scores.max() - scores).double()
    probability = win_probability(
        lead,
        torch.full_like(lead, sigma),
        likelihood=likelihood.kind,
        slope=likelihood.slope,
        floor=likelihood.floor,
    )
    drop = torch.zeros_like(scores, dtype=torch.bool)
    worst_first = scores.argsort(stable=True)[: len(scores) // 2]
    drop[worst_first] = probability[worst_first] >= confidence
    return drop


def check_steps(num_steps: int, first: int | None, every: int | None) -> range:
    """Steps after which candidates are compared: from a fifth of them on, every tenth, unless given."""
    start = max(1, num_steps // 5) if first is None else first
    stride = max(1, num_steps // 10) if every is None else every
    if not 1 <= start <= num_steps or stride < 1:
        raise InvalidInputError(
            f"first_check = {start}, every = {stride}: must be in [1, {num_steps}], at least 1"
        )
    return range(start, num_steps, stride)


def score_predicted(
    model: RewardModel,
    before: Tensor,
    after: Tensor,
    conditioning: Conditioning,
    sigmas: tuple[float, float],
    seed: int,
    batch_size: int,
) -> Tensor:
    """Scores (batch,) of the clean latents that a step from `before` to `after` was led by.

    Args:
        sigmas: noise levels of the two states.
        seed: of the noise that all are scored under.
    """
    parts: list[Tensor] = []
    for start, end in zip(before.split(batch_size), after.split(batch_size), strict=True):
        levels = [torch.full((len(start),), sigma, device=start.device) for sigma in sigmas]
        clean = model.schedule.clean_between(start, end, *levels)
        parts.append(model.score_latents(clean, conditioning, SCORED_LEVEL, seed=seed).float())
    return torch.cat(parts)


def gradient_step(
    model: RewardModel,
    state: Tensor,
    conditioning: Conditioning,
    timestep: Tensor,
    sigma: float,
    strength: float,
) -> Tensor:
    """The state moved along the reward's gradient, by `strength` times sigma (root mean square)."""
    with torch.enable_grad():
        moved = state.detach().float().requires_grad_(True)
        scores = model.score_state(moved, conditioning, timestep)
        (gradient,) = torch.autograd.grad(scores.sum(), moved)
    size = gradient.flatten(1).square().mean(dim=1).sqrt().clamp_min(1e-12)
    step = strength * sigma / size.reshape(-1, *[1] * (state.ndim - 1))
    return (state + step * gradient).to(state.dtype)
