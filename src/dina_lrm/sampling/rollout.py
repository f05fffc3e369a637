"""Sampling that keeps what policy gradients need: states, levels and log-probabilities of every step.

Sample i depends on its own seed alone, whatever it is batched with: its first noise is what the pipeline
draws from `torch.Generator().manual_seed(seed)`, so a deterministic rollout is the picture that the pipeline
makes, and the noise of step n comes from (seed, n).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.noise import seeded_noise, torch_seed
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.core.tensors import Latents
from dina_lrm.core.transitions import Rule, Transition, gaussian_log_prob, transition
from dina_lrm.errors import InvalidInputError
from dina_lrm.sampling.policy import Grid, Policy

__all__ = [
    "SamplerConfig",
    "Trajectory",
    "advance",
    "deterministic",
    "first_noise",
    "rollout",
    "sample",
    "step_at",
    "transition_at",
]

"""Sets the noise of steps apart from the first noise of the same seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How pictures are sampled."""

    num_steps: int = 10
    """Network evaluations of a picture, guidance not counted."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is without, and half the cost."""
    height: int | None = None
    """Height of the pictures in pixels; None: the pipeline's own."""
    width: int | None = None
    """Width of the pictures in pixels; None: the pipeline's own."""
    rule: Rule = "ode"
    """ode: deterministic; sde (Flow-GRPO) or cps (coefficients preserving): stochastic, rectified flow;
    ddim: stochastic, variance-preserving models."""
    noise_level: float = 0.7
    """How stochastic the steps are; read by all rules but ode."""
    window: tuple[int, int] | None = None
    """First and one past the last stochastic step, others are deterministic; None: all but the first of sde
    (where its noise is unbounded) and the last two, which end clean and so nearly clean (diffusers' grids end
    at sigma below 0.01) that noise would stay in the picture, or one update would change every ratio."""
    batch_size: int = 32
    """Pictures per call of the network; no effect on them beyond rounding."""

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 1:
            raise InvalidInputError(
                f"num_steps = {self.num_steps}, batch_size = {self.batch_size}: must be at least 1"
            )
        if self.window is not None and not 0 <= self.window[0] < self.window[1] <= self.num_steps:
            raise InvalidInputError(f"window = {self.window}: must lie in the {self.num_steps} steps")
        if not self.guidance_scale >= 1.0:
            raise InvalidInputError(f"guidance_scale = {self.guidance_scale}: must be at least 1")
        if not 0.0 < self.noise_level:
            raise InvalidInputError(f"noise_level = {self.noise_level}: must be positive")

    @property
    def stochastic(self) -> range:
        """Steps that draw noise."""
        if self.rule == "ode":
            return range(0)
        if self.window is not None:
            return range(*self.window)
        return range(1 if self.rule == "sde" else 0, max(self.num_steps - 2, 0))


@dataclass(frozen=True)
class Trajectory:
    """All that a rollout passed through."""

    states: Float[Tensor, "step_plus_1 batch channel height width"]
    """From pure noise to the clean latents."""
    means: Float[Tensor, "step batch channel height width"]
    """Means of the Gaussians that the states after the first were drawn from."""
    log_probs: Float[Tensor, "step batch"]
    """Log-probabilities of the steps as drawn, mean over elements; 0 where they are deterministic."""
    grid: Grid
    steps: range
    """The stochastic ones."""

    @property
    def clean(self) -> Float[Tensor, "batch channel height width"]:
        return self.states[-1]


def first_noise(shape: Sequence[int], seeds: Sequence[int]) -> Float[Tensor, "batch channel height width"]:
    """Pure noise of each sample, on the CPU."""
    return seeded_noise(shape, [torch_seed(seed) for seed in seeds])[0]


def transition_at(
    policy: Policy,
    latents: Tensor,
    conditioning: Conditioning,
    grid: Grid,
    step: int,
    config: SamplerConfig,
) -> Transition:
    """Where step `step` of the sampler goes from `latents`: one evaluation of the network."""
    batch = len(latents)
    prediction = policy.predict(
        latents, conditioning, grid.timesteps[step].expand(batch), guidance_scale=config.guidance_scale
    )
    return transition(
        latents,
        prediction,
        grid.sigmas[step].expand(batch),
        grid.sigmas[step + 1].expand(batch),
        kind=policy.kind,
        rule=config.rule if step in config.stochastic else "ode",
        noise_level=config.noise_level,
        sigma_max=float(grid.sigmas[1]),
    )


def step_at(where: Transition, seeds: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
    """The next state and its log-probability (batch,), with noise from (seed, step)."""
    if not bool((where.std > 0).any()):
        return where.mean, torch.zeros_like(where.std)
    noise = first_noise(where.mean.shape[1:], [mix_seeds(seed, Stream.SAMPLER_STEP, step) for seed in seeds])
    std = where.std.reshape(-1, *[1] * (where.mean.ndim - 1))
    state = where.mean + std * noise.to(where.mean)
    return state, gaussian_log_prob(state, where)


@torch.no_grad()
def rollout(
    policy: Policy,
    conditioning: Conditioning,
    seeds: Sequence[int],
    config: SamplerConfig,
    *,
    step_seeds: Sequence[int] | None = None,
) -> Trajectory:
    """Sample one picture per row of `conditioning`.

    Args:
        seeds: one per row.
        step_seeds: of the noise of stochastic steps; None: `seeds`. Trajectories that differ in it alone
            start from the same noise.

    Raises:
        InvalidInputError: not as many seeds as rows.
    """
    check_seeds(conditioning, seeds)
    shape = policy.latent_shape(config.height, config.width)
    grid = policy.grid(config.num_steps, shape)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(seeds), config.batch_size):
        rows = torch.arange(start, min(start + config.batch_size, len(seeds)), device=policy.device)
        own = [seeds[row] for row in rows.tolist()]
        drawn = own if step_seeds is None else [step_seeds[row] for row in rows.tolist()]
        prompts = conditioning.index_select(rows)
        state = first_noise(shape, own).to(policy.device)
        states, means, log_probs = [state], [], []
        for step in range(config.num_steps):
            where = transition_at(policy, state, prompts, grid, step, config)
            state, log_prob = step_at(where, drawn, step)
            states.append(state)
            means.append(where.mean)
            log_probs.append(log_prob)
        parts.append((torch.stack(states), torch.stack(means), torch.stack(log_probs)))
    states, means, log_probs = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return Trajectory(states, means, log_probs, grid, config.stochastic)


@torch.no_grad()
def sample(
    policy: Policy, conditioning: Conditioning, seeds: Sequence[int], config: SamplerConfig
) -> Float[Tensor, "batch channel height width"]:
    """Clean latents, one picture per row of `conditioning`, sampled without noise whatever `config.rule`; the
    states on the way are not kept.

    Raises:
        InvalidInputError: not as many seeds as rows.
    """
    check_seeds(conditioning, seeds)
    config = deterministic(config)
    shape = policy.latent_shape(config.height, config.width)
    grid = policy.grid(config.num_steps, shape)
    state = first_noise(shape, seeds).to(policy.device)
    for step in range(config.num_steps):
        state = advance(policy, state, conditioning, grid, step, config)
    return state


def advance(
    policy: Policy,
    latents: Latents,
    conditioning: Conditioning,
    grid: Grid,
    step: int,
    config: SamplerConfig,
) -> Latents:
    """The means that a step leads to, `config.batch_size` pictures at a time.

    Args:
        conditioning: one row per picture.
    """
    rows = torch.arange(len(latents), device=policy.device).split(config.batch_size)
    parts = [
        transition_at(policy, latents[own], conditioning.index_select(own), grid, step, config).mean
        for own in rows
    ]
    return torch.cat(parts)


def check_seeds(conditioning: Conditioning, seeds: Sequence[int]) -> None:
    if len(conditioning) != len(seeds):
        raise InvalidInputError(f"{len(seeds)} seeds for {len(conditioning)} prompts: give one for each")


def deterministic(config: SamplerConfig) -> SamplerConfig:
    """The same sampler without noise: how pictures are made when nothing is to be learned from them."""
    return replace(config, rule="ode", window=None)
