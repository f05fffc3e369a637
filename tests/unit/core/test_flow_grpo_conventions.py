"""Our steps and losses against the formulas of Flow-GRPO's and GRPO-Guard's public code, written out here by
hand from its description, on random tensors; both conventions where the code departs from the papers."""

import math

import pytest
import torch
from torch import Tensor

from dina_lrm.core.preference import clipped_policy_loss, group_advantages, normalised_log_ratio
from dina_lrm.core.transitions import (
    Transition,
    gaussian_divergence,
    gaussian_log_prob,
    transition,
    unscaled_log_prob,
)

LEVEL = 0.7
SIGMA, AFTER = 0.6, 0.45


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def state() -> tuple[Tensor, Tensor, Tensor]:
    """A noisy state, the network's velocity (noise minus clean latent), a fresh sample of noise."""
    return randn(3, 4, 8, 8, seed=1), randn(3, 4, 8, 8, seed=2), randn(3, 4, 8, 8, seed=3)


def step_of(z: Tensor, velocity: Tensor, rule: str) -> Transition:
    sigma = torch.full((3,), SIGMA, dtype=torch.float64)
    after = torch.full((3,), AFTER, dtype=torch.float64)
    return transition(z, velocity, sigma, after, rule=rule, noise_level=LEVEL)  # type: ignore[arg-type]


def test_sde_step_and_log_probability(state: tuple[Tensor, Tensor, Tensor]) -> None:
    """std = level sqrt(s / (1 - s)), dt = s' - s; mean = z (1 + std^2 dt / (2 s)) + v (1 + std^2 (1 - s) / (2
    s)) dt; noise std sqrt(-dt); log N averaged over elements."""
    z, v, noise = state
    std, dt = LEVEL * math.sqrt(SIGMA / (1 - SIGMA)), AFTER - SIGMA
    mean = z * (1 + std**2 / (2 * SIGMA) * dt) + v * (1 + std**2 * (1 - SIGMA) / (2 * SIGMA)) * dt
    spread = std * math.sqrt(-dt)
    ours = step_of(z, v, "sde")
    torch.testing.assert_close(ours.mean, mean)
    torch.testing.assert_close(ours.std, torch.full((3,), spread, dtype=torch.float64))
    after = mean + spread * noise
    density = -((after - mean) ** 2) / (2 * spread**2) - math.log(spread) - math.log(math.sqrt(2 * math.pi))
    torch.testing.assert_close(gaussian_log_prob(after, ours), density.mean(dim=(1, 2, 3)))


def test_cps_step_and_log_probability_in_both_units(state: tuple[Tensor, Tensor, Tensor]) -> None:
    """std = s' sin(level pi / 2); mean = (z - s v) (1 - s') + (z + (1 - s) v) sqrt(s'^2 - std^2). The code's
    log-probability is -(z' - mean)^2: ours in its units, and 1 / (2 std^2) of it, but for constants, in
    ratios."""
    z, v, noise = state
    std = AFTER * math.sin(LEVEL * math.pi / 2)
    clean, eps = z - SIGMA * v, z + (1 - SIGMA) * v
    mean = clean * (1 - AFTER) + eps * math.sqrt(AFTER**2 - std**2)
    ours = step_of(z, v, "cps")
    torch.testing.assert_close(ours.mean, mean)
    after = mean + std * noise
    theirs = -((after - mean) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(unscaled_log_prob(after, ours.mean), theirs)
    old = mean + 0.01 * randn(3, 4, 8, 8, seed=4)
    unscaled = theirs - unscaled_log_prob(after, old)
    scaled = gaussian_log_prob(after, ours) - gaussian_log_prob(after, Transition(old, ours.std))
    torch.testing.assert_close(scaled, unscaled / (2 * std**2))


def test_advantages_in_three_conventions() -> None:
    """Prompts of unlike difficulty: their means are part of the code's global std, so its advantages are
    smaller."""
    rewards = randn(5, 8, seed=5) + 3 * randn(5, 1, seed=6)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    group = centred / (rewards.std(dim=1, keepdim=True, correction=0) + 1e-4)
    batch = centred / (centred.std(correction=0) + 1e-4)
    public = centred / (rewards.std(correction=0) + 1e-4)
    for over, expected in (("group", group), ("batch", batch), ("uncentred", public)):
        torch.testing.assert_close(group_advantages(rewards, over=over), expected)  # type: ignore[arg-type]
        limited = group_advantages(rewards, over=over, limit=0.5)  # type: ignore[arg-type]
        torch.testing.assert_close(limited, expected.clamp(-0.5, 0.5))
    assert batch.abs().mean() > 2 * public.abs().mean()


def test_clipped_loss_and_divergence(state: tuple[Tensor, Tensor, Tensor]) -> None:
    """max(-A w, -A clip(w, 1 - c, 1 + c)); the divergence is |m - m_ref|^2 / (2 std^2), averaged over
    elements."""
    log_ratio, advantages, clip = 0.02 * randn(6, seed=7), randn(6, seed=8), 0.01
    ratio = log_ratio.exp()
    expected = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    torch.testing.assert_close(clipped_policy_loss(log_ratio, advantages, clip_range=clip).loss, expected)
    z, v, _ = state
    ours, theirs = step_of(z, v, "sde"), step_of(z, v + 0.1, "sde")
    squares = ((ours.mean - theirs.mean) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian_divergence(ours, theirs), squares / (2 * ours.std**2))


def test_guards_ratio(state: tuple[Tensor, Tensor, Tensor]) -> None:
    """What is left of the log-ratio is the drawn noise times the change of the mean."""
    z, v, noise = state
    ours, old = step_of(z, v, "sde"), step_of(z, v + 0.05, "sde")
    spread = old.std.reshape(-1, 1, 1, 1)
    after = old.mean + spread * noise
    log_ratio = gaussian_log_prob(after, ours) - gaussian_log_prob(after, old)
    product = (noise * (ours.mean - old.mean)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(normalised_log_ratio(log_ratio, ours.mean, old.mean, ours.std), product)
