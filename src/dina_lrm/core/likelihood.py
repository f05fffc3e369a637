"""How likely is a preference, given two scores and the noise level at which they were read?

Log-likelihoods first (noise-calibrated Thurstone, constant Thurstone, Bradley-Terry), then the two losses
built on them (fidelity, negative log-likelihood), then soft labels from votes. docs/method.md derives each
equation.

Departures from the paper and its code. Log-likelihoods here are exact: the 1e-6 that the public training code
adds to the variance and to the probability appears only in the fidelity loss, as `eps`, where it is on by
default so that losses and gradients agree with that code. Labels may be soft. Everything goes through the
logarithm of the normal distribution function, so no margin is too large; the float32 distribution function
itself is 0 below z = -14, and the usual (1 + erf) / 2 already below -5.5.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch.special is not annotated)

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dina_lrm.core.tensors import NoiseLevel, Score, Target, Votes

__all__ = [
    "Likelihood",
    "Loss",
    "bradley_terry_log_likelihood",
    "constant_thurstone_log_likelihood",
    "fidelity_loss",
    "log_normal_cdf",
    "negative_log_likelihood",
    "pairwise_loss",
    "preference_log_likelihood",
    "thurstone_log_likelihood",
    "votes_to_target",
    "win_probability",
]

Likelihood = Literal["thurstone", "thurstone_constant", "bradley_terry", "bradley_terry_margin"]
Loss = Literal["fidelity", "log_likelihood"]

# Below this the gradient of torch's log_ndtr, exp(-(log Phi(z) + z^2 / 2)) / sqrt(2 pi), subtracts two
# numbers of size z^2 / 2: in float32 it is off by 2e-5 at -21 and by a factor of 6 at -1e4.
_FAR_TAIL = -5.0


def log_normal_cdf(z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """log Phi(z) whose value and gradient are right for every finite z, float32 included.

    Same values as `torch.special.log_ndtr`. In the far lower tail it is written through the scaled
    complementary error function, log Phi(z) = log(erfcx(-z / sqrt 2) / 2) - z^2 / 2, whose derivative
    autograd evaluates without cancellation: it is phi(z) / Phi(z), which tends to -z.

    >>> log_normal_cdf(torch.tensor([0.0, -21.38, -1e4]))
    tensor([-6.9315e-01, -2.3254e+02, -5.0000e+07])
    """
    near = torch.special.log_ndtr(z.clamp(min=_FAR_TAIL))
    tail = z.clamp(max=_FAR_TAIL)
    far = torch.log(torch.special.erfcx(-tail / math.sqrt(2)) / 2) - tail.square() / 2
    return torch.where(z >= _FAR_TAIL, near, far)


# -------------------------------------------------------------------------------------------- log-likelihoods


def thurstone_log_likelihood(
    score_chosen: Score, score_rejected: Score, sigma: NoiseLevel, *, slope: float = 2.0, floor: float = 0.05
) -> Float[Tensor, " batch"]:
    """Log-probability that `chosen` is preferred, when both latents were scored at noise level `sigma`.

    Each latent's perceived quality is a Gaussian draw around its score, and a rater keeps the larger
    draw. Noise hides evidence, so the spread v grows with sigma and the same margin counts for less:

        log p = log Phi( (s_chosen - s_rejected) / sqrt(2 v(sigma)) ),   v(sigma) = slope sigma^2 + floor

    Args:
        score_chosen, score_rejected: head outputs; adding a constant to both changes nothing.
        sigma: 0 is clean, 1 is pure noise; one level per pair, shared by its two latents.
        slope, floor: in squared score units, slope >= 0 and floor > 0. slope = 0 is plain probit.

    Returns:
        Nats per pair, at most 0, and -log 2 at zero margin.

    Numerics: float32 or wider; finite, with a finite gradient, for any margin up to 1e18.

    >>> thurstone_log_likelihood(torch.ones(3), torch.zeros(3), torch.tensor([0.0, 0.5, 1.0]))
    tensor([-0.0008, -0.1865, -0.3721])

    Source: arXiv:2602.11146, noise-calibrated Thurstone likelihood; defaults k = 2, clean variance 0.05.
    """
    _check_variance(slope, floor)
    margin = _margin(score_chosen, score_rejected)
    variance = slope * sigma.to(margin.dtype).square() + floor
    return log_normal_cdf(margin / (2 * variance).sqrt())


def constant_thurstone_log_likelihood(
    score_chosen: Score, score_rejected: Score, *, variance: float = 0.5
) -> Float[Tensor, " batch"]:
    """Thurstone's case V with one variance for every noise level: log p = log Phi(margin / sqrt(2 variance)).

    The ablation of the noise-calibrated variance. variance = 0.5 makes it probit regression on the margin.

    >>> constant_thurstone_log_likelihood(torch.ones(1), torch.zeros(1)).exp()
    tensor([0.8413])

    Source: arXiv:2602.11146, ablation with fixed variance.
    """
    _check_variance(0.0, variance)
    return log_normal_cdf(_margin(score_chosen, score_rejected) / math.sqrt(2 * variance))


def bradley_terry_log_likelihood(
    score_chosen: Score, score_rejected: Score, *, margin: float = 0.0
) -> Float[Tensor, " batch"]:
    """Logistic choice: log p = log sigmoid(s_chosen - s_rejected - margin).

    margin > 0 asks the chosen side to lead by that much before the loss relaxes. It is a demand made in
    training and not a belief: with it the probabilities of the two outcomes add up to less than 1.

    >>> bradley_terry_log_likelihood(torch.ones(1), torch.zeros(1)).exp()
    tensor([0.7311])

    Source: Bradley and Terry (1952); margin 1 is the ablation of arXiv:2602.11146's code.
    """
    return torch.nn.functional.logsigmoid(_margin(score_chosen, score_rejected) - margin)


def preference_log_likelihood(
    score_chosen: Score,
    score_rejected: Score,
    sigma: NoiseLevel,
    *,
    likelihood: Likelihood = "thurstone",
    slope: float = 2.0,
    floor: float = 0.05,
    variance: float = 0.5,
    margin: float = 1.0,
) -> Float[Tensor, " batch"]:
    """Log-probability of the observed preference under `likelihood`.

    Args:
        sigma: read only by "thurstone".
        slope, floor: read only by "thurstone".
        variance: read only by "thurstone_constant".
        margin: read only by "bradley_terry_margin".
    """
    match likelihood:
        case "thurstone":
            return thurstone_log_likelihood(score_chosen, score_rejected, sigma, slope=slope, floor=floor)
        case "thurstone_constant":
            return constant_thurstone_log_likelihood(score_chosen, score_rejected, variance=variance)
        case "bradley_terry":
            return bradley_terry_log_likelihood(score_chosen, score_rejected)
        case "bradley_terry_margin":
            return bradley_terry_log_likelihood(score_chosen, score_rejected, margin=margin)


def win_probability(
    margin: Float[Tensor, " batch"],
    sigma: NoiseLevel,
    *,
    likelihood: Likelihood = "thurstone",
    slope: float = 2.0,
    floor: float = 0.05,
    variance: float = 0.5,
) -> Float[Tensor, " batch"]:
    """Probability that the side whose score leads by `margin` is preferred; 1/2 at margin 0.

    Exact: no eps. A model trained with a Bradley-Terry margin is read without it, so that p(m) + p(-m) = 1
    for every likelihood.

    >>> win_probability(torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.4, 0.0, 1.0]))
    tensor([0.5000, 0.9431, 0.5975])
    """
    log_likelihood = preference_log_likelihood(
        margin,
        torch.zeros_like(margin),
        sigma,
        likelihood=likelihood,
        slope=slope,
        floor=floor,
        variance=variance,
        margin=0.0,
    )
    return log_likelihood.exp()


# ----------------------------------------------------------------------------------------------------- losses


def negative_log_likelihood(
    log_likelihood: Float[Tensor, " batch"],
    log_likelihood_reversed: Float[Tensor, " batch"],
    target: Target | None = None,
) -> Float[Tensor, " batch"]:
    """Cross-entropy of the label, in nats per pair: -y log p - (1 - y) log p'.

    Args:
        log_likelihood: log p, that `chosen` is preferred.
        log_likelihood_reversed: log p', that `rejected` is: the same likelihood with the scores swapped.
        target: y, the share of votes for `chosen`; None is a plain label, y = 1.

    >>> half = torch.tensor([0.5]).log()
    >>> negative_log_likelihood(half, half, torch.tensor([0.7]))
    tensor([0.6931])
    """
    if target is None:
        return -log_likelihood
    y = target.to(log_likelihood.dtype)
    return -y * log_likelihood - (1 - y) * log_likelihood_reversed


def fidelity_loss(
    log_likelihood: Float[Tensor, " batch"],
    log_likelihood_reversed: Float[Tensor, " batch"],
    target: Target | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Tensor, " batch"]:
    """One minus the fidelity of predicted and observed outcome.

        1 - sqrt(y (p + eps)) - sqrt((1 - y) (p' + eps))

    With eps = 0 it is the squared Hellinger distance between two coins, in [0, 1]. Its gradient is that of
    the log-likelihood times sqrt(p) / 2 when y = 1, so a pair that the model is sure is labelled wrongly
    stops pulling.

    Args:
        log_likelihood, log_likelihood_reversed, target: as in `negative_log_likelihood`.
        eps: added to both probabilities, as the public training code does; the loss then ends at -eps / 2,
            not 0.

    Numerics: sqrt(p + eps) is formed in the log domain, so p may underflow and eps may be 0.

    >>> fidelity_loss(torch.tensor([0.25]).log(), torch.tensor([0.75]).log(), eps=0.0)
    tensor([0.5000])

    Source: Tsai et al., FRank (SIGIR 2007), adopted by arXiv:2602.11146.
    """
    if eps < 0:
        raise ValueError(f"eps is {eps}; it must be at least 0")
    if target is None:
        return 1 - _root(log_likelihood, eps)
    y = target.to(log_likelihood.dtype)
    return 1 - y.sqrt() * _root(log_likelihood, eps) - (1 - y).sqrt() * _root(log_likelihood_reversed, eps)


def pairwise_loss(
    score_chosen: Score,
    score_rejected: Score,
    sigma: NoiseLevel,
    *,
    likelihood: Likelihood = "thurstone",
    loss: Loss = "fidelity",
    target: Target | None = None,
    slope: float = 2.0,
    floor: float = 0.05,
    variance: float = 0.5,
    margin: float = 1.0,
    eps: float = 1e-6,
) -> Float[Tensor, " batch"]:
    """Training loss of each pair; the trainer averages. Defaults: the paper's fidelity loss,
    noise-calibrated.

    Args:
        sigma: the matched noise level of each pair.
        likelihood, slope, floor, variance, margin: as in `preference_log_likelihood`.
        target: share of votes for `chosen`; None is a plain label.
        eps: read only when loss = "fidelity", where it is added to the variance of the comparison, 2 v, and
            to the probability. The public training code does both; eps = 0 gives the formula as printed.

    >>> scores = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    >>> pairwise_loss(*scores, torch.tensor([0.4, 0.4]))
    tensor([0.6500, 0.0633])
    >>> pairwise_loss(*scores, torch.tensor([0.4, 0.4]), loss="log_likelihood")
    tensor([2.0995, 0.1307])
    """
    half = eps / 2 if loss == "fidelity" else 0.0  # eps on 2 v is eps / 2 on v

    def log_likelihood(first: Score, second: Score) -> Float[Tensor, " batch"]:
        return preference_log_likelihood(
            first,
            second,
            sigma,
            likelihood=likelihood,
            slope=slope,
            floor=floor + half,
            variance=variance + half,
            margin=margin,
        )

    observed = log_likelihood(score_chosen, score_rejected)
    reversed_ = log_likelihood(score_rejected, score_chosen)
    match loss:
        case "fidelity":
            return fidelity_loss(observed, reversed_, target, eps=eps)
        case "log_likelihood":
            return negative_log_likelihood(observed, reversed_, target)


# ------------------------------------------------------------------------------------------------ soft labels


def votes_to_target(votes_chosen: Votes, votes_rejected: Votes, *, pseudo_votes: float = 0.0) -> Target:
    """Share of votes for the chosen side: y = (n_chosen + a) / (n_chosen + n_rejected + 2 a), a =
    pseudo_votes.

    Given independent raters the share is a sufficient statistic, and the cross-entropy against it is the
    log-likelihood of the single votes, divided by their number. pseudo_votes = 0.5 is Jeffreys' prior and
    keeps one unanimous vote from counting as certainty; 0 keeps the plain share.

    >>> votes_to_target(torch.tensor([7, 3]), torch.tensor([3, 0]))
    tensor([0.7000, 1.0000])
    """
    dtype = torch.promote_types(torch.promote_types(votes_chosen.dtype, votes_rejected.dtype), torch.float32)
    chosen = votes_chosen.to(dtype) + pseudo_votes
    rejected = votes_rejected.to(dtype) + pseudo_votes
    total = chosen + rejected
    valid = (chosen >= pseudo_votes) & (rejected >= pseudo_votes) & (total > 0) & total.isfinite()
    if pseudo_votes < 0 or not bool(valid.all()):
        row = int((~valid).to(torch.int64).argmax()) if valid.numel() else 0
        raise ValueError(
            f"votes of pair {row} are {votes_chosen[row].item()} and {votes_rejected[row].item()}, "
            f"pseudo_votes {pseudo_votes}; all must be finite and at least 0, with a positive sum"
        )
    return chosen / total


# -------------------------------------------------------------------------------------------------- internals


def _margin(score_chosen: Score, score_rejected: Score) -> Float[Tensor, " batch"]:
    dtype = torch.promote_types(
        score_chosen.dtype, torch.float32
    )  # bf16 goes up, float64 stays for gradcheck
    return score_chosen.to(dtype) - score_rejected.to(dtype)


def _root(log_probability: Float[Tensor, " batch"], eps: float) -> Float[Tensor, " batch"]:
    """sqrt(p + eps) from log p: the root of p itself has an infinite slope where p underflows to 0."""
    log_eps = torch.full_like(log_probability, math.log(eps) if eps > 0 else -math.inf)
    return (torch.logaddexp(log_probability, log_eps) / 2).exp()


def _check_variance(slope: float, floor: float) -> None:
    if not (slope >= 0 and floor > 0 and math.isfinite(slope + floor)):
        raise ValueError(
            f"variance slope {slope}, floor {floor}: the slope must be at least 0, the floor above 0"
        )
