"""Sampling a picture step by step, so that others get the model in between.

Each step is a piece of work of its own, and nothing of a sampling is kept in the policy: several visitors can
sample at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from dina_lrm.core.tensors import Latents
from dina_lrm.errors import InvalidInputError
from dina_lrm.sampling.policy import Policy
from dina_lrm.sampling.rollout import SamplerConfig, first_noise, transition_at

__all__ = [
    "MAX_GUIDANCE",
    "MAX_SEED",
    "MAX_STEPS",
    "Executor",
    "SamplerState",
    "check_settings",
    "sample_stepwise",
]

MAX_STEPS = 50
MAX_GUIDANCE = 10.0
MAX_SEED = 2**32 - 1

T = TypeVar("T")


@runtime_checkable
class Executor(Protocol):
    """How a piece of work gets the model: `run(job)` is `job()`, computed where and when it is allowed.

    Raises:
        ScoringError: there is too much other work.
    """

    def __call__(self, job: Callable[[], T], /) -> T: ...


@dataclass(frozen=True)
class SamplerState:
    """What one step started from, and what the denoiser saw in it."""

    step: int
    """From 0."""
    sigma: float
    timestep: Tensor
    """(1,), the scheduler's own."""
    noisy: Latents
    """(1, channel, height, width) at `sigma`."""
    clean: Latents
    """(1, channel, height, width): the clean latent that the denoiser predicts, guidance included; in the
    last step, the sample."""


def sample_stepwise(
    policy: Policy, prompt: str, *, seed: int, num_steps: int, guidance_scale: float | int, run: Executor
) -> Iterator[SamplerState]:
    """The states of one sampling without noise, as they come: those of the pipeline's own call.

    Args:
        seed: of the first noise, in [0, `MAX_SEED`]. num_steps: in [1, `MAX_STEPS`].
        guidance_scale: in [1, `MAX_GUIDANCE`]; 1 is without guidance, and half the work.
        run: takes the prompt, and then each step.

    Raises:
        ScoringError: from `run`.
    """
    config = SamplerConfig(num_steps=num_steps, guidance_scale=float(guidance_scale))
    shape = policy.latent_shape()
    grid = policy.grid(num_steps, shape)
    conditioning = run(lambda: policy.encoders.encode_prompts([prompt], policy.device))

    @torch.no_grad()
    def step(number: int, noisy: Tensor) -> tuple[SamplerState, Tensor]:
        after = transition_at(policy, noisy, conditioning, grid, number, config).mean
        sigma, following = grid.sigmas[number, None], grid.sigmas[number + 1, None]
        clean = policy.schedule.clean_between(noisy, after, sigma, following)
        return SamplerState(number, sigma.item(), grid.timesteps[number, None], noisy, clean), after

    latents = first_noise(shape, [seed]).to(policy.device)
    for number in range(num_steps):
        state, latents = run(lambda number=number, noisy=latents: step(number, noisy))
        yield state


def check_settings(
    seed: float | int | None, num_steps: float | int | None, guidance_scale: float | int
) -> tuple[int, int]:
    """Seed and number of steps, once it is known that `sample_stepwise` takes all three.

    Raises:
        InvalidInputError: it names the setting and its range.
    """
    if not 1 <= guidance_scale <= MAX_GUIDANCE:
        raise InvalidInputError(f"guidance = {guidance_scale:g}: must be in [1, {MAX_GUIDANCE:g}]")
    return _whole("seed", seed, 0, MAX_SEED), _whole("steps", num_steps, 1, MAX_STEPS)


def _whole(name: str, value: float | int | None, low: int, high: int) -> int:
    if value is None:
        raise InvalidInputError(f"{name}: none is given, a whole number in [{low}, {high}] is needed")
    if value != int(value) or not low <= value <= high:
        raise InvalidInputError(f"{name} = {value}: must be a whole number in [{low}, {high}]")
    return int(value)
