"""Aspect buckets: pairs whose latents have one shape, and the order in which batches are drawn from them.

A bucket is a picture size in pixels. A picture alone belongs to the size that scoring encodes it at
(`pictures.fitted_size`), so its prepared latent is the one that scoring would see. Both sides of a pair get
the
same noise and therefore need the same size: `pair_bucket` says which, `place` how a picture of another shape
comes into it.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dina_lrm.images import resized

__all__ = ["BucketOrder", "Size", "pair_bucket", "place"]

Size = tuple[int, int]
"""Height and width, in pixels."""

ASPECT_TOLERANCE = math.log(1.05)
"""Pictures whose aspect ratios differ by less are scaled into a bucket as they are."""
PADDING = 0.5
"""Mid-grey, which is 0 in the VAE's input."""


def pair_bucket(first: Size, second: Size) -> Size:
    """The size at which both sides of a pair are encoded: that of the side with fewer pixels.

    The rule knows nothing of which side won, and enlarges neither.

    >>> pair_bucket((1024, 1024), (768, 1344)), pair_bucket((512, 512), (1024, 1024))
    ((768, 1344), (512, 512))
    """
    return min(first, second, key=lambda size: (size[0] * size[1], size))


def needs_padding(size: Size, bucket: Size) -> bool:
    """Whether a picture's aspect ratio differs from the bucket's by 5 % or more.

    >>> needs_padding((1024, 1024), (768, 1344)), needs_padding((1080, 1920), (768, 1360))
    (True, False)
    """
    return abs(math.log(size[0] / size[1]) - math.log(bucket[0] / bucket[1])) >= ASPECT_TOLERANCE


def place(picture: Tensor, bucket: Size, own: Size) -> Tensor:
    """A picture (3, height, width) at the size of the bucket.

    Where the aspect ratios nearly agree it is scaled, as in scoring. Otherwise it is scaled to lie inside and
    padded evenly with mid-grey: nothing is cut off and nothing distorted.

    Args:
        own: the size at which the picture would be encoded alone.
    """
    if not needs_padding(own, bucket):
        return resized(picture, *bucket)
    size = int(picture.shape[-2]), int(picture.shape[-1])
    scale = min(bucket[0] / size[0], bucket[1] / size[1])
    height, width = (
        max(1, min(limit, round(side * scale))) for side, limit in zip(size, bucket, strict=True)
    )
    top, left = (bucket[0] - height) // 2, (bucket[1] - width) // 2
    around = (left, bucket[1] - width - left, top, bucket[0] - height - top)
    return F.pad(resized(picture, height, width), around, value=PADDING)


# --- order -------------------------------------------------------------------------------------------------


class BucketOrder:
    """Which pairs are in the batch of a step, when every batch has to come from one bucket.

    A pure function of (seed, step): the same on every machine, whoever reads it and however it is cut.

    Every bucket is an endless stream of its own epochs, each holding every pair of the bucket once, in an
    order of its own; its k-th batch is entries k * batch_size and following of that stream. Buckets take
    turns in proportion to their size: batch k of a bucket with a share q of all pairs is due at time
    (k + u) / q with a random start u in [0, 1), and step s is the s-th batch in order of time. So each pair
    is drawn equally often in the long run, whatever the size of its bucket, and no batch is ever short.

    A batch from a bucket of fewer pairs holds each of them several times, under noise of their own. Short
    batches instead would either draw rare shapes less often than others, or give them most of the steps: of
    1,000 pairs with 50 shapes of one pair each, and batches of 96, 50 steps an epoch against 10 for the rest,
    where here it is one step in two epochs. They would also leave some of several processes without a pair.

    Within an epoch row groups are shuffled, and the pairs of every `window` consecutive row groups among
    themselves: a reader then goes through the files once per epoch, a few row groups at a time. With `groups`
    (prompts), pairs of one group stay together where they are in the same window.

    Args:
        bucket: (pair,) bucket of each pair.
        row_group: (pair,) row group of each pair; the pairs of one are in one bucket.
        groups: (pair,) or None.
    """

    def __init__(
        self,
        bucket: np.ndarray,
        row_group: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        window: int = 8,
        groups: np.ndarray | None = None,
    ) -> None:
        self.batch_size, self.seed, self.window, self.groups = batch_size, seed, window, groups
        self.row_group = row_group
        self.members = [np.flatnonzero(bucket == one) for one in np.unique(bucket)]
        self._epoch = functools.lru_cache(maxsize=2 * len(self.members) + 2)(self._compute_epoch)
        self._schedule = functools.lru_cache(maxsize=1)(self._compute_schedule)

    def __call__(self, step: int) -> Tensor:
        """Indices of the pairs of a step: int64 (batch,), ordered by row group."""
        horizon = 1 << max(10, (step + 1).bit_length())
        buckets, turns = self._schedule(horizon)
        one, turn = int(buckets[step]), int(turns[step])
        size, start = len(self.members[one]), turn * self.batch_size
        stop = start + self.batch_size
        parts = [
            self._epoch(one, epoch)[max(start - epoch * size, 0) : stop - epoch * size]
            for epoch in range(start // size, (stop - 1) // size + 1)
        ]
        pairs = np.concatenate(parts)
        return torch.from_numpy(pairs[np.argsort(self.row_group[pairs], kind="stable")])

    def _generator(self, *parts: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *parts])

    def _compute_schedule(self, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """Bucket and turn of the first `horizon` steps."""
        shares = np.array([len(member) for member in self.members], dtype=np.float64)
        shares /= shares.sum()
        starts = self._generator(0).random(len(shares))
        counts = np.ceil((horizon + len(shares)) * shares).astype(np.int64) + 1
        buckets = np.repeat(np.arange(len(shares)), counts)
        turns = np.concatenate([np.arange(count) for count in counts])
        due = (turns + starts[buckets]) / shares[buckets]
        order = np.lexsort((buckets, due))[:horizon]
        return buckets[order], turns[order]

    def _compute_epoch(self, one: int, epoch: int) -> np.ndarray:
        """The pairs of a bucket in the order of one epoch."""
        pairs = self.members[one]
        generator = self._generator(1, one, epoch)
        groups, which = np.unique(self.row_group[pairs], return_inverse=True)
        window = generator.permutation(len(groups))[which] // self.window
        if self.groups is None:
            return pairs[np.lexsort((generator.random(len(pairs)), window))]
        prompts, prompt = np.unique(self.groups[pairs], return_inverse=True)
        return pairs[np.lexsort((np.arange(len(pairs)), generator.random(len(prompts))[prompt], window))]


def same_bucket(bucket: np.ndarray, pairs: Tensor, batch_size: int) -> Sequence[Tensor]:
    """The same pairs in parts of at most `batch_size`, each of one bucket."""
    own = bucket[pairs.numpy()]
    return [part for one in np.unique(own) for part in pairs[torch.from_numpy(own == one)].split(batch_size)]
