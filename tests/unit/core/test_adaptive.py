"""Views drawn one after another: closed forms, and the guarantee on simulated pairs whose truth is known."""

import math

import numpy as np
import pytest
import torch

from dina_lrm.core.adaptive import (
    ViewModel,
    controlled_threshold,
    fit_views,
    plan_views,
    stein_draws,
    stopping_views,
)

BETWEEN = torch.tensor([[1.0, 0.8, 0.5], [0.8, 0.9, 0.6], [0.5, 0.6, 0.7]], dtype=torch.float64)
WITHIN = torch.tensor([0.05, 0.2, 0.6], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
MODEL = ViewModel(between=BETWEEN, within=WITHIN, weights=WEIGHTS)


def simulate(num_pairs: int, num_draws: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Margins (draw, level, pair) and theta of pairs that follow `MODEL`."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.linalg.cholesky(BETWEEN)
    own = root @ torch.randn(3, num_pairs, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_draws, 3, num_pairs, generator=generator, dtype=torch.float64)
    return own + WITHIN.sqrt()[:, None] * noise, WEIGHTS @ own


def along(margins: torch.Tensor, levels: list[int]) -> torch.Tensor:
    taken = [0, 0, 0]
    views = []
    for level in levels:
        views.append(margins[taken[level], level])
        taken[level] += 1
    return torch.stack(views)


def test_the_model_is_recovered() -> None:
    margins, theta = simulate(40_000, 3, seed=0)
    votes = torch.distributions.Normal(0, 1).cdf(theta * 2)
    fitted = fit_views(margins, votes)
    torch.testing.assert_close(fitted.between, BETWEEN, atol=0.04, rtol=0)
    torch.testing.assert_close(fitted.within, WITHIN, atol=0.02, rtol=0)
    assert float(fitted.weights.sum()) == pytest.approx(1.0)
    assert float(fitted.weights[2]) < 0.2  # theta does not hang on the third level
    with pytest.raises(ValueError, match="at least two draws"):
        fit_views(margins[:1], votes)


def test_gains_are_the_regression_of_theta_on_the_views() -> None:
    """Against least squares on a large simulation."""
    plan = plan_views(MODEL, 4)
    margins, theta = simulate(200_000, 4, seed=1)
    views = along(margins, plan.levels.tolist())
    for count in (1, 3):
        y = views[:count]
        expected = torch.linalg.solve(y @ y.T, y @ theta)
        torch.testing.assert_close(plan.gains[count - 1, :count], expected, atol=0.01, rtol=0)
        left = (theta - plan.means(views)[count - 1]).std()
        assert float(left) == pytest.approx(float(plan.deviations[count - 1]), rel=0.01)
    assert bool((plan.deviations.diff() < 0).all())  # every view tells something
    assert torch.equal(plan.gains.triu(1), torch.zeros(4, 4, dtype=torch.float64))


def test_the_next_level_is_the_one_that_tells_most() -> None:
    """Exhaustively for the first two views: no other level leaves a smaller deviation."""
    plan = plan_views(MODEL, 2)

    def deviation(levels: list[int]) -> float:
        own = BETWEEN[levels][:, levels] + torch.diag(WITHIN[levels])
        cross = (BETWEEN @ WEIGHTS)[levels]
        return math.sqrt(float(WEIGHTS @ BETWEEN @ WEIGHTS - cross @ torch.linalg.solve(own, cross)))

    first, second = plan.levels.tolist()
    assert deviation([first]) == pytest.approx(min(deviation([level]) for level in range(3)))
    assert deviation([first, second]) == pytest.approx(min(deviation([first, level]) for level in range(3)))
    assert max(np.bincount(plan_views(MODEL, 6, max_repeats=2).levels.numpy())) == 2
    with pytest.raises(ValueError, match="7 views of 3 levels"):
        plan_views(MODEL, 7, max_repeats=2)


@pytest.mark.parametrize("alpha", [0.02, 0.1])
def test_early_stops_err_within_the_guarantee_on_5000_pairs(alpha: float) -> None:
    """The probability that the first side is preferred is Phi(theta), so the right side is known. Stopping
    when the posterior reaches 1 - alpha leaves at most alpha of the stopped decisions on the wrong side:
    within three standard errors of a binomial, and hard pairs take more views than easy ones."""
    plan = plan_views(MODEL, 9)
    margins, theta = simulate(5000, 9, seed=2)
    views = along(margins, plan.levels.tolist())
    threshold = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - alpha, dtype=torch.float64)))
    taken = stopping_views(plan.certainty(views), threshold)
    decision = plan.means(views).gather(0, taken[None] - 1)[0]
    stopped = taken < 9
    wrong = (decision.sign() != theta.sign())[stopped].double()
    assert int(stopped.sum()) > 2000
    assert float(wrong.mean()) <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / int(stopped.sum()))
    easy = theta.abs() > theta.abs().median()
    assert float(taken[easy].double().mean()) < float(taken[~easy].double().mean()) - 1


def test_peeking_at_a_fixed_interval_would_not_keep_it() -> None:
    """The contrast: calling a side at the first of 200 looks whose own interval excludes 0 errs far more."""
    generator = torch.Generator().manual_seed(3)
    draws = 0.02 + torch.randn(200, 2000, generator=generator, dtype=torch.float64)
    looks = torch.arange(1, 201, dtype=torch.float64)[:, None]
    means = draws.cumsum(0) / looks
    taken = stopping_views(means.abs() * looks.sqrt(), 1.96)
    decision = means.gather(0, taken[None] - 1)[0]
    assert float((decision < 0)[taken < 200].double().mean()) > 0.2


@pytest.mark.parametrize("tails", ["gaussian", "heavy"])
def test_the_controlled_threshold_keeps_its_promise_on_new_pairs(tails: str) -> None:
    """On 40 calibration sets of 600 pairs, Gaussian or not, at most about 5 % of the thresholds (here 5 of
    40, beyond which the binomial has 2 %) may turn more than the stated share on a large new set."""
    plan = plan_views(MODEL, 6)

    def views(num: int, seed: int) -> torch.Tensor:
        margins, _ = simulate(num, 6, seed)
        if tails == "heavy":
            generator = torch.Generator().manual_seed(seed + 1000)
            margins = margins * torch.exp(torch.randn(num, generator=generator, dtype=torch.float64))
            margins += 0.3 * torch.randn(margins.shape, generator=generator, dtype=torch.float64) ** 3
        return along(margins, plan.levels.tolist())

    new = views(20_000, seed=99)
    means, certainty = plan.means(new), plan.certainty(new)
    broken = early = 0
    for seed in range(40):
        threshold = controlled_threshold(plan, views(600, seed), error=0.05)
        taken = stopping_views(certainty, threshold)
        decision = means.gather(0, taken[None] - 1)[0]
        broken += float((decision.sign() != means[-1].sign()).double().mean()) > 0.05
        early += float((taken < 6).double().mean()) > 0.3
    assert broken <= 5
    assert early >= 36  # and it does save views
    with pytest.raises(ValueError, match="must be in"):
        controlled_threshold(plan, new, error=0.0)


def test_too_few_pairs_never_stop_early() -> None:
    plan = plan_views(MODEL, 3)
    margins, _ = simulate(20, 3, seed=4)
    assert controlled_threshold(plan, along(margins, plan.levels.tolist()), error=0.05) == math.inf


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
        with pytest.raises(ValueError, match="need 2 or more, and a positive one"):
            stein_draws(pilot, error, max_draws=64)
