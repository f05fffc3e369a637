"""What a step trains on, made on threads while the steps before are computed."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from dina_lrm.core.noise import NoiseSchedule, seeded_noise
from dina_lrm.data.latents import PairBatch
from dina_lrm.data.order import first_occurrences
from dina_lrm.data.shards.read import PairSet
from dina_lrm.training.config import TrainConfig
from dina_lrm.training.step import draw_step

__all__ = ["AHEAD", "StepLoader", "StepPart", "step_parts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPart:
    """The pairs that one process scores in one forward, with their noise and noise levels."""

    batch: PairBatch
    noise: Tensor
    """(pair, channel, *frame, height, width)"""
    sigma: Tensor
    """(level, pair), matched to the backbone's table."""

    def to(self, device: torch.device) -> "StepPart":
        return StepPart(
            batch=self.batch.to(device),
            noise=self.noise.to(device, non_blocking=True),
            sigma=self.sigma.to(device, non_blocking=True),
        )


def step_parts(
    config: TrainConfig,
    pairs: PairSet,
    schedule: NoiseSchedule,
    step: int,
    *,
    process: int = 0,
    num_processes: int = 1,
) -> list[StepPart]:
    """The accumulated parts of a step that belong to one process: a function of its arguments alone.

    Part p of process i holds entries (p * num_processes + i) * size and following of the batch, so that the
    same pairs make the same step however it is cut.
    """
    indices = pairs.order(
        step, batch_size=config.batch_size, seed=config.seed, by_prompt=config.group_by_prompt
    )
    draw_of = torch.arange(len(indices))
    if config.group_by_prompt:
        first, group = first_occurrences(pairs.prompt_index[indices])
        draw_of = first[group]
    draws = draw_step(config, step).shared(draw_of)
    sigma = schedule.match(draws.sigma.flatten()).sigma.reshape(draws.sigma.shape)
    size = config.batch_size // (config.accumulation_steps * num_processes)
    parts: list[StepPart] = []
    for part in range(config.accumulation_steps):
        start = (part * num_processes + process) * size
        rows = slice(start, start + size)
        batch = pairs.batch(indices[rows], draws=draw_of[rows])
        noise = seeded_noise(tuple(batch.latents_chosen.shape[1:]), draws.noise_seeds[rows])[0]
        parts.append(StepPart(batch=batch, noise=noise, sigma=sigma[:, rows]))
    return parts


AHEAD = 2
"""Steps that are made while the caller works on one."""


class StepLoader:
    """Parts of one step after the other; those of the next steps are made while the caller works on this
    one's.

    Since a step's parts are a function of its number, nothing has to be stored to go on at any step.
    """

    def __init__(self, make: Callable[[int], list[StepPart]], num_steps: int) -> None:
        self.make, self.num_steps = make, num_steps
        self.pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="loader")
        self.made: dict[int, Future[list[StepPart]]] = {}
        self.waited_seconds = 0.0
        """Time that the caller spent waiting, since this was last set to 0."""

    def __enter__(self) -> "StepLoader":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def parts(self, step: int) -> list[StepPart]:
        """Parts of a step, on the CPU."""
        start = time.perf_counter()
        wanted = range(step, min(step + AHEAD + 1, self.num_steps))
        self.made = {one: self.made.get(one) or self.pool.submit(self.make, one) for one in wanted}
        parts = self.made.pop(step).result()
        self.waited_seconds += time.perf_counter() - start
        return parts
