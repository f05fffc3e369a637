"""Accuracy at several noise levels while training, and what it is measured on.

Validation sees the same pairs and the same noise every time (the reference draws fresh noise), so two numbers
of one run differ by the weights alone.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float, Int64
from torch import Tensor

from dina_lrm.core.noise import seeded_noise, torch_seed
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.data.shards.read import PairSet
from dina_lrm.training.step import PairScorer

__all__ = [
    "Levels",
    "ValidationMargins",
    "accuracy",
    "fixed_sample",
    "levels_label",
    "validation_margins",
]

Levels = tuple[float, ...]
"""One noise level, or several that make a token-level ensemble."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationMargins:
    """What validation pairs were scored; the order of the pairs depends on the number of processes."""

    by_levels: dict[Levels, Float[Tensor, " pair"]]
    """score_chosen - score_rejected of every candidate."""
    target: Float[Tensor, " pair"]
    prompt: Int64[Tensor, " pair"]
    """Number of each pair's prompt."""

    @property
    def accuracy(self) -> dict[Levels, float]:
        """Accuracy of every candidate."""
        return {levels: accuracy(margin, self.target) for levels, margin in self.by_levels.items()}


@torch.no_grad()
def validation_margins(
    scorer: PairScorer,
    pairs: PairSet,
    candidates: Sequence[Levels],
    *,
    accelerator: Accelerator,
    precision: Callable[[], AbstractContextManager[None]],
    batch_size: int,
    seed: int,
) -> ValidationMargins:
    """Margins of every candidate on pairs that are spread over the devices.

    Args:
        scorer: not wrapped by DDP, its model in evaluation mode.
        precision: the context of a forward pass.
        seed: of the noise, which follows from it and the prompt, so that an image is scored once.
    """
    device = accelerator.device
    schedule = scorer.model.schedule
    matched = [tuple(schedule.match(torch.tensor(candidate)).sigma.tolist()) for candidate in candidates]
    own = torch.arange(len(pairs))[accelerator.process_index :: accelerator.num_processes]
    margins: dict[Levels, list[float]] = {candidate: [] for candidate in candidates}
    targets: list[float] = []
    prompt_of: list[int] = []
    parts = list(pairs.parts(own, batch_size))
    repeats: list[Tensor] = []
    if accelerator.is_fsdp2:  # weights are gathered in every forward, so all processes need as many of them
        most = max(gather_object([len(parts)]))
        repeats = [torch.arange(1)] * (most - len(parts))
    for index, rows in enumerate([*parts, *repeats]):
        prompts = pairs.prompt_index[rows]
        batch = pairs.batch(rows, draws=prompts).to(device)
        shape = tuple(batch.latents_chosen.shape[1:])
        seeds = [torch_seed(mix_seeds(seed, Stream.VALIDATION_NOISE, prompt)) for prompt in prompts.tolist()]
        noise = seeded_noise(shape, seeds)[0].to(device)
        with precision():
            found = scorer.margins(batch, noise, matched)
        if index < len(parts):
            targets += batch.target.tolist()
            prompt_of += prompts.tolist()
            for candidate, margin in zip(candidates, found, strict=True):
                margins[candidate] += margin.tolist()
    gathered = gather_object([(margins, targets, prompt_of)])
    return ValidationMargins(
        by_levels={
            candidate: torch.tensor([m for part, _, _ in gathered for m in part[candidate]])
            for candidate in candidates
        },
        target=torch.tensor([target for _, part, _ in gathered for target in part]),
        prompt=torch.tensor([prompt for _, _, part in gathered for prompt in part]),
    )


def accuracy(margin: Tensor, target: Tensor) -> float:
    """Strict, as in `evaluation.metrics`: equal scores are wrong, pairs on which raters split do not count.

    >>> accuracy(torch.tensor([1.0, 0.0, -1.0, -1.0, 5.0]), torch.tensor([1.0, 1.0, 1.0, 0.2, 0.5]))
    0.5
    """
    counted = target != 0.5
    right = ((margin > 0) == (target > 0.5)) & (margin != 0)
    return right[counted].double().mean().item() if bool(counted.any()) else float("nan")


def fixed_sample(pairs: PairSet, num: int, *, seed: int) -> PairSet:
    """At most `num` pairs, always the same ones, in their order."""
    if len(pairs) <= num:
        return pairs
    generator = torch.Generator().manual_seed(mix_seeds(seed, Stream.VALIDATION_SAMPLE))
    return pairs.subset(torch.randperm(len(pairs), generator=generator)[:num].sort().values)


def levels_label(levels: Levels) -> str:
    """How a candidate is called in metrics.

    >>> levels_label((0.2, 0.5))
    '0.2+0.5'
    """
    return "+".join(f"{level:g}" for level in levels)
