"""Noise tables, mixing, laws of sigma, seeded noise."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dina_lrm.core.noise import NoiseSchedule, sample_noise_levels, seeded_generator, seeded_noise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SCHEDULES = {
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000},
    "vp": {
        "_class_name": "PNDMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
}


@pytest.fixture(params=list(SCHEDULES))
def schedule(request) -> NoiseSchedule:
    return NoiseSchedule.from_config(SCHEDULES[request.param])


class TestTables:
    @pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
    def test_rectified_flow_closed_form(self, shift):
        schedule = NoiseSchedule.rectified_flow(shift)
        expected = [shift * (n / 1000) / (1 + (shift - 1) * n / 1000) for n in range(1000, 0, -1)]
        torch.testing.assert_close(
            schedule.sigmas.double(), torch.tensor(expected).double(), rtol=2e-7, atol=0
        )
        assert schedule.sigmas[0] == 1
        assert (schedule.sigmas.diff() < 0).all()
        torch.testing.assert_close(schedule.timesteps, 1000 * schedule.sigmas, rtol=0, atol=0)

    def test_scaled_linear_closed_form(self):
        """Stable Diffusion 1.5's betas, in float64: abar_999 = 0.00466, so sigma_999 = 0.99767."""
        schedule = NoiseSchedule.from_config(SCHEDULES["vp"])
        abar, expected = 1.0, []
        for step in range(1000):
            root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * step / 999
            abar *= 1 - root**2
            expected.append(math.sqrt(1 - abar))
        torch.testing.assert_close(
            schedule.sigmas.double(), torch.tensor(expected).double(), rtol=5e-5, atol=0
        )
        assert schedule.sigmas[-1].item() == pytest.approx(0.99767, abs=1e-5)
        assert schedule.process == "variance_preserving"
        assert schedule.timesteps.tolist() == list(range(1000))

    def test_zero_terminal_snr_ends_in_pure_noise(self):
        plain = NoiseSchedule.from_config(SCHEDULES["vp"])
        rescaled = NoiseSchedule.from_config(SCHEDULES["vp"] | {"rescale_betas_zero_snr": True})
        assert rescaled.sigmas[-1] == 1
        torch.testing.assert_close(rescaled.sigmas[0], plain.sigmas[0])

    def test_dynamic_shifting_trains_on_the_unshifted_table(self):
        config = SCHEDULES["flow"] | {"use_dynamic_shifting": True}
        torch.testing.assert_close(
            NoiseSchedule.from_config(config).sigmas, NoiseSchedule.rectified_flow(1.0).sigmas
        )

    def test_multistep_solver_of_a_flow_model(self):
        config = {
            "_class_name": "UniPCMultistepScheduler",
            "use_flow_sigmas": True,
            "flow_shift": 5.0,
            "beta_schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.02,
        }
        schedule = NoiseSchedule.from_config(config)
        assert schedule.process == "rectified_flow"
        torch.testing.assert_close(schedule.sigmas, NoiseSchedule.rectified_flow(5.0).sigmas)

    def test_unknown_beta_schedule(self):
        with pytest.raises(ValueError, match="beta_schedule is 'cubic'"):
            NoiseSchedule.from_config({"beta_schedule": "cubic"})

    def test_a_scheduler_without_a_table(self):
        with pytest.raises(ValueError, match=r"EDMEulerScheduler has neither .* sigma_max"):
            NoiseSchedule.from_config({"_class_name": "EDMEulerScheduler", "sigma_max": 80.0})

    @pytest.mark.parametrize("abar", [[], [0.5, 0.6], [1.2, 0.5], [0.5, math.nan]])
    def test_bad_alphas(self, abar):
        with pytest.raises(ValueError, match="alphas_cumprod"):
            NoiseSchedule.variance_preserving(torch.tensor(abar, dtype=torch.float64))

    def test_bad_shift(self):
        with pytest.raises(ValueError, match="shift 0"):
            NoiseSchedule.rectified_flow(0.0)


class TestMatch:
    def test_every_row_matches_itself(self, schedule):
        level = schedule.match(schedule.sigmas)
        assert level.index.tolist() == list(range(1000))
        assert torch.equal(level.sigma, schedule.sigmas)
        assert torch.equal(level.timestep, schedule.timesteps)

    def test_nearest_by_a_plain_loop(self, schedule):
        wanted = torch.rand(50, generator=generator())
        table = schedule.sigmas.tolist()
        level = schedule.match(wanted)
        for u, index in zip(wanted.tolist(), level.index.tolist(), strict=True):
            distances = [abs(sigma - u) for sigma in table]
            assert distances[index] == pytest.approx(min(distances), abs=1e-7)

    def test_a_tie_goes_to_the_first_row(self):
        schedule = NoiseSchedule.rectified_flow(1.0, num_train_timesteps=4)  # 1, 3/4, 1/2, 1/4
        assert schedule.match(torch.tensor([0.875, 0.625, 0.375])).index.tolist() == [0, 1, 2]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_dtypes(self, schedule, dtype):
        level = schedule.match(torch.tensor([0.25, 0.5], dtype=dtype))
        assert level.sigma.dtype == torch.float32
        assert torch.equal(level.index, schedule.match(torch.tensor([0.25, 0.5])).index)

    @pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan, math.inf])
    def test_outside_of_the_unit_interval(self, schedule, bad):
        with pytest.raises(ValueError, match=r"noise level .* must be in \[0, 1\]"):
            schedule.match(torch.tensor([0.5, bad]))


class TestMixing:
    def test_closed_form(self, schedule):
        z0, eps = torch.randn(2, 3, 4, 4, 4, generator=generator()).double()
        sigma = schedule.match(torch.tensor([0.1, 0.5, 0.9])).sigma
        mixed = schedule.add_noise(z0, eps, sigma)
        for row, s in enumerate(sigma.tolist()):
            signal = 1 - s if schedule.process == "rectified_flow" else math.sqrt(1 - s * s)
            torch.testing.assert_close(mixed[row], signal * z0[row] + s * eps[row], rtol=1e-12, atol=1e-14)

    def test_ends(self, schedule):
        z0, eps = torch.randn(2, 2, 4, 4, 4, generator=generator())
        torch.testing.assert_close(schedule.add_noise(z0, eps, torch.zeros(2)), z0, rtol=0, atol=0)
        torch.testing.assert_close(schedule.add_noise(z0, eps, torch.ones(2)), eps, rtol=0, atol=0)

    def test_variance_is_preserved(self):
        schedule = NoiseSchedule.from_config(SCHEDULES["vp"])
        z0, eps = torch.randn(2, 1, 16, 64, 64, generator=generator())
        for sigma in (0.1, 0.7, 0.99):
            assert schedule.add_noise(z0, eps, torch.tensor([sigma])).var().item() == pytest.approx(
                1, abs=0.02
            )

    def test_bfloat16_is_mixed_in_float32(self, schedule):
        z0, eps = torch.randn(2, 2, 4, 8, 8, generator=generator()).bfloat16()
        sigma = schedule.match(torch.tensor([0.3, 0.8])).sigma
        mixed = schedule.add_noise(z0, eps, sigma)
        assert mixed.dtype == torch.bfloat16
        assert torch.equal(mixed, schedule.add_noise(z0.float(), eps.float(), sigma).bfloat16())

    def test_video_latents(self, schedule):
        z0, eps = torch.randn(2, 2, 4, 5, 8, 8, generator=generator())
        assert schedule.add_noise(z0, eps, torch.tensor([0.0, 1.0])).shape == z0.shape

    def test_gradcheck(self, schedule):
        z0, eps = torch.randn(2, 2, 1, 2, 2, generator=generator()).double()
        sigma = torch.tensor([0.2, 0.9], dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda z: schedule.add_noise(z, eps, sigma), (z0.clone().requires_grad_(),)
        )

    @pytest.mark.parametrize("sigma", [0.1, 0.4, 0.8])
    def test_what_noise_hides_of_a_linear_quality(self, schedule, sigma):
        """Regress w.x on z: |w|^2 sigma^2 / (a^2 + sigma^2) is left (docs/method.md, equation 6)."""
        x, eps = torch.randn(2, 40_000, 4, 1, 1, generator=generator()).double()
        level = torch.full((40_000,), sigma, dtype=torch.float64)
        z = schedule.add_noise(x, eps, level).flatten(1)
        w = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
        quality = x.flatten(1) @ w
        residual = quality - z @ torch.linalg.lstsq(z, quality.unsqueeze(1)).solution.squeeze(1)
        signal = 1 - sigma if schedule.process == "rectified_flow" else math.sqrt(1 - sigma**2)
        expected = w.square().sum().item() * sigma**2 / (signal**2 + sigma**2)
        assert residual.var().item() == pytest.approx(expected, rel=0.03)  # 4 standard errors of a variance

    def test_the_same_noise_cancels_in_the_difference_of_a_pair(self):
        """z+ - z- = (1 - sigma) (x+ - x-) exactly, whatever the noise: why both sides get the same draw."""
        schedule = NoiseSchedule.rectified_flow()
        chosen, rejected, eps = torch.randn(3, 1, 4, 8, 8, generator=generator()).double()
        sigma = torch.tensor([0.7], dtype=torch.float64)
        difference = schedule.add_noise(chosen, eps, sigma) - schedule.add_noise(rejected, eps, sigma)
        torch.testing.assert_close(difference, 0.3 * (chosen - rejected), rtol=0, atol=1e-14)


DISTRIBUTIONS = {
    "uniform": ({}, stats.uniform()),
    "beta": ({"beta_a": 2.0, "beta_b": 5.0}, stats.beta(2, 5)),
    "power": ({"exponent": 3.0}, stats.powerlaw(1 / 3)),  # r^3 has distribution function x^(1/3)
}


class TestNoiseDistributions:
    @pytest.mark.parametrize("distribution", list(DISTRIBUTIONS))
    def test_distribution(self, distribution):
        params, expected = DISTRIBUTIONS[distribution]
        sigma = sample_noise_levels(distribution, 4000, generator=generator(), **params)
        assert sigma.dtype == torch.float32
        assert stats.kstest(sigma.double().numpy(), expected.cdf).pvalue > 0.01

    def test_logit_normal(self):
        sigma = sample_noise_levels(
            "logit_normal", 4000, generator=generator(), logit_mean=0.5, logit_std=0.7
        )
        assert stats.kstest(sigma.double().logit().numpy(), stats.norm(0.5, 0.7).cdf).pvalue > 0.01

    @pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
    def test_mode(self, scale):
        """1 - r - m (cos^2(pi r / 2) - 1 + r) of a uniform r: falls from 1 to 0; 1 - r at m = 0."""
        sigma = sample_noise_levels("mode", 500, generator=generator(), mode_scale=scale).double()
        r = sample_noise_levels("uniform", 500, generator=generator()).double()
        expected = [1 - x - scale * (math.cos(math.pi * x / 2) ** 2 - 1 + x) for x in r.tolist()]
        torch.testing.assert_close(sigma, torch.tensor(expected).double(), rtol=0, atol=1e-6)
        assert ((sigma >= 0) & (sigma <= 1)).all()

    def test_constant(self):
        assert sample_noise_levels("constant", 3, generator=generator(), level=0.25).tolist() == [0.25] * 3

    @pytest.mark.parametrize("distribution", ["uniform", "logit_normal", "mode", "power", "beta", "constant"])
    def test_all_randomness_is_the_generators(self, distribution):
        torch.manual_seed(1)
        first = sample_noise_levels(distribution, 8, generator=generator(7))
        torch.manual_seed(2)
        state = torch.get_rng_state()
        second = sample_noise_levels(distribution, 8, generator=generator(7))
        assert torch.equal(first, second)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize(
        ("distribution", "params"),
        [
            ("logit_normal", {"logit_std": -1.0}),
            ("mode", {"mode_scale": 2.0}),
            ("power", {"exponent": 0.0}),
            ("beta", {"beta_b": 0.0}),
            ("constant", {"level": 1.5}),
        ],
    )
    def test_bad_parameters_are_named(self, distribution, params):
        with pytest.raises(ValueError, match=next(iter(params))):
            sample_noise_levels(distribution, 1, generator=generator(), **params)


class TestSeededNoise:
    def test_a_sample_depends_on_its_own_seed_only(self):
        batch = seeded_noise((4, 8, 8), [3, 1, 4], num_draws=2)
        assert batch.shape == (2, 3, 4, 8, 8)
        for row, seed in enumerate([3, 1, 4]):
            assert torch.equal(batch[:, row : row + 1], seeded_noise((4, 8, 8), [seed], num_draws=2))

    def test_more_draws_keep_the_first(self):
        assert torch.equal(seeded_noise((4, 8, 8), [5], num_draws=3)[:1], seeded_noise((4, 8, 8), [5]))

    def test_seeds_and_draws_differ(self):
        noise = seeded_noise((4, 8, 8), [0, 1], num_draws=2).flatten(0, 1).flatten(1)
        assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 0.25

    def test_leaves_the_global_generator_alone(self):
        state = torch.get_rng_state()
        seeded_noise((4, 2, 2), [0])
        assert torch.equal(torch.get_rng_state(), state)

    def test_is_standard_normal(self):
        noise = seeded_noise((16, 32, 32), [0]).flatten().double()
        assert stats.kstest(noise.numpy(), "norm").pvalue > 0.01

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_the_default_dtype_changes_nothing(self, dtype):
        expected = seeded_noise((4, 8, 8), [0, 2**40])
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(seeded_noise((4, 8, 8), [0, 2**40]), expected)
        finally:
            torch.set_default_dtype(before)

    def test_video(self):
        assert seeded_noise((4, 5, 8, 8), [0, 1]).shape == (1, 2, 4, 5, 8, 8)

    def test_every_bit_of_a_seed_counts(self):
        """torch's CPU generator alone would read 32 of them."""
        seeds = [0, 1, 2**32, 2**32 + 1, 2**33, 2**62, 2**63, 2**64 - 1, -1, -2, -(2**32), -(2**63)]
        noise = seeded_noise((4, 8, 8), seeds)[0].flatten(1)
        off_diagonal = torch.corrcoef(noise).fill_diagonal_(0)
        assert off_diagonal.abs().max() < 0.3, "256 numbers each: independent noise stays below 5 / 16"

    @pytest.mark.parametrize("seed", [0, 1, 77, 2**31, 2**32 - 1])
    def test_seeds_of_32_bits_are_torchs_own(self, seed):
        expected = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(seeded_noise((4, 8, 8), [seed])[0, 0], expected)

    def test_long_seeds_start_the_twister_as_its_authors_do(self):
        """The 32-bit integers of the generator are NumPy's, whose array seeding is init_by_array."""
        drawn = torch.empty(2000, dtype=torch.int64).random_(2**27, generator=seeded_generator(2**40 + 3))
        theirs = np.random.RandomState([3, 2**8]).randint(0, 2**32, size=2000, dtype=np.uint32)
        assert drawn.tolist() == (theirs % 2**27).tolist()

    def test_the_same_long_seed_gives_the_same_noise(self):
        assert torch.equal(seeded_noise((4, 8, 8), [2**50]), seeded_noise((4, 8, 8), [2**50]))

    @pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
    def test_a_seed_of_more_than_64_bits(self, seed):
        with pytest.raises(ValueError, match="from -2\\^63 to 2\\^64"):
            seeded_generator(seed)


@pytest.mark.parametrize("process", ["rectified_flow", "variance_preserving"])
def test_the_clean_latent_is_read_off_two_states(process: str) -> None:
    """Two mixtures of one clean latent and one noise give the clean latent back; each row has its levels."""
    if process == "rectified_flow":
        schedule = NoiseSchedule.rectified_flow()
    else:
        schedule = NoiseSchedule.variance_preserving(torch.linspace(0.999, 0.005, 1000))
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    before = schedule.match(torch.tensor([0.95, 0.6, 0.3])).sigma
    after = schedule.match(torch.tensor([0.8, 0.55, 0.1])).sigma
    states = [schedule.add_noise(clean, noise, sigma) for sigma in (before, after)]
    found = schedule.clean_between(states[0], states[1], before, after)
    torch.testing.assert_close(found, clean, rtol=1e-6, atol=1e-6)
