"""Several noise levels, or several noise draws, for one picture.

Two ways to use K levels. Token level (the paper's): the K token sequences are laid end to end and the head
runs once, so its attention decides which level to trust for which feature. Score level: K separate scores are
averaged. They are different functions, since a softmax over K N tokens is not the mean of K softmaxes over N.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from dina_lrm.core.tensors import Features, Score

__all__ = ["average_levels", "concatenate_levels", "mean_and_standard_error", "unfold_levels"]


def concatenate_levels(levels: Sequence[Features]) -> Float[Tensor, "batch level_token dim"]:
    """One token sequence out of one per noise level, along the token axis.

    Each level must have been adapted with its own conditioning first. The head's attention has no positions,
    so the order of the levels changes nothing.

    >>> concatenate_levels([torch.zeros(2, 96, 32)] * 3).shape
    torch.Size([2, 288, 32])

    Source: arXiv:2602.11146, noise ensembling.
    """
    if not levels:
        raise ValueError("an ensemble needs at least one noise level")
    return torch.cat(list(levels), dim=1)


def unfold_levels(
    features: Float[Tensor, "level_batch token dim"], num_levels: int
) -> Float[Tensor, "batch level_token dim"]:
    """The same from one backbone call over all levels: rows ordered level by level become longer sequences.

    Row `k * batch + i` of the input is sample i at level k.

    >>> unfold_levels(torch.zeros(3 * 2, 96, 32), num_levels=3).shape
    torch.Size([2, 288, 32])
    """
    if num_levels < 1 or features.shape[0] % num_levels:
        raise ValueError(f"{features.shape[0]} rows do not divide into {num_levels} noise levels")
    return rearrange(features, "(level batch) token dim -> batch (level token) dim", level=num_levels)


def average_levels(scores: Float[Tensor, "level batch"]) -> Score:
    """Score-level ensemble: the plain mean over noise levels, in float32 or wider.

    >>> average_levels(torch.tensor([[0.0, 1.0], [1.0, 2.0]]))
    tensor([0.5000, 1.5000])
    """
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).mean(dim=0)


def mean_and_standard_error(scores: Float[Tensor, "draw batch"]) -> tuple[Score, Score | None]:
    """Mean over independent noise draws and its standard error, s / sqrt(n) with the n - 1 variance.

    The error says how far the mean would move under other noise. It does not know how wrong the model is. One
    draw has no spread, hence None.

    By hand: draws 1, 2, 3 have mean 2, variance 1 and standard error 1 / sqrt(3) = 0.5774.

    >>> mean_and_standard_error(torch.tensor([[1.0], [2.0], [3.0]]))
    (tensor([2.]), tensor([0.5774]))
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    num_draws = scores.shape[0]
    if num_draws == 1:
        return scores[0], None
    return scores.mean(dim=0), scores.std(dim=0) / num_draws**0.5
