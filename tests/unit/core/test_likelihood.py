"""Likelihoods and losses: closed forms, identities, limits, gradients, extreme values."""

import math

import pytest
import torch
from scipy import integrate, stats
from scipy import special as scipy_special
from torch.autograd import gradcheck, gradgradcheck

from dina_lrm.core.likelihood import (
    bradley_terry_log_likelihood,
    constant_thurstone_log_likelihood,
    fidelity_loss,
    log_normal_cdf,
    negative_log_likelihood,
    pairwise_loss,
    preference_log_likelihood,
    thurstone_log_likelihood,
    votes_to_target,
    win_probability,
)

LIKELIHOODS = ["thurstone", "thurstone_constant", "bradley_terry", "bradley_terry_margin"]
PROPER = ["thurstone", "thurstone_constant", "bradley_terry"]  # the two outcomes add up to one
LOSSES = ["fidelity", "log_likelihood"]


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randn(32, generator=generator, dtype=torch.float64)
    rejected = torch.randn(32, generator=generator, dtype=torch.float64)
    sigma = torch.rand(32, generator=generator, dtype=torch.float64)
    target = torch.rand(32, generator=generator, dtype=torch.float64)
    return chosen, rejected, sigma, target


def gap(margin: float, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores that are `margin` apart; the chosen one is a leaf."""
    return torch.tensor([margin], dtype=dtype, requires_grad=True), torch.zeros(1, dtype=dtype)


class TestLogNormalCdf:
    def test_values_are_scipys(self):
        z = torch.cat([torch.linspace(-40, 40, 321), torch.tensor([-1e4, -1e3, -5.0, 1e3])]).double()
        expected = torch.from_numpy(scipy_special.log_ndtr(z.numpy()))
        torch.testing.assert_close(log_normal_cdf(z), expected, rtol=1e-13, atol=1e-300)
        # float32: exp(-z^2 / 2) magnifies the rounding of its exponent near +10; log Phi there is 1e-23.
        torch.testing.assert_close(log_normal_cdf(z.float()).double(), expected, rtol=1e-5, atol=1e-30)

    def test_extreme_value(self):
        """A margin of -8 at sigma 0.1 is z = -8 / sqrt(0.14) = -21.38; log p = -232.555, not -inf."""
        log_p = thurstone_log_likelihood(torch.tensor([-8.0]), torch.zeros(1), torch.tensor([0.1]))
        assert log_p.item() == pytest.approx(-232.555, abs=1e-3)
        assert torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(-8 / math.sqrt(0.14))).log() == -math.inf

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_gradient_is_the_inverse_mills_ratio(self, dtype):
        """phi / Phi from SciPy. Autograd of torch's float32 log_ndtr is off by a factor of 6 at z = -1e4."""
        z = torch.tensor([-3e4, -1e4, -500.0, -21.38, -5.0, -4.999, -1.0, 0.0, 2.0, 5.0], dtype=dtype)
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(log_normal_cdf(z).sum(), z)
        mills = math.sqrt(2 / math.pi) / scipy_special.erfcx(-z.detach().double().numpy() / math.sqrt(2))
        rtol = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(gradient.double(), torch.from_numpy(mills), rtol=rtol, atol=0)

    def test_gradcheck_across_the_switch(self):
        z = torch.tensor([-30.0, -5.2, -5.0 - 1e-3, -5.0 + 1e-3, -1.0, 3.0], dtype=torch.float64)
        assert gradcheck(log_normal_cdf, (z.requires_grad_(),))
        assert gradgradcheck(log_normal_cdf, (z,))


class TestThurstone:
    def test_closed_form(self, scores):
        chosen, rejected, sigma, _ = scores
        expected = [
            stats.norm.logcdf((a - b) / math.sqrt(2 * (2 * s * s + 0.05)))
            for a, b, s in zip(chosen.tolist(), rejected.tolist(), sigma.tolist(), strict=True)
        ]
        actual = thurstone_log_likelihood(chosen, rejected, sigma)
        torch.testing.assert_close(
            actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14
        )

    def test_is_the_chance_that_the_larger_gaussian_draw_wins(self):
        """Thurstone's definition, by quadrature: the integral of phi(q; s+, v) Phi((q - s-) / sqrt v)."""
        score_chosen, score_rejected, sigma = 0.7, 0.2, 0.4
        sd = math.sqrt(2 * sigma**2 + 0.05)

        def integrand(quality: float) -> float:
            return float(
                stats.norm.pdf(quality, score_chosen, sd) * stats.norm.cdf(quality, score_rejected, sd)
            )

        expected, _ = integrate.quad(integrand, -8, 8, epsabs=1e-12)
        actual = thurstone_log_likelihood(
            torch.tensor([score_chosen]).double(),
            torch.tensor([score_rejected]).double(),
            torch.tensor([sigma]).double(),
        ).exp()
        assert actual.item() == pytest.approx(expected, abs=1e-7)  # inputs were rounded to float32

    def test_slope_zero_is_plain_probit(self, scores):
        chosen, rejected, sigma, _ = scores
        probit = log_normal_cdf(chosen - rejected)
        torch.testing.assert_close(
            thurstone_log_likelihood(chosen, rejected, sigma, slope=0.0, floor=0.5), probit
        )
        torch.testing.assert_close(constant_thurstone_log_likelihood(chosen, rejected, variance=0.5), probit)

    def test_clean_limit(self):
        """At sigma = 0 the comparison has variance 2 * 0.05 = 0.1."""
        log_p = thurstone_log_likelihood(torch.ones(1), torch.zeros(1), torch.zeros(1))
        assert log_p.item() == pytest.approx(stats.norm.logcdf(1 / math.sqrt(0.1)), rel=1e-5)

    def test_more_noise_means_less_certainty(self):
        sigma = torch.linspace(0, 1, 50)
        p = thurstone_log_likelihood(torch.ones(50), torch.zeros(50), sigma).exp()
        assert (p.diff() < 0).all()
        assert (p > 0.5).all()

    @pytest.mark.parametrize(("slope", "floor"), [(-1.0, 0.05), (2.0, 0.0), (2.0, -1.0), (math.nan, 0.05)])
    def test_refuses_a_variance_that_is_not_positive(self, slope, floor):
        with pytest.raises(ValueError, match="slope must be at least 0"):
            thurstone_log_likelihood(torch.ones(1), torch.zeros(1), torch.zeros(1), slope=slope, floor=floor)
        with pytest.raises(ValueError, match="the floor above 0"):
            constant_thurstone_log_likelihood(torch.ones(1), torch.zeros(1), variance=0.0)

    def test_a_gain_undoes_the_variance(self):
        """With a free gain on the margins of one level every v reaches the same loss, at gains as sqrt(v)."""
        generator = torch.Generator().manual_seed(0)
        margin = torch.randn(4000, generator=generator, dtype=torch.float64)
        won = torch.bernoulli(torch.special.ndtr(margin), generator=generator)
        gains, zeros = torch.linspace(0.2, 4.0, 761, dtype=torch.float64), torch.zeros_like(margin)
        best = {}
        for floor in (0.05, 0.5, 1.0):
            losses = []
            for gain in gains.tolist():
                ours = pairwise_loss(gain * margin, zeros, zeros, target=won, slope=0.0, floor=floor)
                losses.append(float(ours.mean()))
            place = losses.index(min(losses))
            best[floor] = losses[place], float(gains[place]) / floor**0.5
        losses, ratios = zip(*best.values(), strict=True)
        assert max(losses) - min(losses) < 1e-4
        assert max(ratios) / min(ratios) == pytest.approx(1, abs=0.03)


class TestEveryLikelihood:
    @pytest.mark.parametrize("likelihood", PROPER)
    def test_outcomes_add_up_to_one(self, likelihood, scores):
        chosen, rejected, sigma, _ = scores
        p = preference_log_likelihood(chosen, rejected, sigma, likelihood=likelihood).exp()
        q = preference_log_likelihood(rejected, chosen, sigma, likelihood=likelihood).exp()
        torch.testing.assert_close(p + q, torch.ones_like(p), rtol=0, atol=1e-14)

    def test_a_margin_leaves_a_gap_between_the_outcomes(self, scores):
        chosen, rejected, sigma, _ = scores
        p = preference_log_likelihood(chosen, rejected, sigma, likelihood="bradley_terry_margin").exp()
        q = preference_log_likelihood(rejected, chosen, sigma, likelihood="bradley_terry_margin").exp()
        assert (p + q < 1).all()

    @pytest.mark.parametrize("likelihood", PROPER)
    def test_zero_margin_is_a_coin(self, likelihood):
        log_p = preference_log_likelihood(
            torch.ones(3), torch.ones(3), torch.tensor([0.0, 0.5, 1.0]), likelihood=likelihood
        )
        torch.testing.assert_close(log_p, torch.full((3,), -math.log(2)))

    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    def test_rises_with_the_margin(self, likelihood):
        margin = torch.linspace(-6, 6, 101, dtype=torch.float64)
        zeros = torch.zeros_like(margin)
        log_p = preference_log_likelihood(margin, zeros, zeros + 0.3, likelihood=likelihood)
        assert (log_p.diff() > 0).all()
        assert (log_p <= 0).all()

    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    def test_a_constant_added_to_both_scores_changes_nothing(self, likelihood, scores):
        chosen, rejected, sigma, _ = scores
        torch.testing.assert_close(
            preference_log_likelihood(chosen + 10, rejected + 10, sigma, likelihood=likelihood),
            preference_log_likelihood(chosen, rejected, sigma, likelihood=likelihood),
            rtol=1e-12,
            atol=1e-13,
        )

    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    def test_bfloat16_goes_up_to_float32(self, likelihood, scores):
        chosen, rejected, sigma, _ = (x.bfloat16() for x in scores)
        actual = preference_log_likelihood(chosen, rejected, sigma, likelihood=likelihood)
        exact = preference_log_likelihood(
            chosen.double(), rejected.double(), sigma.double(), likelihood=likelihood
        )
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-7)

    def test_bradley_terry_closed_form(self, scores):
        chosen, rejected, _, _ = scores
        for margin in (0.0, 1.0):
            expected = [-math.log1p(math.exp(margin - d)) for d in (chosen - rejected).tolist()]
            torch.testing.assert_close(
                bradley_terry_log_likelihood(chosen, rejected, margin=margin),
                torch.tensor(expected, dtype=torch.float64),
            )


class TestWinProbability:
    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    def test_symmetry(self, likelihood, scores):
        chosen, rejected, sigma, _ = scores
        p = win_probability(chosen - rejected, sigma, likelihood=likelihood)
        q = win_probability(rejected - chosen, sigma, likelihood=likelihood)
        torch.testing.assert_close(p + q, torch.ones_like(p), rtol=0, atol=1e-14)
        assert win_probability(torch.zeros(1), torch.zeros(1), likelihood=likelihood).item() == 0.5

    def test_is_the_likelihood(self, scores):
        chosen, rejected, sigma, _ = scores
        torch.testing.assert_close(
            win_probability(chosen - rejected, sigma, slope=1.0, floor=0.2),
            thurstone_log_likelihood(chosen, rejected, sigma, slope=1.0, floor=0.2).exp(),
        )


class TestLosses:
    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("soft", [False, True])
    def test_gradcheck(self, likelihood, loss, soft, scores):
        chosen, rejected, sigma, target = (x[:8] for x in scores)

        def objective(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return pairwise_loss(
                a, b, sigma, likelihood=likelihood, loss=loss, target=target if soft else None
            )

        inputs = (chosen.clone().requires_grad_(), rejected.clone().requires_grad_())
        assert gradcheck(objective, inputs)
        assert gradgradcheck(objective, inputs)

    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("margin", [1e4, -1e4])
    @pytest.mark.parametrize("sigma", [0.0, 1.0])
    @pytest.mark.parametrize("target", [None, 0.0, 0.3, 1.0])
    @pytest.mark.parametrize("eps", [0.0, 1e-6])
    def test_finite_at_any_margin(self, likelihood, loss, margin, sigma, target, eps):
        chosen, rejected = gap(margin)
        value = pairwise_loss(
            chosen,
            rejected,
            torch.tensor([sigma]),
            likelihood=likelihood,
            loss=loss,
            target=None if target is None else torch.tensor([target]),
            eps=eps,
        )
        (gradient,) = torch.autograd.grad(value.sum(), chosen)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()
        if loss == "fidelity":
            assert gradient.item() == 0  # vanishes on both sides

    def test_log_likelihood_keeps_pulling_at_an_extreme_margin(self):
        """Slope of -log Phi(m / s) at m = -1e4, s = sqrt(0.1): -(1e4 / s) / s = -1e5, and not infinite."""
        chosen, rejected = gap(-1e4)
        loss = pairwise_loss(chosen, rejected, torch.zeros(1), loss="log_likelihood")
        (gradient,) = torch.autograd.grad(loss.sum(), chosen)
        assert gradient.item() == pytest.approx(-1e5, rel=1e-5)

    def test_plain_label_is_target_one(self, scores):
        chosen, rejected, sigma, _ = scores
        for loss in LOSSES:
            torch.testing.assert_close(
                pairwise_loss(chosen, rejected, sigma, loss=loss, target=torch.ones_like(sigma)),
                pairwise_loss(chosen, rejected, sigma, loss=loss),
            )

    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    @pytest.mark.parametrize("loss", LOSSES)
    def test_swapping_sides_and_label_changes_nothing(self, likelihood, loss, scores):
        chosen, rejected, sigma, target = scores
        torch.testing.assert_close(
            pairwise_loss(chosen, rejected, sigma, likelihood=likelihood, loss=loss, target=target),
            pairwise_loss(rejected, chosen, sigma, likelihood=likelihood, loss=loss, target=1 - target),
        )

    def test_fidelity_closed_form(self, scores):
        chosen, rejected, sigma, target = scores
        expected = []
        for d, s, y in zip((chosen - rejected).tolist(), sigma.tolist(), target.tolist(), strict=True):
            p = stats.norm.cdf(d / math.sqrt(2 * (2 * s * s + 0.05) + 1e-6))
            expected.append(1 - math.sqrt(y * (p + 1e-6)) - math.sqrt((1 - y) * (1 - p + 1e-6)))
        actual = pairwise_loss(chosen, rejected, sigma, target=target)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13)

    def test_fidelity_is_the_squared_hellinger_distance(self, scores):
        """H^2(y, p) = 1/2 ((sqrt p - sqrt y)^2 + (sqrt(1-p) - sqrt(1-y))^2): in [0, 1], 0 only at p = y."""
        chosen, rejected, sigma, y = scores
        p = thurstone_log_likelihood(chosen, rejected, sigma).exp()
        hellinger = ((p.sqrt() - y.sqrt()).square() + ((1 - p).sqrt() - (1 - y).sqrt()).square()) / 2
        actual = pairwise_loss(chosen, rejected, sigma, target=y, eps=0.0)
        torch.testing.assert_close(actual, hellinger, rtol=1e-10, atol=1e-13)
        assert ((actual >= 0) & (actual <= 1)).all()

    def test_fidelity_gradient_is_the_log_likelihoods_times_half_root_p(self, scores):
        chosen, rejected, sigma, _ = scores
        chosen = chosen.clone().requires_grad_()
        p = thurstone_log_likelihood(chosen, rejected, sigma).exp().detach()
        (fidelity,) = torch.autograd.grad(pairwise_loss(chosen, rejected, sigma, eps=0.0).sum(), chosen)
        nll = pairwise_loss(chosen, rejected, sigma, loss="log_likelihood").sum()
        (log_likelihood,) = torch.autograd.grad(nll, chosen)
        torch.testing.assert_close(fidelity, log_likelihood * p.sqrt() / 2, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("y", [0.1, 0.5, 0.7])
    def test_both_losses_are_stationary_where_the_prediction_is_the_share_of_votes(self, loss, y):
        z = float(stats.norm.ppf(y))
        chosen, rejected = gap(z * math.sqrt(0.1), torch.float64)
        target = torch.tensor([y], dtype=torch.float64)
        value = pairwise_loss(
            chosen, rejected, torch.zeros(1, dtype=torch.float64), loss=loss, target=target, eps=0.0
        )
        (gradient,) = torch.autograd.grad(value.sum(), chosen)
        assert gradient.item() == pytest.approx(0, abs=1e-12)

    def test_fidelity_curves_a_quarter_as_much_as_the_log_likelihood_at_the_optimum(self):
        chosen, rejected = gap(math.sqrt(0.1) * float(stats.norm.ppf(0.7)), torch.float64)
        second = {}
        for loss in LOSSES:
            value = pairwise_loss(
                chosen,
                rejected,
                torch.zeros(1, dtype=torch.float64),
                loss=loss,
                target=torch.tensor([0.7], dtype=torch.float64),
                eps=0.0,
            )
            (first,) = torch.autograd.grad(value.sum(), chosen, create_graph=True)
            second[loss] = torch.autograd.grad(first.sum(), chosen)[0].item()
        assert second["fidelity"] / second["log_likelihood"] == pytest.approx(0.25, rel=1e-9)

    def test_log_likelihood_is_exact_and_takes_no_eps(self, scores):
        chosen, rejected, sigma, _ = scores
        torch.testing.assert_close(
            pairwise_loss(chosen, rejected, sigma, loss="log_likelihood", eps=0.1),
            -thurstone_log_likelihood(chosen, rejected, sigma),
            rtol=0,
            atol=0,
        )

    def test_soft_cross_entropy_is_the_mean_over_single_votes(self, scores):
        chosen, rejected, sigma, _ = scores
        seven_of_ten = torch.full_like(chosen, 0.7)
        for_, against = (
            thurstone_log_likelihood(chosen, rejected, sigma),
            thurstone_log_likelihood(rejected, chosen, sigma),
        )
        torch.testing.assert_close(
            negative_log_likelihood(for_, against, seven_of_ten), -(7 * for_ + 3 * against) / 10
        )

    def test_negative_eps_is_refused(self):
        with pytest.raises(ValueError, match="it must be at least 0"):
            fidelity_loss(torch.zeros(1), torch.zeros(1), eps=-1.0)

    @pytest.mark.parametrize("loss", LOSSES)
    def test_bfloat16_scores(self, loss, scores):
        chosen, rejected, sigma, target = (x.bfloat16() for x in scores)
        chosen.requires_grad_()
        value = pairwise_loss(chosen, rejected, sigma, loss=loss, target=target)
        assert value.dtype == torch.float32
        (gradient,) = torch.autograd.grad(value.sum(), chosen)
        assert gradient.dtype == torch.bfloat16
        assert torch.isfinite(gradient).all()


class TestVotes:
    def test_shares(self):
        share = votes_to_target(torch.tensor([7, 0, 1]), torch.tensor([3, 4, 1]))
        torch.testing.assert_close(share, torch.tensor([0.7, 0.0, 0.5]))

    def test_pseudo_votes_pull_towards_one_half(self):
        share = votes_to_target(torch.tensor([1, 0]), torch.tensor([0, 0]), pseudo_votes=0.5)
        torch.testing.assert_close(share, torch.tensor([0.75, 0.5]))

    @pytest.mark.parametrize(
        ("chosen", "rejected"), [(0.0, 0.0), (-1.0, 3.0), (math.nan, 1.0), (math.inf, 1.0)]
    )
    def test_bad_votes_name_the_pair(self, chosen, rejected):
        with pytest.raises(ValueError, match="votes of pair 1"):
            votes_to_target(torch.tensor([1.0, chosen]), torch.tensor([1.0, rejected]))

    def test_negative_pseudo_votes(self):
        with pytest.raises(ValueError, match=r"pseudo_votes -0\.5"):
            votes_to_target(torch.tensor([3]), torch.tensor([1]), pseudo_votes=-0.5)


def test_shapes_are_checked_under_test():
    """Scores shaped (batch, 1) would broadcast to (batch, batch): under pytest that is an error."""
    with pytest.raises(Exception, match=r"score_chosen|score_rejected"):
        thurstone_log_likelihood(torch.ones(2, 1), torch.ones(2), torch.ones(2))
