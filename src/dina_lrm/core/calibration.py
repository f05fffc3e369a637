"""How a margin between two scores becomes a probability that can be trusted.

Training fixes the scale of scores only through the likelihood, and an over-trained or averaged model is too
sure or not sure enough. One number, fitted on pairs that were not trained on, repairs it:

    P(chosen preferred) = Phi( (s_chosen - s_rejected) / scale )

It cannot change which side wins, only how surely.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportAttributeAccessIssue=false
# (SciPy is not annotated)

import math

from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

from dina_lrm.core.likelihood import log_normal_cdf, negative_log_likelihood

__all__ = ["better_than_chance", "determined_scale", "fit_scale"]

_LOG_SCALE_BOUNDS = (math.log(1e-3), math.log(1e3))
CHANCE = 0.01
"""Probability at which a coin is taken for a reward. Small, since the best of several candidates is tested.
"""


def better_than_chance(num_right: int, num_pairs: int) -> bool:
    """Whether so many right out of so many pairs are more than a coin would get (exact binomial test).

    >>> better_than_chance(34, 50), better_than_chance(9, 10), better_than_chance(0, 0)
    (True, False, False)
    """
    from scipy.stats import binomtest  # here, since scipy.stats is slow to load

    return num_pairs > 0 and bool(binomtest(num_right, num_pairs, alternative="greater").pvalue <= CHANCE)


def determined_scale(margins: Float[Tensor, " pair"], target: Float[Tensor, " pair"]) -> float | None:
    """`fit_scale`, or None where the pairs do not determine it.

    The likelihood has its highest value at scale 0 when every vote is on the side of the higher score, and at
    infinity when margins point the wrong way on the whole: sum over pairs of margin (2 target - 1) <= 0.

    >>> import torch
    >>> determined_scale(torch.ones(3), torch.ones(3)), determined_scale(-torch.ones(3), torch.ones(3))
    (None, None)
    """
    margin, side = margins.detach().double().cpu(), 2 * target.detach().double().cpu() - 1
    surprising = (margin * side < margin.abs()).any()  # some vote against the higher score
    if not bool(surprising) or float((margin * side).sum()) <= 0:
        return None
    scale = fit_scale(margins, target)
    low, high = (math.exp(bound) for bound in _LOG_SCALE_BOUNDS)
    return scale if 1.01 * low < scale < 0.99 * high else None


def fit_scale(margins: Float[Tensor, " pair"], target: Float[Tensor, " pair"]) -> float:
    """The spread of score differences that gives the observed votes their highest likelihood under probit.

    Args:
        margins: score_chosen - score_rejected.
        target: share of votes for `chosen`.

    Returns:
        A positive number in score units, within [1e-3, 1e3]: perfectly separated pairs have their optimum at
        0, and pairs whose margins point the wrong way have it at infinity.

    By hand: margins of +1 that win three times in four want Phi(1 / scale) = 3/4, so scale = 1 / 0.6745.

    >>> import torch
    >>> round(fit_scale(torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.0])), 4)
    1.4826
    """
    margin, y = margins.detach().double().cpu(), target.detach().double().cpu()
    if margin.numel() == 0:
        raise ValueError("a scale cannot be fitted to no pairs")

    def loss(log_scale: float) -> float:
        z = margin * math.exp(-log_scale)
        return negative_log_likelihood(log_normal_cdf(z), log_normal_cdf(-z), y).mean().item()

    # Convex in 1 / scale, hence one valley in the logarithm too.
    optimum = minimize_scalar(loss, bounds=_LOG_SCALE_BOUNDS, method="bounded", options={"xatol": 1e-6})
    return math.exp(float(optimum.x))
