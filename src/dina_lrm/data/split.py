"""Setting pairs aside to measure on, so that no prompt and no picture is in both parts.

Pairs that share a prompt or a picture are connected, also through other pairs, and a connected group stays
together. Both `dina-lrm prepare --test-fraction` and the validation pairs of a training run are cut here.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dina_lrm.errors import InvalidInputError

__all__ = ["fold_prompt", "held_out"]


def fold_prompt(prompt: str) -> str:
    """A prompt without case, punctuation and repeated spaces: what counts as the same prompt.

    >>> fold_prompt("A red  Circle, on gray.")
    'a red circle on gray'
    """
    return " ".join(re.sub(r"[^\w\s]", " ", prompt.casefold()).split())


def held_out(
    prompts: Sequence[int] | NDArray[np.integer],
    chosen: Sequence[int] | NDArray[np.integer],
    rejected: Sequence[int] | NDArray[np.integer],
    *,
    fraction: float,
    max_pairs: int | None = None,
    seed: int = 0,
) -> NDArray[np.bool_]:
    """Which pairs are set aside, (pair,): whole groups, in an order that follows from `seed`.

    Groups that would exceed what is wanted are passed over, so at most that many pairs are set aside.

    Args:
        prompts: number of each pair's prompt.
        chosen, rejected: number of the picture on either side of each pair.
        fraction: of the pairs, in (0, 1).
        max_pairs: wanted at most, whatever the fraction.

    Raises:
        InvalidInputError: `fraction` is outside (0, 1), or no group is small enough.

    Two pairs of one prompt, and a third that shares a picture with them, are one group:

    >>> held_out([0, 0, 1, 2], [0, 2, 2, 6], [1, 3, 5, 7], fraction=0.25).tolist()
    [False, False, False, True]
    """
    from scipy.sparse import coo_array  # here, since scipy is slow to load
    from scipy.sparse.csgraph import connected_components

    if not 0 < fraction < 1:
        raise InvalidInputError(f"the fraction of pairs to set aside is {fraction}: must be between 0 and 1")
    num_pairs = len(prompts)
    wanted = max(1, round(fraction * num_pairs))
    if max_pairs is not None:
        wanted = min(wanted, max_pairs)
    # One graph with a node a pair, a node a prompt and a node a picture; a pair touches three of them.
    texts, pictures = np.asarray(prompts, dtype=np.int64), np.asarray([chosen, rejected], dtype=np.int64)
    first_picture = num_pairs + int(texts.max(initial=-1)) + 1
    size = first_picture + int(pictures.max(initial=-1)) + 1
    pair = np.tile(np.arange(num_pairs), 3)
    touched = np.concatenate([num_pairs + texts, *(first_picture + pictures)])
    graph = coo_array((np.ones(len(pair), dtype=np.int8), (pair, touched)), shape=(size, size))
    _, label = connected_components(graph, directed=False)
    group, members = np.unique(label[:num_pairs], return_inverse=True, return_counts=True)[1:]
    taken, count = np.zeros(len(members), dtype=bool), 0
    for one in np.random.default_rng(seed).permutation(len(members)):
        if count + members[one] <= wanted:
            taken[one], count = True, count + int(members[one])
    if count == 0 or count == num_pairs:
        raise InvalidInputError(
            f"{num_pairs} pairs cannot be split: shared prompts and pictures connect them into "
            f"{len(members)} group{'s' if len(members) > 1 else ''}, the smallest of "
            f"{int(members.min(initial=num_pairs))} pairs, and {wanted} are wanted"
        )
    return taken[group]
