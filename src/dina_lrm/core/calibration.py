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

__all__ = ["fit_scale"]

_LOG_SCALE_BOUNDS = (math.log(1e-3), math.log(1e3))


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
