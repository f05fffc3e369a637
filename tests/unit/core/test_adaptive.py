"""Levels one after another: closed forms, and the guarantee on simulated pairs whose truth is known."""

import math

import pytest
import torch

from dina_lrm.core.adaptive import (
    agreement_spreads,
    controlled_threshold,
    levels_taken,
    most_likely,
    stein_draws,
)

NOISE = 0.8
"""Standard deviation of what a level adds to a pair's own margin, which has 1."""
NORMAL = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)


def simulate(
    num_pairs: int, num_levels: int, seed: int, *, heavy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Margins (level, pair) that settle as the levels go on, and the margin theta that they settle at.

    heavy: pairs differ in size by powers of e, and levels have outliers.
    """
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(num_pairs, generator=generator, dtype=torch.float64)
    noise = NOISE * torch.randn(num_levels, num_pairs, generator=generator, dtype=torch.float64)
    if heavy:
        size = torch.exp(torch.randn(num_pairs, generator=generator, dtype=torch.float64))
        theta, noise = theta * size, size * noise + 0.3 * noise**3
    looks = torch.arange(1, num_levels + 1, dtype=torch.float64)[:, None]
    return theta + noise.cumsum(0) / looks, theta


def stopped(margins: torch.Tensor, decided: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    taken = levels_taken(margins, decided)
    return taken, margins.gather(0, taken[None] - 1)[0]


def test_spreads_are_those_of_the_regression_of_the_last_margin_on_each() -> None:
    """Jointly Gaussian: m_K given m_k is Gaussian with a mean b m_k and a variance r, so
    P(m_K > 0 | m_k) = Phi(m_k b / sqrt r). Here var m_k = cov of later ones with it = 1 + 0.64 / k."""
    margins, _ = simulate(60_000, 4, seed=0)
    for level, spread in enumerate(agreement_spreads(margins), 1):
        own, last = 1 + NOISE**2 / level, 1 + NOISE**2 / 4
        slope = last / own
        assert spread == pytest.approx(math.sqrt(last - slope * last) / slope, rel=0.03)


def test_the_likeliest_candidate_and_its_scale() -> None:
    """Votes follow Phi(theta / 0.5): of theta twice as large, theta with noise, and none of it, the first is
    the one, on scale 1, with the entropy of the votes as its loss."""
    margins, theta = simulate(4000, 1, seed=1)
    target = NORMAL.cdf(theta / 0.5)
    row, nats, scale = most_likely(torch.stack([margins[0], 2 * theta, -theta]), target)
    entropy = -(torch.xlogy(target, target) + torch.xlogy(1 - target, 1 - target)).mean()
    assert row == 1
    assert scale == pytest.approx(1.0, abs=1e-4)
    assert nats == pytest.approx(float(entropy), abs=1e-6)


def test_the_last_view_always_ends_it() -> None:
    margins = torch.tensor([[0.1, -3.0, 0.5], [-0.2, 0.0, 0.5], [0.0, 0.0, 0.0]])
    assert levels_taken(margins, [1.0, 0.5]).tolist() == [3, 1, 2]
    assert levels_taken(margins[:1], []).tolist() == [1, 1, 1]


@pytest.mark.parametrize("alpha", [0.02, 0.1])
def test_early_stops_err_within_the_guarantee_on_5000_pairs(alpha: float) -> None:
    """The first side is preferred with probability Phi(theta). Of 5,000 new pairs early stops turn at most
    the stated share of the decisions, so they choose the side that is known to be the worse one at most
    that much more often than all nine levels do; and hard pairs take more levels than easy ones."""
    learned, _ = simulate(2000, 9, seed=2)
    spreads = agreement_spreads(learned)
    threshold = controlled_threshold(simulate(2000, 9, seed=3)[0], spreads, error=alpha)
    margins, theta = simulate(5000, 9, seed=4)
    taken, early = stopped(margins, [threshold * spread for spread in spreads])
    assert float((early.sign() != margins[-1].sign()).double().mean()) <= alpha
    probability = NORMAL.cdf(theta)
    wrong = ((early > 0) != (probability > 0.5)).double().mean()
    wrong_last = ((margins[-1] > 0) != (probability > 0.5)).double().mean()
    assert float(wrong - wrong_last) <= alpha
    assert float((taken < 9).double().mean()) > 0.4
    easy = theta.abs() > theta.abs().median()
    assert float(taken[easy].double().mean()) < float(taken[~easy].double().mean()) - 1


@pytest.mark.parametrize("heavy", [False, True])
def test_the_controlled_threshold_keeps_its_promise_on_new_pairs(heavy: bool) -> None:
    """On 40 calibration sets of 600 pairs, Gaussian or not, at most about 5 % of the thresholds (here 5 of
    40, beyond which the binomial has 2 %) may turn more than the stated share on a large new set."""
    new, _ = simulate(20_000, 6, seed=99, heavy=heavy)
    spreads = agreement_spreads(simulate(600, 6, seed=98, heavy=heavy)[0])
    broken = early = 0
    for seed in range(40):
        threshold = controlled_threshold(simulate(600, 6, seed, heavy=heavy)[0], spreads, error=0.05)
        taken, decision = stopped(new, [threshold * spread for spread in spreads])
        broken += float((decision.sign() != new[-1].sign()).double().mean()) > 0.05
        early += float((taken < 6).double().mean()) > 0.3
    assert broken <= 5
    assert early >= 36  # and it does save levels


def test_too_few_pairs_show_nothing() -> None:
    """Without a single flipped decision n pairs bound the share by 1 - 0.05^(1 / n): 5 % needs 59."""
    margins = torch.ones(3, 59, dtype=torch.float64)
    assert controlled_threshold(margins[:, :58], [1.0, 1.0], error=0.05) == math.inf
    assert controlled_threshold(margins, [1.0, 1.0], error=0.05) == 0.0
    with pytest.raises(ValueError, match="must be in"):
        controlled_threshold(margins, [1.0, 1.0], error=0.0)


def test_the_threshold_is_the_last_that_passes() -> None:
    """By hand: 100 pairs, 3 of them turn after a first margin of 1.02. The bound for 3 of 100 is 7.6 %, so at
    5 % the threshold stays above their margin, and at 10 % it falls to 0."""
    margins = torch.full((2, 100), 2.0, dtype=torch.float64)
    margins[0, :3], margins[1, :3] = 1.02, -1.0
    assert controlled_threshold(margins, [1.0], error=0.05) == 1.05
    assert controlled_threshold(margins, [1.0], error=0.10) == 0.0


def test_steins_draws_cover_whatever_the_spread() -> None:
    """mean +- 1.96 e over N draws covers the true mean (0) in at least 95 % of 4,000 pictures, for spreads
    from 0.2 to 3; pictures that vary more are drawn more often."""
    generator = torch.Generator().manual_seed(5)
    spread = torch.linspace(0.2, 3.0, 4000, dtype=torch.float64)
    pool = spread * torch.randn(3000, 4000, generator=generator, dtype=torch.float64)
    counts = stein_draws(pool[:5], 0.25, max_draws=3000)
    means = torch.stack([pool[:count, index].mean() for index, count in enumerate(counts.tolist())])
    covered = (means.abs() <= 1.96 * 0.25).double().mean()
    assert 0.95 - 3 * math.sqrt(0.05 * 0.95 / 4000) <= float(covered)
    assert float(counts[:400].double().mean()) < float(counts[-400:].double().mean()) / 5
    assert int(stein_draws(pool[:5], 1e-9, max_draws=64).max()) == 64
    assert int(stein_draws(pool[:5], 1e9, max_draws=64).max()) == 5
    for pilot, error in ((pool[:1], 0.1), (pool[:5], 0.0)):
        with pytest.raises(ValueError, match=r"2 or more.* positive"):
            stein_draws(pilot, error, max_draws=64)
