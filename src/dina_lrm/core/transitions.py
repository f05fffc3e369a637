"""One step of a sampler as a Gaussian transition N(mean, std^2): what policy gradients need of it.

With z0 and eps the clean latent and the noise that the network sees in z_sigma (`core.flow`):

    ode    mean = a' z0 + sigma' eps,                                  std = 0
    sde    mean = z + dt u + dt g^2/(2 sigma) eps,                     std = g sqrt(-dt)
               dt = sigma' - sigma < 0,   g = level sqrt(sigma / (1 - sigma)),   rectified flow
    cps    mean = a' z0 + sqrt(sigma'^2 - std^2) eps,                  std = sigma' sin(level pi / 2)
    ddim   the same mean,                                              std = level sigma'/sigma
               sqrt(1 - (a / a')^2),                                   variance preserving

where a' = 1 - sigma' (rectified flow) or sqrt(1 - sigma'^2) (variance preserving), and level >= 0 is the
user's noise level: 0 gives the deterministic step back.

With exact predictions `sde` and `ddim` keep the marginals of the deterministic sampler in the limit of small
steps. `cps` does not, in no limit: it keeps the coefficients of signal and noise in each step, but the fresh
noise is not what the network predicts from the state, and at level 0.7 the variance at the end is about 0.7
of the true one with 40 steps and with 5,000 (`tests/unit/core/test_transitions.py` counts it for Gaussian
data). In `sde` g is infinite at sigma = 1, so the first step uses `sigma_max` in it, below 1.

Source: sde: Flow-GRPO, arXiv:2505.05470, equation 9; cps: arXiv:2509.05952; ddim: arXiv:2010.02502,
equations 12 and 16.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dina_lrm.core.flow import Prediction, clean_and_noise
from dina_lrm.core.tensors import Latents, NoiseLevel, Score

__all__ = [
    "Rule",
    "Transition",
    "gaussian_divergence",
    "gaussian_log_prob",
    "transition",
    "unscaled_log_prob",
]

Rule = Literal["ode", "sde", "cps", "ddim"]


class Transition(NamedTuple):
    """Where a step goes."""

    mean: Latents
    std: Float[Tensor, " batch"]
    """Standard deviation of every element; 0 where the step is deterministic."""


def transition(
    noisy_latents: Latents,
    prediction: Latents,
    sigma: NoiseLevel,
    sigma_next: NoiseLevel,
    *,
    kind: Prediction = "flow_prediction",
    rule: Rule = "ode",
    noise_level: float = 0.7,
    sigma_max: float = 0.98,
) -> Transition:
    """The transition from `sigma` to `sigma_next` < `sigma`.

    Args:
        prediction: the network's output, of the given `kind`.
        rule: "sde" and "cps" are for rectified flow, "ddim" for variance-preserving models.
        noise_level: how stochastic; 0.7 is Flow-GRPO's. At most 1 for "cps" and "ddim".
        sigma_max: takes the place of sigma in g above it; read only by "sde".

    Returns:
        In float32 or wider, differentiable in `noisy_latents` and `prediction`.

    Raises:
        ValueError: a rule of the other family of models, or a noise level out of range.
    """
    flow = kind == "flow_prediction"
    if (rule in ("sde", "cps") and not flow) or (rule == "ddim" and flow):
        raise ValueError(f"rule {rule!r} does not go with models that predict {kind!r}")
    limit = math.inf if rule == "sde" else 1.0
    if not 0.0 <= noise_level <= limit:
        raise ValueError(f"noise_level = {noise_level}: must be in [0, {limit:g}] for rule {rule!r}")
    dtype = torch.promote_types(noisy_latents.dtype, torch.float32)
    z = noisy_latents.to(dtype)
    s, t = sigma.to(dtype), sigma_next.to(dtype)
    clean, noise = clean_and_noise(noisy_latents, prediction, sigma, kind=kind)

    def wide(value: Tensor) -> Tensor:
        return value.reshape(-1, *[1] * (z.ndim - 1))

    if rule == "sde":
        step = t - s
        diffusion = noise_level * (s / (1.0 - s.clamp(max=sigma_max))).sqrt()
        drift = (noise - clean) + wide(diffusion.square() / (2.0 * s)) * noise
        return Transition(z + wide(step) * drift, diffusion * (-step).sqrt())
    signal, signal_next = (1.0 - s, 1.0 - t) if flow else (_signal(s), _signal(t))
    match rule:
        case "ode":
            std = torch.zeros_like(t)
        case "cps":
            std = t * math.sin(noise_level * math.pi / 2)
        case "ddim":
            std = noise_level * t / s * (1.0 - (signal / signal_next).square()).clamp_min(0.0).sqrt()
    return Transition(
        wide(signal_next) * clean + wide((t.square() - std.square()).clamp_min(0.0).sqrt()) * noise, std
    )


def _signal(level: Tensor) -> Tensor:
    return ((1.0 - level) * (1.0 + level)).sqrt()


def gaussian_log_prob(sample: Latents, where: Transition) -> Score:
    """log N(sample; mean, std^2), averaged over the elements of each sample, (batch,).

    The average and not the sum, as in Flow-GRPO: thousands of elements would make every ratio 0 or infinite.
    Gradients flow through the mean only.
    """
    std = where.std.reshape(-1, *[1] * (sample.ndim - 1))
    squares = (sample.detach() - where.mean).square() / (2.0 * std.square())
    per_element = -squares - std.log() - 0.5 * math.log(2.0 * math.pi)
    return per_element.flatten(1).mean(dim=1)


def unscaled_log_prob(sample: Latents, mean: Latents) -> Score:
    """-(sample - mean)^2, averaged over the elements of each sample, (batch,): `gaussian_log_prob` times
    2 std^2, but for its constants.

    Flow-GRPO's public code takes it for the log-probability of its cps steps, so the clip ranges of its
    configs are in these units. Gradients flow through the mean only.
    """
    return -(sample.detach() - mean).square().flatten(1).mean(dim=1)


def gaussian_divergence(ours: Transition, theirs: Transition) -> Score:
    """KL(ours || theirs) at equal std, averaged over elements: (m - m')^2 / (2 std^2)."""
    difference = (ours.mean - theirs.mean).square().flatten(1).mean(dim=1)
    return difference / (2.0 * ours.std.square())
