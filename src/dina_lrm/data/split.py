"""Setting pairs aside to measure on, so that no prompt and no picture is in both parts.

Pairs that share a prompt or a picture are connected, also through other pairs, and a connected group stays
together. Both `dina-lrm prepare --test-fraction` and the validation pairs of a training run are cut here.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.pairs import ImageSource, Reject, StoredLatent, image_name
from dina_lrm.errors import InvalidInputError

__all__ = ["SourcePart", "fold_prompt", "held_out", "split_source"]


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


# --- a source, before anything is encoded ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class SourcePart:
    """Which of the comparisons and rejects that a source gives belong to a part."""

    name: str
    fraction: float
    """That the split was made with."""
    seed: int
    keep: NDArray[np.bool_]
    """(item,) in the order of the source."""

    def __len__(self) -> int:
        return int(self.keep.sum())

    def of(self, stream: Iterable[Comparison | Reject]) -> Iterator[Comparison | Reject]:
        """The part of the source's stream."""
        return (item for item, kept in zip(stream, self.keep, strict=True) if kept)

    def settings(self) -> dict[str, Any]:
        """Plain JSON types; another split has others."""
        digest = hashlib.sha256(np.packbits(self.keep).tobytes()).hexdigest()
        return {"name": self.name, "fraction": self.fraction, "seed": self.seed, "digest": digest[:32]}


def split_source(
    stream: Iterable[Comparison | Reject],
    *,
    fraction: float,
    seed: int = 0,
    usable: Callable[[Comparison], bool] = lambda _: True,
) -> dict[str, SourcePart]:
    """The parts "train" and "test" of a source, without a prompt or a picture in common; see `held_out`.

    Prompts are compared as `fold_prompt` gives them, pictures by their content: of files of different size
    only the sizes are read.

    Args:
        fraction: of the usable comparisons, in (0, 1), for "test". Rejects and all others are in "train", so
            both parts together account for everything.
        usable: whether a comparison can become a pair.
    """
    prompts: dict[str, int] = {}
    pictures: dict[bytes | Path, int] = {}
    rows: list[tuple[int, int, int, int]] = []
    num_items = 0
    for num_items, item in enumerate(stream, start=1):
        if isinstance(item, Comparison) and usable(item):
            prompt = prompts.setdefault(fold_prompt(item.pair.prompt), len(prompts))
            sides = [
                pictures.setdefault(_identity(side), len(pictures))
                for side in (item.pair.chosen, item.pair.rejected)
            ]
            rows.append((num_items - 1, prompt, *sides))
    if not rows:
        raise InvalidInputError(f"no pair to split: none of {num_items:,} comparisons can be used")
    index, prompt, chosen, rejected = np.array(rows, dtype=np.int64).T
    same = _one_number_a_content(pictures)
    test = np.zeros(num_items, dtype=bool)
    test[index] = held_out(prompt, same[chosen], same[rejected], fraction=fraction, seed=seed)
    return {
        name: SourcePart(name=name, fraction=fraction, seed=seed, keep=keep)
        for name, keep in (("train", ~test), ("test", test))
    }


def _identity(image: ImageSource) -> bytes | Path:
    """A file, or the digest of what lies in the table."""
    if isinstance(image, Path):
        return image
    content = image.content if isinstance(image, StoredLatent) else image
    return hashlib.sha256(content if isinstance(content, bytes) else image_name(content).encode()).digest()


def _one_number_a_content(pictures: dict[bytes | Path, int]) -> NDArray[np.int64]:
    """Numbers of the pictures, equal where two files hold the same."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for picture in pictures:
        if isinstance(picture, Path):
            by_size[picture.stat().st_size].append(picture)
    numbers = np.arange(len(pictures))
    first: dict[bytes, int] = {}
    for files in by_size.values():
        for file in files if len(files) > 1 else ():
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").digest()
            numbers[pictures[file]] = first.setdefault(digest, pictures[file])
    return numbers
