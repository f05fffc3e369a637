"""The losses by which a generator learns from a reward; pure functions of scores and log-probabilities.

Every gradient is that of the formula in the docstring. Scores are higher for better, advantages have no unit.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dina_lrm.core.tensors import Latents, Score

__all__ = [
    "ClippedLoss",
    "clipped_policy_loss",
    "diffusion_dpo_loss",
    "group_advantages",
    "normalised_log_ratio",
    "step_dpo_loss",
]


def group_advantages(
    rewards: Float[Tensor, "prompt sample"], *, over: str = "group", eps: float = 1e-4
) -> Float[Tensor, "prompt sample"]:
    """(r - mean of the prompt) / (std + eps); a group whose rewards are all equal gets zeros.

    Args:
        over: "group" divides by each prompt's own standard deviation, "batch" by that of all centred rewards
            (Flow-GRPO's global std): groups that hardly differ then count less.

    By hand: rewards 1 and 3 have mean 2 and standard deviation 1 (of the population).

    >>> group_advantages(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), eps=0.0)
    tensor([[-1.,  1.],
            [ 0.,  0.]])

    Raises:
        ValueError: groups of one sample, whose advantage is always 0.

    Source: arXiv:2402.03300 (GRPO); arXiv:2505.05470, equation 4.
    """
    if rewards.shape[1] < 2:
        raise ValueError("a group of one sample has no advantage: at least 2 samples per prompt are needed")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    scale = centred.square().mean(dim=1, keepdim=True).sqrt()
    if over == "batch":
        scale = centred.square().mean().sqrt().expand_as(scale)
    scale = scale + eps
    return torch.where(scale > 0, centred / scale.clamp_min(1e-30), torch.zeros_like(centred))


class ClippedLoss(NamedTuple):
    """A policy loss, and how it came about."""

    loss: Score
    """Of each sample, to be averaged."""
    clipped: Bool[Tensor, " batch"]
    """Where the ratio has left the trusted range, so that the sample pushes no further."""


def clipped_policy_loss(log_ratio: Score, advantages: Score, *, clip_range: float) -> ClippedLoss:
    """max( -A w, -A clip(w, 1 - c, 1 + c) ) with w = exp(log_ratio).

    Its gradient in the log-ratio is -A w where the sample is not clipped, and 0 where it is.

    >>> loss, clipped = clipped_policy_loss(torch.zeros(2), torch.tensor([1.0, -2.0]), clip_range=0.1)
    >>> loss.tolist(), clipped.tolist()
    ([-1.0, 2.0], [False, False])

    Source: arXiv:1707.06347, equation 7.
    """
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return ClippedLoss(torch.maximum(plain, bounded), bounded > plain)


def normalised_log_ratio(
    log_ratio: Score, mean: Latents, old_mean: Latents, std: Float[Tensor, " batch"]
) -> Score:
    """GRPO-Guard's ratio normalisation: std (log w + |m - m_old|^2 / (2 std^2)), averages over elements.

    A log-ratio of Gaussians is on average below 0 by that square and spreads more the smaller the std of the
    step is, so clipping hits steps and signs unequally. What is left here is the product of the drawn noise
    and the change of the mean: centred, and of one size at all steps.

    Source: arXiv:2510.22319, equation 8.
    """
    change = (mean - old_mean).square().flatten(1).mean(dim=1)
    return std * (log_ratio + change / (2.0 * std.square()))


def diffusion_dpo_loss(
    chosen_error: Score,
    rejected_error: Score,
    reference_chosen_error: Score,
    reference_rejected_error: Score,
    *,
    beta: float,
) -> Score:
    """-log sigmoid( -beta/2 [ (e+ - e+_ref) - (e- - e-_ref) ] ) of each pair.

    Args:
        chosen_error, ...: squared error of the network's prediction for both sides at the same noise sample
            and level, averaged over elements.
        beta: strength of the reference; published values, 2000 to 5000, are for averages.

    By hand: equal errors of policy and reference give log 2.

    >>> e = torch.tensor([0.3])
    >>> round(diffusion_dpo_loss(e, e, e, e, beta=2000.0).item(), 6)
    0.693147

    Source: arXiv:2311.12908, equation 14.
    """
    ours = chosen_error - rejected_error
    theirs = reference_chosen_error - reference_rejected_error
    return -F.logsigmoid(-0.5 * beta * (ours - theirs))


def step_dpo_loss(
    chosen_log_prob: Score,
    rejected_log_prob: Score,
    reference_chosen_log_prob: Score,
    reference_rejected_log_prob: Score,
    *,
    beta: float,
) -> Score:
    """-log sigmoid( beta [ (l+ - l+_ref) - (l- - l-_ref) ] ) of each pair of transitions.

    Args:
        chosen_log_prob, ...: of the step taken, under policy and reference (`transitions.gaussian_log_prob`).

    Source: arXiv:2406.04314 (SPO), equation 9; with the winner of the whole trajectory at every step it is
    D3PO, arXiv:2311.13231.
    """
    ours = chosen_log_prob - rejected_log_prob
    theirs = reference_chosen_log_prob - reference_rejected_log_prob
    return -F.logsigmoid(beta * (ours - theirs))
