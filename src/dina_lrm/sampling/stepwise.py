"""Sampling a picture step by step, so that others get the model in between.

A diffusers pipeline samples in one call and keeps the state of its scheduler in itself. Here each step is
a piece of work of its own, with a scheduler of its own, and the pipeline's parts are only read: several
visitors can sample at once. Step for step it computes what `StableDiffusion3Pipeline.__call__` does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from dina_lrm.core.flow import clean_and_noise
from dina_lrm.core.tensors import Latents
from dina_lrm.errors import InvalidInputError
from dina_lrm.shapes.networks import MAX_TOKENS

__all__ = [
    "MAX_GUIDANCE",
    "MAX_SEED",
    "MAX_STEPS",
    "Run",
    "SamplerState",
    "check_settings",
    "sample_stepwise",
]

MAX_STEPS = 50
MAX_GUIDANCE = 10.0
MAX_SEED = 2**32 - 1

T = TypeVar("T")


@runtime_checkable
class Run(Protocol):
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
    pipeline: Any, prompt: str, *, seed: int, num_steps: int, guidance_scale: float | int, run: Run
) -> Iterator[SamplerState]:
    """The states of one sampling, as they come.

    Args:
        pipeline: a `StableDiffusion3Pipeline` with short prompts, such as the bundled one.
        seed: of the first noise, in [0, `MAX_SEED`]. num_steps: in [1, `MAX_STEPS`].
        guidance_scale: in [1, `MAX_GUIDANCE`]; 1 is without guidance, and half the work.
        run: takes each step.

    Raises:
        ScoringError: from `run`.
    """
    device = pipeline._execution_device
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(num_steps, device=device)
    embeds, pooled = run(lambda: _encoded(pipeline, prompt, guidance_scale > 1))
    side = pipeline.default_sample_size
    latents = torch.randn(
        (1, pipeline.transformer.config.in_channels, side, side),
        generator=torch.Generator().manual_seed(seed),
        dtype=embeds.dtype,
    ).to(device)

    @torch.no_grad()
    def step(number: int, noisy: Tensor) -> tuple[SamplerState, Tensor]:
        rows, timestep = len(embeds), scheduler.timesteps[number]
        velocity = pipeline.transformer(
            hidden_states=noisy.expand(rows, -1, -1, -1),
            timestep=timestep.expand(rows),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        if rows == 2:
            without, conditional = velocity.chunk(2)
            velocity = without + guidance_scale * (conditional - without)
        sigma = scheduler.sigmas[number].to(device)
        clean = clean_and_noise(noisy, velocity, sigma[None]).clean
        state = SamplerState(number, float(sigma), timestep[None], noisy, clean)
        return state, scheduler.step(velocity, timestep, noisy, return_dict=False)[0]

    for number in range(num_steps):
        state, latents = run(lambda number=number, noisy=latents: step(number, noisy))
        yield state


@torch.no_grad()
def _encoded(pipeline: Any, prompt: str, guided: bool) -> tuple[Tensor, Tensor]:
    """Embeddings of the prompt, after those of the empty prompt where there is guidance."""
    embeds, empty, pooled, empty_pooled = pipeline.encode_prompt(
        prompt,
        None,
        None,
        device=pipeline._execution_device,
        do_classifier_free_guidance=guided,
        max_sequence_length=MAX_TOKENS,
    )
    return (torch.cat([empty, embeds]), torch.cat([empty_pooled, pooled])) if guided else (embeds, pooled)


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
