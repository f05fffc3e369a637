"""How many views of a pair are enough: a sequential test that stops when the answer is known.

A view is one score of a picture at one noise level with one noise sample; both sides of a pair get the same.
Its margin y_k = mu(sigma_k) + e_k is the pair's own margin at that level plus noise of the draw. Over pairs

    mu ~ N(0, C)        (level, level): pairs differ, and levels see related things
    e_k ~ N(0, n)       of the level; independent from view to view

and what unlimited views would tell is theta = w . mu. Given the margins of k views, theta is Gaussian with a
mean linear in them, `gains[k - 1] . y`, and a standard deviation `deviations[k - 1]` that does not depend on
them. So

* which level is worth most next is known beforehand: the one that leaves the smallest deviation;
* the probability that theta has the sign of its mean is Phi(|mean| / deviation), and it is a martingale in k.
  Stopping as soon as it reaches 1 - alpha, after however many looks, therefore leaves at most alpha of the
  stopped decisions on the wrong side of theta: this is no interval of fixed size that is peeked at again.

The guarantee is as good as the two Gaussians. `controlled_threshold` gives one that assumes neither: on
held-out pairs it takes the smallest bound on |mean| / deviation at which early stops turn at most alpha of
all decisions that the last view would make, with 95 % confidence over the choice of the pairs.

Own work; optional stopping of a martingale: Doob; fixed-sequence testing with exact binomial bounds:
Angelopoulos et al., Learn then Test (arXiv:2110.01052).
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportAttributeAccessIssue=false
# (SciPy is not annotated)

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from scipy.optimize import minimize
from scipy.stats import beta, norm, t
from torch import Tensor

from dina_lrm.core.likelihood import log_normal_cdf, negative_log_likelihood

__all__ = [
    "ViewModel",
    "ViewPlan",
    "controlled_threshold",
    "fit_views",
    "plan_views",
    "stein_draws",
    "stopping_views",
]

THRESHOLDS = tuple(round(4.0 - 0.05 * step, 2) for step in range(81))
"""Candidates of `controlled_threshold`, from never stopping early to always."""
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class ViewModel:
    """How margins of views behave over pairs; in score units."""

    between: Float[Tensor, "level level"]
    """C: covariance of a pair's own margins at the levels."""
    within: Float[Tensor, " level"]
    """n: variance of a view around its pair's own margin."""
    weights: Float[Tensor, " level"]
    """w: what each level counts in theta."""

    @property
    def spread(self) -> float:
        """Standard deviation of theta over pairs."""
        return math.sqrt(float(self.weights @ self.between @ self.weights))


@dataclass(frozen=True, kw_only=True)
class ViewPlan:
    """Views in the order in which they are drawn, and what is known after each."""

    levels: Int64[Tensor, " view"]
    """Which level each view has."""
    gains: Float[Tensor, "view view"]
    """Row k - 1: weights of the first k margins in the mean of theta; 0 beyond."""
    deviations: Float[Tensor, " view"]
    """Standard deviation of theta after each view."""

    def means(self, margins: Float[Tensor, "view pair"]) -> Float[Tensor, "view pair"]:
        """Mean of theta after each view."""
        return self.gains @ margins

    def certainty(self, margins: Float[Tensor, "view pair"]) -> Float[Tensor, "view pair"]:
        """|mean| / deviation after each view: the sign is right with probability Phi of it."""
        return self.means(margins).abs() / self.deviations[:, None]


def fit_views(
    margins: Float[Tensor, "draw level pair"], target: Float[Tensor, " pair"], *, shrinkage: float = 0.01
) -> ViewModel:
    """The view model of held-out pairs.

    Which side is called first must not matter, so second moments are taken about 0. Products of different
    draws give C, since noise cancels in them; what a draw has beyond is n. w is the non-negative combination
    of the levels under which the votes are likeliest, shrunk a little towards equal weights.

    Args:
        margins: of at least two independent noise draws at every level.
        target: share of votes for the first side.
        shrinkage: weight of the pull towards equal weights.

    Raises:
        ValueError: fewer than two draws, or no pairs.
    """
    num_draws, _, num_pairs = margins.shape
    if num_draws < 2 or num_pairs == 0:
        raise ValueError(f"{num_draws} draws of {num_pairs} pairs: at least two draws of one pair are needed")
    y = margins.detach().double().cpu()
    total = y.sum(dim=0)
    own = torch.stack([draw @ draw.T for draw in y]).sum(dim=0)
    between = (total @ total.T - own) / (num_draws * (num_draws - 1) * num_pairs)
    between = (between + between.T) / 2
    values, vectors = torch.linalg.eigh(between)
    floor = 1e-6 * float(values.max().clamp_min(1e-12))
    between = vectors @ torch.diag(values.clamp_min(floor)) @ vectors.T
    within = (y.square().mean(dim=(0, 2)) - between.diagonal()).clamp_min(floor)
    return ViewModel(
        between=between, within=within, weights=_fit_weights(y.mean(dim=0), target.double().cpu(), shrinkage)
    )


def _fit_weights(
    margins: Float[Tensor, "level pair"], target: Float[Tensor, " pair"], shrinkage: float
) -> Float[Tensor, " level"]:
    """Non-negative, summing to 1."""
    scale = float(margins.mean(dim=0).std().clamp_min(1e-12))
    x = margins / scale

    def loss(values: Any) -> tuple[float, list[float]]:
        w = torch.tensor(list(values), dtype=torch.float64, requires_grad=True)
        z = w @ x
        fit = negative_log_likelihood(log_normal_cdf(z), log_normal_cdf(-z), target).mean()
        pull = shrinkage * (w - w.detach().mean()).square().sum()
        (fit + pull).backward()
        assert w.grad is not None
        return (fit + pull).item(), w.grad.tolist()

    start = [1.0 / len(x)] * len(x)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0.0, None)] * len(x))
    weights = torch.tensor(list(found.x), dtype=torch.float64)
    return weights / weights.sum() if float(weights.sum()) > 0 else torch.tensor(start, dtype=torch.float64)


def plan_views(model: ViewModel, num_views: int, *, max_repeats: int | None = None) -> ViewPlan:
    """The first `num_views` views: at each turn the level that leaves theta's deviation smallest.

    Args:
        max_repeats: how often a level may be viewed; None: as often as it is worth most.

    By hand: one level, C = 1, n = 1, w = 1. After k views the variance of theta is 1 / (1 + k), and its mean
    is sum(y) / (1 + k).

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> plan = plan_views(ViewModel(between=one, within=one[0], weights=one[0]), 3)
    >>> [round(float(d) ** 2, 4) for d in plan.deviations], plan.gains[2].tolist()
    ([0.5, 0.3333, 0.25], [0.25, 0.25, 0.25])
    """
    covariance_with_theta = model.between @ model.weights
    prior = float(model.weights @ covariance_with_theta)
    chosen: list[int] = []
    gains = torch.zeros(num_views, num_views, dtype=torch.float64)
    deviations: list[float] = []
    for view in range(num_views):
        best: tuple[float, int, Tensor] | None = None
        for level in range(len(model.weights)):
            if max_repeats is not None and chosen.count(level) >= max_repeats:
                continue
            rows = [*chosen, level]
            own = model.between[rows][:, rows] + torch.diag(model.within[rows])
            along = covariance_with_theta[rows]
            gain = torch.linalg.solve(own, along)
            variance = prior - float(along @ gain)
            if best is None or variance < best[0] - 1e-15:
                best = variance, level, gain
        if best is None:
            raise ValueError(
                f"{num_views} views of {len(model.weights)} levels, each at most {max_repeats} times"
            )
        chosen.append(best[1])
        gains[view, : view + 1] = best[2]
        deviations.append(math.sqrt(max(best[0], 1e-18)))
    return ViewPlan(
        levels=torch.tensor(chosen), gains=gains, deviations=torch.tensor(deviations, dtype=torch.float64)
    )


def stopping_views(
    certainty: Float[Tensor, "view pair"], threshold: float, *, allowed: Sequence[int] | None = None
) -> Int64[Tensor, " pair"]:
    """How many views each pair takes: the first at which the threshold is reached, else all.

    Args:
        allowed: views after which a test may stop; None: any.

    >>> stopping_views(torch.tensor([[0.5, 2.0], [1.7, 0.1], [1.0, 0.1]]), 1.6).tolist()
    [2, 1]
    """
    reached = certainty >= threshold
    reached[-1] = True
    if allowed is not None:
        closed = [view for view in range(len(reached) - 1) if view + 1 not in allowed]
        reached[closed] = False
    return reached.to(torch.int64).argmax(dim=0) + 1


def controlled_threshold(plan: ViewPlan, margins: Float[Tensor, "view pair"], *, error: float) -> float:
    """The smallest threshold whose early stops turn at most `error` of the decisions of all views.

    Thresholds are tried from the largest down; each passes if the exact binomial upper bound (95 %) on the
    share of pairs that stop early on the other side than they would end is at most `error`; the first
    failure ends the search. Testing in a fixed order needs no correction for the number of tests.

    Args:
        margins: of held-out pairs, independent of each other, along the plan.
        error: in (0, 1).
    """
    if not 0 < error < 1:
        raise ValueError(f"error = {error}: must be in (0, 1)")
    means, certainty = plan.means(margins.double()), plan.certainty(margins.double())
    num_pairs, passed = margins.shape[1], math.inf
    for threshold in THRESHOLDS:
        views = stopping_views(certainty, threshold)
        early = means.gather(0, views[None] - 1)[0]
        turned = int((early.sign() != means[-1].sign()).sum())
        bound = 1.0 if turned == num_pairs else float(beta.ppf(CONFIDENCE, turned + 1, num_pairs - turned))
        if bound > error:
            break
        passed = threshold
    return passed


def stein_draws(
    pilot: Float[Tensor, "draw batch"], target_error: float, *, max_draws: int
) -> Int64[Tensor, " batch"]:
    """Draws that each picture needs for a standard error of `target_error`, from a few pilot draws of it.

        N = max( n, ceil( (t / z)^2 s^2 / target_error^2 ) ),    s: of the n pilot draws

    with t and z the 97.5 % points of Student's law (n - 1) and the normal one. The spread is read once and
    the number of draws fixed then, not watched until it happens to look small, so that mean +- 1.96
    target_error over N draws covers the mean over unlimited draws with at least 95 % probability, for
    Gaussian draws of any spread.

    Source: Stein, A two-sample test for a linear hypothesis whose power is independent of the variance
    (1945).

    Args:
        pilot: at least two draws.
        target_error: positive, in score units.
        max_draws: never more than this; where it cuts, the error is larger.

    By hand: pilot draws 0 and 2 have s^2 = 2, and t / z = 12.706 / 1.960 = 6.483: 42.03 x 2 / 4 = 21.01.

    >>> stein_draws(torch.tensor([[0.0], [2.0]]), 2.0, max_draws=64).tolist()
    [22]
    """
    num_pilot = pilot.shape[0]
    if num_pilot < 2 or not target_error > 0:
        raise ValueError(
            f"{num_pilot} pilot draws, target_error = {target_error}: need 2 or more, and a positive one"
        )
    factor = float(t.ppf(0.975, num_pilot - 1) / norm.ppf(0.975))
    wanted = (factor * pilot.double().std(dim=0) / target_error).square().ceil()
    return wanted.clamp(min(num_pilot, max_draws), max_draws).to(torch.int64)
