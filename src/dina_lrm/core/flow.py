"""Steps of a sampler and what a network's output says about the clean latent, for both noise families.

With z_sigma = a z0 + sigma eps, where a = 1 - sigma (rectified flow) or a = sqrt(1 - sigma^2) (variance
preserving), a network predicts one of four quantities, and any of them with z_sigma gives back z0 and eps:

    flow_prediction   u   = eps - z0             z0 = z_sigma - sigma u                 rectified flow
    epsilon           eps                        z0 = (z_sigma - sigma eps) / a         variance preserving
    v_prediction      v   = a eps - sigma z0     z0 = a z_sigma - sigma v               variance preserving
    sample            z0                                                                variance preserving

The names are those of diffusers' `prediction_type`. sigma keeps its direction: 0 clean, 1 pure noise.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from dina_lrm.core.tensors import Latents, NoiseLevel, Score

__all__ = [
    "CleanAndNoise",
    "Prediction",
    "clean_and_noise",
    "ddim_step",
    "euler_step",
    "prediction_error",
    "sigma_grid",
]

Prediction = Literal["flow_prediction", "epsilon", "v_prediction", "sample"]


class CleanAndNoise(NamedTuple):
    """What a noisy latent is made of, as far as the network can tell."""

    clean: Latents
    noise: Latents


def clean_and_noise(
    noisy_latents: Latents, prediction: Latents, sigma: NoiseLevel, *, kind: Prediction = "flow_prediction"
) -> CleanAndNoise:
    """Split z_sigma into predicted clean latent and predicted noise; mixed again they give z_sigma back.

    Args:
        prediction: the network's output, of the given `kind`.
        sigma: of `noisy_latents`. "epsilon" says nothing about z0 at sigma = 1, "sample" nothing about
            noise at sigma = 0.

    Returns:
        Both in float32 or wider.
    """
    dtype = torch.promote_types(noisy_latents.dtype, torch.float32)
    z, out, s = noisy_latents.to(dtype), prediction.to(dtype), _per_sample(sigma, noisy_latents)
    a = ((1 - s) * (1 + s)).sqrt()
    match kind:
        case "flow_prediction":
            return CleanAndNoise(z - s * out, z + (1 - s) * out)
        case "epsilon":
            return CleanAndNoise((z - s * out) / a, out)
        case "v_prediction":
            return CleanAndNoise(a * z - s * out, s * z + a * out)
        case "sample":
            return CleanAndNoise(out, (z - a * out) / s)


def prediction_error(
    noisy_latents: Latents,
    prediction: Latents,
    sigma: NoiseLevel,
    clean: Latents,
    noise: Latents,
    *,
    kind: Prediction = "flow_prediction",
) -> Score:
    """Squared error of a network's output, (batch,), averaged over elements: of its velocity for flows, of
    the noise that it sees otherwise.

    Args:
        clean, noise: what `noisy_latents` was mixed from.

    By hand: z0 = 1, eps = 3 at sigma = 0.5 give z = 2 and u = 2; a predicted 5 is off by 3.

    >>> z0, eps, out = (torch.full((1, 1, 1, 1), value) for value in (1.0, 3.0, 5.0))
    >>> prediction_error((z0 + eps) / 2, out, torch.tensor([0.5]), z0, eps)
    tensor([9.])
    """
    seen = clean_and_noise(noisy_latents, prediction, sigma, kind=kind)
    miss = seen.noise - noise
    if kind == "flow_prediction":
        miss = (seen.noise - seen.clean) - (noise - clean)
    return miss.square().flatten(1).mean(dim=1)


def euler_step(
    noisy_latents: Latents, velocity: Latents, sigma: NoiseLevel, sigma_next: NoiseLevel
) -> Latents:
    """One Euler step along a rectified flow: z + (sigma_next - sigma) u, where u = dz / dsigma.

    Stepping to sigma_next = 0 gives the predicted clean latent. A path along one exact velocity is straight,
    so any number of steps lands on the same point.

    Returns:
        In the dtype of `noisy_latents`; computed in float32 or wider.
    """
    dtype = torch.promote_types(noisy_latents.dtype, torch.float32)
    step = _per_sample(sigma_next, noisy_latents) - _per_sample(sigma, noisy_latents)
    return (noisy_latents.to(dtype) + step * velocity.to(dtype)).to(noisy_latents.dtype)


def ddim_step(
    noisy_latents: Latents,
    prediction: Latents,
    sigma: NoiseLevel,
    sigma_next: NoiseLevel,
    *,
    kind: Prediction = "epsilon",
) -> Latents:
    """One deterministic step of a variance-preserving model: mix the predicted parts again at `sigma_next`.

        z_next = sqrt(1 - sigma_next^2) z0_predicted + sigma_next eps_predicted

    Returns:
        In the dtype of `noisy_latents`; computed in float32 or wider.

    Source: Song et al., arXiv:2010.02502, equation 12 with eta = 0.
    """
    clean, noise = clean_and_noise(noisy_latents, prediction, sigma, kind=kind)
    s = _per_sample(sigma_next, noisy_latents)
    return (((1 - s) * (1 + s)).sqrt() * clean + s * noise).to(noisy_latents.dtype)


def sigma_grid(
    num_steps: int, *, shift: float = 3.0, num_train_timesteps: int = 1000
) -> Float32[Tensor, " step_plus_1"]:
    """Descending noise levels of a rectified-flow sampler, from 1 to 0: `num_steps` + 1 points.

    Evenly spaced between the ends of the shifted training table, then shifted once more, as diffusers'
    FlowMatchEulerDiscreteScheduler.set_timesteps does: samples of published models depend on it.

    >>> sigma_grid(4, shift=1.0)
    tensor([1.0000, 0.6670, 0.3340, 0.0010, 0.0000])
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    lowest = shift / num_train_timesteps / (1 + (shift - 1) / num_train_timesteps)
    even = torch.linspace(1.0, lowest, num_steps, dtype=torch.float64)
    grid = shift * even / (1 + (shift - 1) * even)
    return torch.cat([grid, grid.new_zeros(1)]).to(torch.float32)


def _per_sample(sigma: NoiseLevel, latents: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    dtype = torch.promote_types(latents.dtype, torch.float32)
    return sigma.to(dtype).reshape(-1, *[1] * (latents.ndim - 1))
