"""The order of pairs as a pure function of index, seed and epoch, and rows that are equal."""

import functools

import torch
from jaxtyping import Int64
from torch import Tensor

from dina_lrm.core.noise import seeded_generator
from dina_lrm.core.seeds import mix_seeds
from dina_lrm.errors import InvalidInputError

__all__ = ["batch_indices", "distinct_images", "drawn_prompts", "first_occurrences"]


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(mix_seeds(seed, epoch)))


def first_occurrences(values: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first occurrence of each distinct row, and for every row which of these it equals.

    >>> first_occurrences(torch.tensor([7, 7, 3, 7, 3]))
    (tensor([2, 0]), tensor([1, 1, 0, 1, 0]))
    """
    member = values.unique(dim=0, return_inverse=True)[1]
    first = torch.full((int(member.max()) + 1,), len(values))
    return first.scatter_reduce_(0, member, torch.arange(len(values)), "amin"), member


def distinct_images(chosen: Tensor, rejected: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
    """`PairBatch.distinct` and `position` of a batch: an image counts once for each noise draw.

    Args:
        chosen, rejected: number of the image on either side of each pair.
        draws: which draw each pair uses; None: one of its own.
    """
    own = torch.arange(len(chosen)) if draws is None else draws
    return first_occurrences(torch.stack([own.repeat(2), torch.cat([chosen, rejected])], dim=1))


def drawn_prompts(prompt_index: Int64[Tensor, " pair"], fraction: float, seed: int) -> Tensor:
    """Which pairs belong to prompts that are drawn, about `fraction` of all."""
    prompts = prompt_index.unique()
    order = torch.randperm(len(prompts), generator=seeded_generator(seed))
    return torch.isin(prompt_index, prompts[order[: round(fraction * len(prompts))]])


def batch_indices(
    num_pairs: int, batch_size: int, *, seed: int, step: int, groups: Int64[Tensor, " pair"] | None = None
) -> Int64[Tensor, " batch"]:
    """Which pairs are in the batch of `step`: a pure function, the same on every machine and worker.

    Epochs follow one another without a gap, each in an order of its own, so a batch may hold the end of
    one and the start of the next, and every pair is seen exactly once per epoch:
    position p = step * batch_size + i is entry p mod num_pairs of the order of epoch p div num_pairs.
    With `groups`, such as prompts, the groups are shuffled, and the pairs of one stay together.
    """
    if num_pairs < 1:
        raise InvalidInputError("there are no pairs to draw a batch from")

    def epoch_order(epoch: int) -> Tensor:
        if groups is None:
            return _permutation(num_pairs, seed, epoch)
        return _permutation(int(groups.max()) + 1, seed, epoch)[groups].argsort(stable=True)

    start, stop = step * batch_size, (step + 1) * batch_size
    parts = [
        epoch_order(epoch)[max(start - epoch * num_pairs, 0) : stop - epoch * num_pairs]
        for epoch in range(start // num_pairs, (stop - 1) // num_pairs + 1)
    ]
    return torch.cat(parts)
