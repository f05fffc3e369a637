"""The losses by which a generator learns from a reward; pure functions of scores and log-probabilities.

Every gradient is that of the formula in the docstring. Scores are higher for better, advantages have no unit.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dina_lrm.core.tensors import Latents, Score

__all__ = [
    "ClippedLoss",
    "Groups",
    "clipped_policy_loss",
    "diffusion_dpo_loss",
    "group_advantages",
    "normalised_log_ratio",
    "reward_groups",
    "step_dpo_loss",
]


class Groups(NamedTuple):
    """The rewards of each prompt's samples, about their mean."""

    centred: Float[Tensor, "prompt sample"]
    """r - mean of the prompt; exactly 0 where a prompt's rewards are equal."""
    std: Float[Tensor, " prompt"]
    """Standard deviation of the population."""
    resolution: Float[Tensor, " prompt"]
    """Smallest relative step of the rewards' dtype, times the largest reward of the prompt."""

    @property
    def flat(self) -> Bool[Tensor, " prompt"]:
        """Prompts whose rewards differ by no more than their resolution: nothing can be learned from them."""
        return self.std <= self.resolution


def reward_groups(rewards: Float[Tensor, "prompt sample"]) -> Groups:
    """Rewards about the mean of their prompt, in float32 or wider.

    What is left of 24 rewards of 1000.1 less their mean is the rounding of that mean, so the first reward is
    taken off before it.

    >>> reward_groups(torch.tensor([[1.0, 3.0], [1000.1, 1000.1]])).flat
    tensor([False,  True])
    """
    wide = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    shifted = wide - wide[:, :1]
    centred = shifted - shifted.mean(dim=1, keepdim=True)
    resolution = torch.finfo(rewards.dtype).eps * wide.abs().amax(dim=1)
    return Groups(centred, centred.square().mean(dim=1).sqrt(), resolution)


def group_advantages(
    rewards: Float[Tensor, "prompt sample"],
    *,
    over: Literal["group", "batch", "uncentred"] = "group",
    limit: float | None = None,
    eps: float = 1e-4,
) -> Float[Tensor, "prompt sample"]:
    """(r - mean of the prompt) / (std + eps), times max(0, 1 - (resolution / std)^2).

    The last factor is the share of a prompt's variance that the rounding of its rewards does not explain: 1
    for rewards that differ, and exactly 0 for those that differ by less than their dtype can tell at their
    size, which would otherwise be blown up to differences of a whole standard deviation.

    Args:
        rewards: in the precision that they were computed in.
        over: "group" divides by each prompt's own standard deviation, "batch" by that of all centred rewards,
            so that groups that hardly differ count less, "uncentred" by that of all rewards as they are, the
            "global std" of Flow-GRPO's code, where prompts of unlike difficulty make advantages small.
        limit: advantages are clipped to +- limit.

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
    centred, std, resolution = groups = reward_groups(rewards)
    match over:
        case "group":
            scale = std
        case "batch":
            scale = centred.square().mean().sqrt().expand_as(std)
        case "uncentred":
            scale = rewards.to(centred).std(correction=0).expand_as(std)
    known = 1.0 - (resolution / std).square()
    weight = torch.where(groups.flat, torch.zeros_like(std), known / (scale + eps))
    advantages = centred * weight[:, None]
    return advantages if limit is None else advantages.clamp(-limit, limit)


class ClippedLoss(NamedTuple):
    """A policy loss, and how it came about."""

    loss: Score
    """Loss of each sample, to be averaged."""
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
    target: Score,
    *,
    beta: float,
) -> Score:
    """-y log sigmoid(x) - (1 - y) log sigmoid(-x) of each pair (conservative DPO), with
    x = -beta/2 [ (e+ - e+_ref) - (e- - e-_ref) ].

    The gradient in x is sigmoid(x) - y: a pair with y = 1 pushes x up without end, one of divided votes to
    where sigmoid(x) = y, and a tie, y = 1/2, back to x = 0, where policy and reference agree.

    Args:
        chosen_error, ...: squared error of the network's prediction for both sides at the same noise sample
            and level, averaged over elements.
        target: y, the probability that chosen is preferred, in [0, 1]; 1 is Diffusion-DPO.
        beta: strength of the reference; published values, 2000 to 5000, are for averages.

    By hand: equal errors of policy and reference give log 2, whatever the target.

    >>> e = torch.tensor([0.3])
    >>> round(diffusion_dpo_loss(e, e, e, e, torch.tensor([1.0]), beta=2000.0).item(), 6)
    0.693147

    Source: arXiv:2311.12908, equation 14; the target as in conservative DPO (E. Mitchell, "A note on DPO with
    noisy preferences", 2023, equation 3).
    """
    ours = chosen_error - rejected_error
    theirs = reference_chosen_error - reference_rejected_error
    x = -0.5 * beta * (ours - theirs)
    return -target * F.logsigmoid(x) - (1.0 - target) * F.logsigmoid(-x)


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
