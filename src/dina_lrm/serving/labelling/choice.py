"""Which pair a rater sees next, and which picture on the left: pure functions of counts and a seed."""

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["next_pairs", "rater_order"]


def rater_order(seed: int, rater: str, num_pairs: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What chance decides for one rater: the order among equals, and whether `a` stands on the left.

    Returns:
        (pair,) numbers in [0, 1), smaller ones first; (pair,) booleans. They depend on seed and name alone,
        upper and lower case being the same.
    """
    digest = hashlib.blake2b(f"{seed}\0{rater.casefold()}".encode(), digest_size=16).digest()
    rng = np.random.default_rng(int.from_bytes(digest))
    return rng.random(num_pairs), rng.random(num_pairs) < 0.5


def next_pairs(
    *,
    seen: NDArray[np.bool_],
    votes: NDArray[np.int64],
    shown: NDArray[np.int64],
    wanted: int,
    probability: NDArray[np.float64] | None,
    chance: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Pairs for a rater, the one to show first in front.

    Fewest votes come first, then the pairs on which the reward is least sure, |P(a preferred) - 0.5| being
    smallest, then chance. Pairs that the reward has not been asked about yet stand behind those it has.

    Args:
        seen: (pair,) the rater has answered or skipped it: not shown again.
        votes: (pair,) by the others; pairs with `wanted` votes are not shown.
        shown: (pair,) others who are looking at it now. Counted like votes in the order, but it ends nothing:
            they may leave without an answer.
        wanted: votes that each pair should get.
        probability: (pair,) in [0, 1], NaN where unknown; None leaves the order to chance.
        chance: (pair,) from `rater_order`.

    By hand: pair 0 has a vote, pair 1 is decided at 0.9, pair 2 open at 0.4, pair 3 unknown, pair 4 seen.

    >>> next_pairs(
    ...     seen=np.array([False, False, False, False, True]),
    ...     votes=np.array([1, 0, 0, 0, 0]),
    ...     shown=np.zeros(5, dtype=np.int64),
    ...     wanted=2,
    ...     probability=np.array([0.5, 0.9, 0.4, np.nan, 0.5]),
    ...     chance=np.zeros(5),
    ... ).tolist()
    [2, 1, 3, 0]
    """
    doubt = np.zeros(len(seen)) if probability is None else np.abs(probability - 0.5)
    doubt = np.where(np.isnan(doubt), np.inf, doubt)
    order = np.lexsort((chance, doubt, votes + shown))  # the last key counts most
    return order[(~seen & (votes < wanted))[order]]
