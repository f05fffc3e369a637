"""Noise: the training table of a backbone's scheduler, mixing, and the laws of sigma and of noise.

sigma in [0, 1] is the noise coordinate of the whole package, 0 = clean and 1 = pure noise, for both families:

    rectified flow       z_sigma = (1 - sigma) z0 + sigma eps             sigma_i = s u_i / (1 + (s - 1) u_i)
    variance preserving  z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps     sigma  := sqrt(1 - abar_t)

A backbone was trained on finitely many levels, so a wanted sigma is snapped to the nearest row of its table;
that row gives the sigma for mixing and for the loss, and the timestep for the network.

Departures from the paper's code: every draw goes through a generator that the caller passes (theirs used the
global one for scoring and ignored the generator for the beta distribution), distributions take typed numbers
instead of strings that are evaluated, and noise for scoring is drawn per sample, so that a score does not
depend on its batch.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch.special is not annotated)

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from dina_lrm.core.tensors import Latents, NoiseLevel, TableIndex

__all__ = [
    "ForwardProcess",
    "MatchedLevel",
    "NoiseDistribution",
    "NoiseSchedule",
    "sample_noise_levels",
    "seeded_generator",
    "seeded_noise",
    "torch_seed",
]

ForwardProcess = Literal["rectified_flow", "variance_preserving"]
NoiseDistribution = Literal["uniform", "logit_normal", "mode", "power", "beta", "constant"]


@dataclass(frozen=True, eq=False, slots=True)
class MatchedLevel:
    """One row of the training table per sample, nearest to the sigma that was asked for."""

    index: TableIndex
    sigma: Float32[Tensor, " batch"]
    timestep: Float32[Tensor, " batch"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A scheduler's training table, and the one rule by which clean latents and noise are mixed.

    >>> schedule = NoiseSchedule.rectified_flow(shift=3.0)
    >>> schedule.match(torch.tensor([0.0, 0.4, 1.0]))
    MatchedLevel(index=tensor([999, 818,   0]),
                 sigma=tensor([0.0030, 0.4003, 1.0000]),
                 timestep=tensor([   2.9940,  400.2933, 1000.0000]))
    """

    sigmas: Float32[Tensor, " num"]
    """Noise level of each row: descending for rectified flow, ascending for variance preserving."""
    timesteps: Float32[Tensor, " num"]
    """What the network is told at each row: 1000 sigma for rectified flow, the step's number otherwise."""
    process: ForwardProcess
    """How clean latents and noise are mixed."""
    signals: Float32[Tensor, " num"] | None = None
    """sqrt(abar_t) of each row, as the scheduler rounds it; variance preserving only."""

    @classmethod
    def rectified_flow(cls, shift: float = 3.0, num_train_timesteps: int = 1000) -> "NoiseSchedule":
        """Table of a flow-matching scheduler: u = n / num for n = num .. 1, sigma = s u / (1 + (s - 1) u).

        The shift s > 1 moves levels towards noise, which larger pictures need; s = 1 keeps them even. Bit for
        bit the table of a fresh diffusers FlowMatchEulerDiscreteScheduler: float32, descending, no 0 in it.

        Source: Esser et al., arXiv:2403.03206, equation 23.
        """
        if not (shift > 0 and num_train_timesteps >= 1):
            raise ValueError(
                f"shift {shift}, num_train_timesteps {num_train_timesteps}: both must be positive"
            )
        u = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float32) / num_train_timesteps
        sigmas = shift * u / (1 + (shift - 1) * u)
        return cls(sigmas=sigmas, timesteps=sigmas * num_train_timesteps, process="rectified_flow")

    @classmethod
    def variance_preserving(cls, alphas_cumprod: Float[Tensor, " num"]) -> "NoiseSchedule":
        """Table of a DDPM-style scheduler: row t has sigma = sqrt(1 - abar_t) and timestep t.

        Args:
            alphas_cumprod: abar_t for t = 0, 1, ..: the product of 1 - beta up to t. In [0, 1], falling.
        """
        abar = alphas_cumprod.detach().to("cpu", torch.float32)
        falling = bool((abar.diff() <= 0).all()) and bool(((abar >= 0) & (abar <= 1)).all())
        if abar.numel() == 0 or not falling:
            raise ValueError(
                "alphas_cumprod must be a non-empty, non-increasing sequence of numbers in [0, 1]"
            )
        timesteps = torch.arange(abar.numel(), dtype=torch.float32)
        return cls(
            sigmas=(1 - abar).sqrt(), timesteps=timesteps, process="variance_preserving", signals=abar.sqrt()
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """The training table that a diffusers scheduler's config (`scheduler_config.json`) stands for.

        Read are, for flow matching (FlowMatch* classes, or `use_flow_sigmas`): shift or flow_shift, and
        use_dynamic_shifting, under which training levels are not shifted; for DDPM, DDIM, PNDM, Euler,
        DPM-Solver and the like: trained_betas, or beta_schedule ("linear", "scaled_linear",
        "squaredcos_cap_v2") with beta_start and beta_end, and rescale_betas_zero_snr; for both
        num_train_timesteps. What concerns sampling only (karras sigmas, spacing of steps) is ignored, since a
        reward model never samples.
        """
        name = str(config.get("_class_name", ""))
        num: int = config.get("num_train_timesteps", 1000)
        if config.get("use_flow_sigmas"):
            return cls.rectified_flow(float(config.get("flow_shift", 1.0)), num)
        has_betas = (
            config.get("trained_betas") is not None or "beta_schedule" in config or "beta_start" in config
        )
        if "FlowMatch" in name or ("shift" in config and not has_betas):
            shift = 1.0 if config.get("use_dynamic_shifting") else float(config.get("shift", 1.0))
            return cls.rectified_flow(shift, num)
        if has_betas:
            return cls.variance_preserving(_alphas_cumprod(config, num))
        raise ValueError(
            f"scheduler config {name or '(no _class_name)'} has neither a flow-matching shift nor betas; "
            f"its keys are {', '.join(sorted(config))}"
        )

    def match(self, sigma: NoiseLevel) -> MatchedLevel:
        """Nearest row of the table for each wanted sigma: the first smallest |sigma_i - sigma|, in float32.

        Use the returned sigma from here on, for mixing and for the loss; the wanted one has done its work.

        Raises:
            ValueError: a level is NaN or outside [0, 1].
        """
        valid = (sigma >= 0) & (sigma <= 1)  # False for NaN
        if not bool(valid.all()):
            raise ValueError(
                f"noise level {sigma[~valid][0].item()}: it must be in [0, 1] (0 clean, 1 pure noise)"
            )
        return self.nearest(sigma)

    def nearest(self, sigma: NoiseLevel) -> MatchedLevel:
        """`match` of levels that are known to be in [0, 1]: nothing is read back from the device."""
        table = self.sigmas.to(sigma.device)
        index = (table - sigma.detach().to(torch.float32).unsqueeze(1)).abs().argmin(dim=1)
        return MatchedLevel(index, table[index], self.timesteps.to(sigma.device)[index])

    def sigma_at(self, timestep: Float[Tensor, " batch"]) -> NoiseLevel:
        """Noise level at a sampler's timesteps, which need not be in the table.

        Rectified flow: timestep / num_train_timesteps. Variance preserving: that of the nearest row.
        """
        if self.process == "rectified_flow":
            return timestep * (self.sigmas[0] / self.timesteps[0]).to(timestep)
        return self.sigmas.to(timestep)[timestep.round().long().clamp(0, len(self.sigmas) - 1)]

    def add_noise(self, latents: Latents, noise: Latents, sigma: NoiseLevel) -> Latents:
        """Forward diffusion to `sigma`: (1 - sigma) z0 + sigma eps, or sqrt(1 - sigma^2) z0 + sigma eps.

        Args:
            latents: clean, shifted and scaled.
            noise: standard normal, one per sample; both sides of a pair get the same.
            sigma: matched, that is, an entry of the table.

        Variance-preserving float32 states equal those of diffusers' schedulers bit for bit.

        Returns:
            In the dtype of `latents`; mixed in float32 or wider. Differentiable in `latents` and `noise`.
        """
        dtype = torch.promote_types(latents.dtype, torch.float32)
        level = sigma.to(dtype)
        signal, level = (
            value.reshape(-1, *[1] * (latents.ndim - 1)) for value in (self._signal(level), level)
        )
        return (signal * latents.to(dtype) + level * noise.to(dtype)).to(latents.dtype)

    def clean_between(
        self, before: Latents, after: Latents, sigma_before: NoiseLevel, sigma_after: NoiseLevel
    ) -> Latents:
        """The clean latent that a network predicted, read off the first-order step without noise that it led
        to: both states are mixed from that clean latent and one noise. In float32 or wider.

        Args:
            sigma_before: of `before`; above `sigma_after`.

        By hand: z0 = 1 and eps = 3 at sigma 0.5 and 0.25 are 2 and 1.5.

        >>> before, after = (torch.full((1, 1, 1, 1), value) for value in (2.0, 1.5))
        >>> schedule = NoiseSchedule.rectified_flow()
        >>> schedule.clean_between(before, after, torch.tensor([0.5]), torch.tensor([0.25])).item()
        1.0
        """
        dtype = torch.promote_types(before.dtype, torch.float32)
        levels = (sigma_before.to(before.device, dtype), sigma_after.to(before.device, dtype))
        s, t, a_s, a_t = (
            value.reshape(-1, *[1] * (before.ndim - 1)) for value in (*levels, *map(self._signal, levels))
        )
        return (s * after.to(dtype) - t * before.to(dtype)) / (s * a_t - t * a_s)

    def _signal(self, level: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        if self.process == "rectified_flow":
            return 1 - level
        signal = ((1 - level) * (1 + level)).sqrt()  # 1 - level is exact near 1, where 1 - level^2 cancels
        if self.signals is None or level.dtype != torch.float32:
            return signal
        index = self.nearest(level).index  # in float32 an entry of the table gets the scheduler's own bits
        sigmas, signals = self.sigmas.to(level.device), self.signals.to(level.device)
        return torch.where(sigmas[index] == level, signals[index], signal)


def sample_noise_levels(
    distribution: NoiseDistribution,
    num: int,
    *,
    generator: torch.Generator,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    exponent: float = 2.0,
    beta_a: float = 2.0,
    beta_b: float = 2.0,
    level: float = 0.4,
) -> Float32[Tensor, " num"]:
    """Training noise levels: `num` draws of sigma from `distribution`, all randomness out of `generator`.

    With r uniform in [0, 1), sigma is

        uniform       r
        logit_normal  sigmoid(logit_mean + logit_std Phi^-1(r))
        mode          1 - r - mode_scale (cos^2(pi r / 2) - 1 + r)
        power         r^exponent
        beta          quantile r of Beta(beta_a, beta_b)
        constant      level

    Each distribution is a function of one uniform draw: runs that differ in it alone see the same quantiles.

    Returns:
        float32 levels on the generator's device, not yet matched to a table.

    >>> sample_noise_levels("logit_normal", 3, generator=torch.Generator().manual_seed(0))
    tensor([0.8678, 0.6334, 0.4745])

    Source: uniform is the choice of arXiv:2602.11146; logit-normal and mode are from arXiv:2403.03206.
    """
    r = torch.rand(num, generator=generator, dtype=torch.float64, device=generator.device)
    match distribution:
        case "uniform":
            sigma = r
        case "logit_normal":
            _require(logit_std >= 0, "logit_std", logit_std, "at least 0")
            sigma = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(r))
        case "mode":
            # Outside this range sigma is not monotone in r and leaves [0, 1].
            _require(-1 <= mode_scale <= 2 / (math.pi - 2), "mode_scale", mode_scale, "in [-1, 1.7519]")
            sigma = 1 - r - mode_scale * ((math.pi * r / 2).cos().square() - 1 + r)
        case "power":
            _require(exponent > 0, "exponent", exponent, "above 0")
            sigma = r.pow(exponent)
        case "beta":
            _require(min(beta_a, beta_b) > 0, "beta_a, beta_b", (beta_a, beta_b), "above 0")
            sigma = _beta_quantile(r, beta_a, beta_b)
        case "constant":
            _require(0 <= level <= 1, "level", level, "in [0, 1]")
            sigma = torch.full_like(r, level)
    return sigma.clamp(0, 1).to(torch.float32)


def seeded_generator(seed: int) -> torch.Generator:
    """A generator on the CPU in which every bit of the seed counts.

    Up to 2^32 - 1 it is torch's own `manual_seed`, which there ignores all higher bits: 0 and 2^32 would be
    one seed. Other seeds fill the Mersenne Twister's state by its authors' `init_by_array`.

    Args:
        seed: from -2^63 to 2^64 - 1.

    >>> torch.rand(2, generator=seeded_generator(0)).equal(torch.rand(2, generator=seeded_generator(2**32)))
    False

    Source: Matsumoto and Nishimura, mt19937ar.c (2002).
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed {seed}: it must be from -2^63 to 2^64 - 1")
    generator = torch.Generator()
    if 0 <= seed <= _WORD:
        return generator.manual_seed(seed)
    key = [seed & _WORD, (seed >> 32) & _WORD, *([1] if seed < 0 else [])]  # the sign is a word of its own
    twister: Any = np.random.RandomState(key).get_state()
    state = generator.manual_seed(0).get_state()
    state[_TWISTER] = torch.from_numpy(twister[1].astype(np.int64)).view(torch.uint8)
    return generator.set_state(state)


def torch_seed(seed: int) -> int:
    """The 32 bits of a seed that torch's own `manual_seed` reads on the CPU.

    For seeds mixed by a hash, any 32 bits of which are as good as the rest: runs go on drawing the noise that
    they have always drawn, which is that of a plain diffusers pipeline with these seeds.
    """
    return seed % 2**32


def seeded_noise(
    shape_one_sample: Sequence[int], seeds: Sequence[int], *, num_draws: int = 1
) -> Float32[Tensor, "draw batch channel *frame height width"]:
    """Standard normal noise whose sample i depends on `seeds[i]` and its own shape, and on nothing else.

    Each sample has its own CPU generator, so its noise, and hence its score, is the same alone, in any batch,
    at any place in it, and on any device the noise is moved to. More draws leave the first ones as they are.

    Args:
        shape_one_sample: channel, height, width; for video channel, frame, height, width.
        seeds: one per sample, see `seeded_generator`; equal seeds give equal noise.

    >>> seeded_noise((16, 8, 8), seeds=[0, 1, 0], num_draws=2).shape
    torch.Size([2, 3, 16, 8, 8])
    """
    shape = tuple(shape_one_sample)
    noise = torch.empty((num_draws, len(seeds), *shape), dtype=torch.float32)
    for sample, seed in enumerate(seeds):
        generator = seeded_generator(seed)
        for draw in range(num_draws):
            noise[draw, sample] = torch.randn(shape, generator=generator, dtype=torch.float32)
    return noise


# -------------------------------------------------------------------------------------------------- internals

_WORD = 2**32 - 1
_TWISTER = slice(24, 24 + 8 * 624)
"""Bytes of a CPU generator's stored state (`CPUGeneratorImplStateLegacy`) that hold the Mersenne Twister's
624 words, each in 64 bits."""


def _alphas_cumprod(config: Mapping[str, Any], num: int) -> Float32[Tensor, " num"]:
    """abar_t by the float32 operations of diffusers' schedulers: what the backbone was trained on."""
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    trained = config.get("trained_betas")
    match "trained" if trained is not None else config.get("beta_schedule", "linear"):
        case "trained":
            betas = torch.as_tensor(trained, dtype=torch.float32)
        case "linear":
            betas = torch.linspace(start, end, num, dtype=torch.float32)
        case "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, num, dtype=torch.float32).square()
        case "squaredcos_cap_v2":
            abar = [math.cos((step / num + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(num + 1)]
            betas = torch.tensor(
                [min(1 - abar[i + 1] / abar[i], 0.999) for i in range(num)], dtype=torch.float32
            )
        case unknown:
            known = "'linear', 'scaled_linear', 'squaredcos_cap_v2', or trained_betas"
            raise ValueError(f"beta_schedule is {unknown!r}; known are {known}")
    alphas_cumprod = (1.0 - betas).cumprod(dim=0)
    if not config.get("rescale_betas_zero_snr"):
        return alphas_cumprod
    # Zero terminal signal-to-noise ratio: shift and stretch sqrt(abar) so that the last step is pure noise.
    # Source: Lin et al., arXiv:2305.08891, algorithm 1.
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()


def _beta_quantile(r: Float[Tensor, " num"], a: float, b: float) -> Float[Tensor, " num"]:
    """Inverse of the regularised incomplete beta function: torch's own sampler of Beta takes no generator."""
    # Imported here: this one distribution needs it, and it is slow to load.
    from scipy import special  # pyright: ignore[reportMissingTypeStubs]

    return torch.from_numpy(special.betaincinv(a, b, r.cpu().numpy())).to(r)


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}; it must be {allowed}")
