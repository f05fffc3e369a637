"""How many levels of a pair are enough: a sequential test that stops when the answer is known.

Each noise level is one pass of the backbone. After k levels the head scores the tokens of all k
together, so m_k, the margin between the two sides, is that of the token-level ensemble of the first k levels,
and m_K that of the whole plan. Another level can only flip a decision while m_k is small, so

    stop at the first k with |m_k| >= c s_k,    P(m_K > 0 | m_k) = Phi(m_k / s_k)

s_k puts the levels on one scale; nothing depends on its being right. c is the smallest threshold at which, on
pairs that chose neither the levels nor s_k, early stops flip at most a share alpha of the decisions that all
K levels would make, with 95 % confidence over the choice of those pairs. That holds for any distribution of
the margins: it asks only that the pairs are drawn independently, from where later pairs come from. Pairs of
one prompt are not independent, so one pair of each prompt is asked (`evaluation.adaptive`).

The same file fixes how many noise draws of one picture reach a wanted standard error (`stein_draws`).

Own work; fixed-sequence testing with exact binomial bounds: Angelopoulos et al., Learn then Test
(arXiv:2110.01052).
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportAttributeAccessIssue=false
# (SciPy is not annotated)

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from scipy.stats import beta, norm, t
from torch import Tensor

from dina_lrm.core.calibration import fit_scale
from dina_lrm.core.likelihood import log_normal_cdf, negative_log_likelihood

__all__ = ["agreement_spreads", "controlled_threshold", "levels_taken", "most_likely", "stein_draws"]

THRESHOLDS = tuple(round(4.0 - 0.05 * step, 2) for step in range(81))
"""Candidates of `controlled_threshold`, from hardly ever stopping early to always."""
CONFIDENCE = 0.95


def most_likely(
    margins: Float[Tensor, "candidate pair"], target: Float[Tensor, " pair"]
) -> tuple[int, float, float]:
    """The candidate under which the votes are most likely, each read on the scale that suits it best.

    Args:
        margins: score_chosen - score_rejected, of each way of scoring.
        target: share of votes for `chosen`.

    Returns:
        Its row, the nats per pair of its votes (lower is better), its scale as in `calibration.fit_scale`.

    >>> margins = torch.tensor([[1.0, 1.0, 1.0, -1.0], [2.0, 2.0, 2.0, 2.0]])
    >>> row, nats, scale = most_likely(margins, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    >>> row, round(nats, 3), round(most_likely(margins[1:], torch.tensor([1.0, 1.0, 1.0, 0.0]))[1], 4)
    (0, 0.0, 0.5623)
    """
    y = target.double()
    fits: list[tuple[float, int, float]] = []
    for row, margin in enumerate(margins.double()):
        scale = fit_scale(margin, y)
        z = margin / scale
        loss = negative_log_likelihood(log_normal_cdf(z), log_normal_cdf(-z), y).mean()
        fits.append((float(loss), row, scale))
    nats, row, scale = min(fits)
    return row, nats, scale


def agreement_spreads(margins: Float[Tensor, "level pair"]) -> list[float]:
    """s_k of every level but the last: the last margin has the sign of m_k with P = Phi(|m_k| / s_k).

    By hand: margins of 1 after the first level, of which three in four keep their sign, have
    s = 1 / Phi^-1(3/4) = 1.4826.

    >>> [round(s, 4) for s in agreement_spreads(torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 3.0, -1.0]]))]
    [1.4826]
    """
    return [fit_scale(margin, (margins[-1] > 0).double()) for margin in margins[:-1]]


def levels_taken(margins: Float[Tensor, "level pair"], thresholds: Sequence[float]) -> Int64[Tensor, " pair"]:
    """How many levels each pair takes: up to the first whose |margin| is large enough, else all.

    Args:
        thresholds: margin at which a decision is final, after every level but the last.

    >>> levels_taken(torch.tensor([[0.5, -2.0], [1.7, 0.1], [1.0, 0.1]]), [1.6, 1.6]).tolist()
    [2, 1]
    """
    limits = margins.new_tensor([*thresholds, 0.0])
    return (margins.abs() >= limits[:, None]).to(torch.int64).argmax(dim=0) + 1


def controlled_threshold(
    margins: Float[Tensor, "level pair"], spreads: Sequence[float], *, error: float
) -> float:
    """The smallest threshold whose early stops flip at most `error` of the decisions of all levels.

    A pair is decided after level k when |margin| >= threshold * spreads[k - 1]. Thresholds are tried from the
    largest down; each passes if the exact binomial upper bound (95 %) on the share of pairs that stop early
    on the other side than they would end is at most `error`; the first failure ends the search. Testing in a
    fixed order needs no correction for the number of tests.

    Args:
        margins: of pairs that are independent of each other and of the spreads.
        spreads: of every level but the last.
        error: in (0, 1).

    Returns:
        Infinity where no threshold passes: fewer than log(0.05) / log(1 - error) pairs never suffice.
    """
    if not 0 < error < 1:
        raise ValueError(f"error = {error}: must be in (0, 1)")
    num_pairs, passed = margins.shape[1], math.inf
    for threshold in THRESHOLDS:
        levels = levels_taken(margins, [threshold * spread for spread in spreads])
        early = margins.gather(0, levels[None] - 1)[0]
        flipped = int((early.sign() != margins[-1].sign()).sum())
        bound = 1.0 if flipped == num_pairs else float(beta.ppf(CONFIDENCE, flipped + 1, num_pairs - flipped))
        if bound > error:
            break
        passed = threshold
    return passed


def stein_draws(
    pilot: Float[Tensor, "draw batch"], target_error: float, *, max_draws: int
) -> Int64[Tensor, " batch"]:
    """Draws that each picture needs for a standard error of `target_error`, from a few pilot draws of it.

        N = max( n, ceil( (t / z)^2 s^2 / target_error^2 ) ),    s: of the n pilot draws

    with t and z the 97.5 % points of Student's t (n - 1) and the normal one. The spread is read once and
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
