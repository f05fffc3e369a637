"""Transitions of samplers: by hand, against torch.distributions, and as laws on a Gaussian toy."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dina_lrm.core.flow import euler_step
from dina_lrm.core.noise import NoiseSchedule
from dina_lrm.core.transitions import (
    Rule,
    Transition,
    gaussian_divergence,
    gaussian_log_prob,
    transition,
)

MEAN, STD = 0.7, 0.4
"""Of the toy's clean latents."""


def latents(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def levels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_sde_by_hand() -> None:
    # sigma 0.5 -> 0.4, level 0.7: g = 0.7 sqrt(0.5 / 0.5) = 0.7; z = 2, u = 1: eps = z + 0.5 u = 2.5.
    # mean = 2 - 0.1 (1 + 0.49 / 1 * 2.5) = 1.6775;  std = 0.7 sqrt(0.1)
    found = transition(latents(2.0), latents(1.0), levels(0.5), levels(0.4), rule="sde", noise_level=0.7)
    assert found.mean.item() == pytest.approx(2 - 0.1 * (1 + 0.49 * 2.5), abs=1e-12)
    assert found.std.item() == pytest.approx(0.7 * math.sqrt(0.1), abs=1e-12)


def test_sde_is_finite_at_pure_noise() -> None:
    found = transition(
        latents(1.0), latents(1.0), levels(1.0), levels(0.9), rule="sde", noise_level=0.7, sigma_max=0.9
    )
    assert found.std.item() == pytest.approx(0.7 * math.sqrt(1.0 / 0.1) * math.sqrt(0.1), abs=1e-9)


def test_cps_by_hand() -> None:
    # z = 1, u = 1 at sigma 0.5: z0 = 0.5, eps = 1.5; to 0.4 with level 1/3: std = 0.4 sin 30 degrees = 0.2.
    found = transition(latents(1.0), latents(1.0), levels(0.5), levels(0.4), rule="cps", noise_level=1 / 3)
    assert found.std.item() == pytest.approx(0.2, abs=1e-12)
    assert found.mean.item() == pytest.approx(0.6 * 0.5 + math.sqrt(0.16 - 0.04) * 1.5, abs=1e-12)


def test_ddim_is_that_of_diffusers() -> None:
    """Mean and deviation against DDIMScheduler.step with eta, which adds one known noise sample."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(10)
    schedule = NoiseSchedule.from_config(scheduler.config)
    generator = torch.Generator().manual_seed(0)
    z, eps, noise = (torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    t, following = scheduler.timesteps[3], scheduler.timesteps[4]
    theirs = scheduler.step(eps, int(t), z, eta=0.6, variance_noise=noise).prev_sample
    sigma, sigma_next = schedule.sigma_at(torch.stack([t, following]).float()).double().split(1)
    ours = transition(z, eps, sigma, sigma_next, kind="epsilon", rule="ddim", noise_level=0.6)
    torch.testing.assert_close(ours.mean + ours.std.item() * noise, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["sde", "cps"])
def test_without_noise_every_rule_is_the_euler_step(rule: Rule) -> None:
    z, u = latents(1.0, -2.0), latents(0.3, 0.8)
    found = transition(z, u, levels(0.8, 0.6), levels(0.7, 0.5), rule=rule, noise_level=0.0)
    torch.testing.assert_close(found.mean, euler_step(z, u, levels(0.8, 0.6), levels(0.7, 0.5)))
    assert found.std.abs().max() == 0


def affine(rule: Rule, grid: Tensor, noise_level: float, *, flow: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, intercept and std of every step, where the network knows the toy's exact posterior."""
    sigma, sigma_next = grid[:-1], grid[1:]
    signal = 1 - sigma if flow else (1 - sigma**2).sqrt()
    variance = signal**2 * STD**2 + sigma**2

    def mean_at(value: float) -> tuple[Tensor, Tensor]:
        residual = value - signal * MEAN
        clean, noise = MEAN + signal * STD**2 / variance * residual, sigma / variance * residual
        found = transition(
            torch.full_like(sigma, value).reshape(-1, 1, 1, 1),
            (noise - clean if flow else noise).reshape(-1, 1, 1, 1),
            sigma,
            sigma_next,
            kind="flow_prediction" if flow else "epsilon",
            rule=rule,
            noise_level=noise_level,
            sigma_max=0.999,
        )
        return found.mean.flatten(), found.std

    low, std = mean_at(0.0)
    return mean_at(1.0)[0] - low, low, std


@pytest.mark.parametrize(
    ("rule", "noise_level", "flow"),
    [
        ("ode", 0.0, True),
        ("sde", 0.7, True),
        ("ode", 0.0, False),
        ("ddim", 0.5, False),
        ("ddim", 1.0, False),
    ],
)
def test_marginals_are_those_of_the_forward_process(rule: Rule, noise_level: float, flow: bool) -> None:
    """Clean latents N(MEAN, STD^2), whose exact velocity is known: every step is affine, so mean and variance
    are propagated exactly. At every level they must be those of the forward process,

        mean  a MEAN,     variance  a^2 STD^2 + sigma^2,

    up to the error of 8,000 steps, which is of first order."""
    grid = 1 - torch.arange(1, 7961, dtype=torch.float64) / 8000
    a = 1 - grid if flow else (1 - grid**2).sqrt()
    expected_mean, expected_variance = a * MEAN, a**2 * STD**2 + grid**2
    mean, variance = expected_mean[0].item(), expected_variance[0].item()
    for step, values in enumerate(
        zip(*(part.tolist() for part in affine(rule, grid, noise_level, flow=flow)), strict=True)
    ):
        slope, intercept, std = values
        mean, variance = slope * mean + intercept, slope**2 * variance + std**2
        if step % 500 == 0:
            assert mean == pytest.approx(expected_mean[step + 1].item(), abs=1e-3)
            assert variance == pytest.approx(expected_variance[step + 1].item(), rel=4e-3)


@pytest.mark.parametrize(
    ("rule", "noise_level", "steps", "expected"),
    [("ode", 0.0, 5000, 1.0), ("sde", 0.7, 5000, 1.0), ("cps", 0.7, 40, 0.68), ("cps", 0.7, 5000, 0.73)],
)
def test_cps_ends_with_too_little_variance(
    rule: Rule, noise_level: float, steps: int, expected: float
) -> None:
    """Clean latents N(0, 1), whose variance is 1 at the end of an exact sampler. In cps the fresh noise is
    not the noise in the state, however small the steps."""
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigma, after = grid[:-1], grid[1:]
    z = torch.ones(steps, 1, 1, 1, dtype=torch.float64)
    predicted = ((sigma - (1 - sigma)) / ((1 - sigma) ** 2 + sigma**2)).reshape(-1, 1, 1, 1)
    found = transition(
        z, predicted, sigma, after, rule=rule, noise_level=noise_level, sigma_max=float(grid[1])
    )
    variance = 1.0
    for slope, std in zip(found.mean.flatten().tolist(), found.std.tolist(), strict=True):
        variance = slope**2 * variance + std**2
    assert variance == pytest.approx(expected, abs=0.01)


def test_log_probability_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    mean, sample = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    std = levels(0.3, 0.8)
    expected = Normal(mean, std.reshape(-1, 1, 1, 1)).log_prob(sample).flatten(1).mean(dim=1)
    torch.testing.assert_close(gaussian_log_prob(sample, Transition(mean, std)), expected)


def test_gradient_of_the_log_probability_is_by_hand() -> None:
    """d/dm of -(x - m)^2 / (2 s^2), averaged over n elements: (x - m) / (n s^2); the sample is a constant."""
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    sample = torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    gaussian_log_prob(sample, Transition(mean, levels(0.5))).sum().backward()
    assert mean.grad is not None
    torch.testing.assert_close(mean.grad, (sample - mean).detach() / (18 * 0.25))
    assert sample.grad is None


def test_divergence_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    std = levels(0.3, 0.8)
    wide = std.reshape(-1, 1, 1, 1)
    expected = kl_divergence(Normal(ours, wide), Normal(theirs, wide)).flatten(1).mean(dim=1)
    torch.testing.assert_close(gaussian_divergence(Transition(ours, std), Transition(theirs, std)), expected)


def test_rules_of_the_other_family_and_bad_levels_are_refused() -> None:
    z = latents(1.0)
    with pytest.raises(ValueError, match=r"rule 'sde' does not go with .* 'epsilon'"):
        transition(z, z, levels(0.5), levels(0.4), kind="epsilon", rule="sde")
    with pytest.raises(ValueError, match="rule 'ddim' does not go with"):
        transition(z, z, levels(0.5), levels(0.4), rule="ddim")
    with pytest.raises(ValueError, match=r"noise_level = 1.5: must be in \[0, 1\]"):
        transition(z, z, levels(0.5), levels(0.4), rule="cps", noise_level=1.5)
