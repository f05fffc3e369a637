"""Aspect buckets: one size for both sides of a pair, and an order of batches that is a pure function."""

import numpy as np
import pytest
import torch

from dina_lrm.data.buckets import BucketOrder, pair_bucket, place
from dina_lrm.images import fit, fitted_size


def picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(height * width))


def test_the_bucket_does_not_depend_on_which_side_won() -> None:
    sizes = [(64, 64), (64, 96), (96, 64), (32, 128)]
    for first in sizes:
        for second in sizes:
            assert pair_bucket(first, second) == pair_bucket(second, first)
            assert np.prod(pair_bucket(first, second)) == min(np.prod(first), np.prod(second))


@pytest.mark.parametrize("size", [(64, 64), (70, 45), (33, 100), (31, 17)])
def test_a_picture_in_its_own_bucket_is_what_scoring_encodes(size: tuple[int, int]) -> None:
    """Even where rounding the sides down changes the aspect ratio by more than 5 %."""
    image = picture(*size)
    own = fitted_size(*size, multiple=16)
    assert torch.equal(place(image, own, own), fit(image, multiple=16))


def test_another_aspect_ratio_is_padded_evenly_with_grey() -> None:
    """A square of 64 in a bucket of 32 x 64: scaled to 32 x 32, with 16 columns of grey on either side."""
    placed = place(torch.ones(3, 64, 64), (32, 64), (64, 64))
    assert placed.shape == (3, 32, 64)
    assert torch.equal(placed[..., :16], torch.full((3, 32, 16), 0.5))
    assert torch.equal(placed[..., 48:], torch.full((3, 32, 16), 0.5))
    assert torch.equal(placed[..., 16:48], torch.ones(3, 32, 32))


# --- order


def layout(sizes: list[int], per_group: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Bucket and row group of each pair, buckets one after the other."""
    buckets = np.repeat(np.arange(len(sizes)), sizes)
    groups, start = [], 0
    for size in sizes:
        groups.append(start + np.arange(size) // per_group)
        start += -(-size // per_group)
    return buckets, np.concatenate(groups)


def order(sizes: list[int], **options: object) -> BucketOrder:
    settings: dict[str, object] = {"batch_size": 4, "seed": 0, "window": 3}
    return BucketOrder(*layout(sizes), **settings | options)  # type: ignore[arg-type]


def test_every_batch_is_whole_and_of_one_bucket() -> None:
    buckets, _ = layout([37, 11, 3])
    batches = order([37, 11, 3])
    for step in range(60):
        indices = batches(step)
        assert len(indices) == 4
        assert len(set(buckets[indices.numpy()])) == 1


@pytest.mark.parametrize("sizes", [[40], [37, 11, 3], [1, 200]])
def test_every_pair_is_drawn_equally_often_in_the_long_run(sizes: list[int]) -> None:
    """After s steps of 4 a bucket with a share q of n pairs has had between s q - 1 and s q + 1 + batches of
    the others' rounding: every pair has been drawn 4 s / n times, give or take two epochs' ends."""
    batches, steps, total = order(sizes), 400, sum(sizes)
    counts = np.zeros(total)
    for step in range(steps):
        np.add.at(counts, batches(step).numpy(), 1)
    expected = 4 * steps / total
    slack = 2 + 4 * (len(sizes) + 1) / min(sizes)
    assert np.abs(counts - expected).max() <= slack


def test_each_epoch_of_a_bucket_holds_every_pair_once() -> None:
    batches = order([40])
    drawn = torch.cat([batches(step) for step in range(30)]).reshape(3, 40)
    for epoch in drawn:
        assert epoch.sort().values.tolist() == list(range(40))
    assert drawn[0].tolist() != drawn[1].tolist()


def test_a_small_bucket_fills_a_batch_with_copies() -> None:
    """Of two pairs, batches of 8 hold four copies each; that happens as seldom as its share of all pairs."""
    buckets, _ = layout([38, 2])
    batches = order([38, 2], batch_size=8)
    drawn = [batches(step).numpy() for step in range(200)]
    small = [pairs for pairs in drawn if buckets[pairs[0]] == 1]
    assert all(np.bincount(pairs, minlength=40)[38:].tolist() == [4, 4] for pairs in small)
    assert 9 <= len(small) <= 11


def test_order_is_a_function_of_seed_and_step_only() -> None:
    forward = [order([37, 11, 3])(step).tolist() for step in range(40)]
    batches = order([37, 11, 3])
    far = batches(5000)  # a longer schedule is made first
    assert [batches(step).tolist() for step in range(40)] == forward
    assert torch.equal(order([37, 11, 3])(5000), far)
    assert [order([37, 11, 3], seed=1)(step).tolist() for step in range(40)] != forward


def test_a_window_of_row_groups_is_read_before_the_next() -> None:
    """48 pairs in 12 row groups, windows of 3: the first 12 pairs of an epoch come from 3 row groups."""
    _, groups = layout([48])
    batches = order([48])
    for window in range(4):
        pairs = torch.cat([batches(step) for step in range(3 * window, 3 * window + 3)])
        assert len(set(groups[pairs.numpy()])) == 3


def test_prompts_stay_together_within_a_window() -> None:
    prompts = np.arange(48) // 2
    pairs = order([48], groups=prompts, batch_size=12, window=12)
    drawn = torch.cat([pairs(step) for step in range(4)]).numpy()
    batches = prompts[drawn].reshape(4, 12)
    assert [len(set(batch)) for batch in batches] == [6, 6, 6, 6]
