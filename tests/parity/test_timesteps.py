"""Noise level -> table row, sigma, timestep: against the paper's code (stored) and diffusers' schedulers."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from dina_lrm.core.flow import clean_and_noise, ddim_step, euler_step, sigma_grid
from dina_lrm.core.noise import NoiseSchedule
from tests.reference import GOLDEN

CASE = GOLDEN / "G_timesteps"
needs_golden = pytest.mark.skipif(
    not CASE.is_dir(), reason=f"no golden tensors at {CASE}; set DINA_LRM_GOLDEN to their folder"
)
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(CASE / "timesteps.safetensors")


@needs_golden
class TestGolden:
    @pytest.mark.parametrize("shift", [3.0, 1.0])
    def test_table_bit_for_bit(self, golden, shift):
        schedule = NoiseSchedule.rectified_flow(shift)
        assert torch.equal(schedule.sigmas, golden[f"shift{shift:.0f}.table_sigmas"])
        assert torch.equal(schedule.timesteps, golden[f"shift{shift:.0f}.table_timesteps"])

    @pytest.mark.parametrize("shift", [3.0, 1.0])
    @pytest.mark.parametrize("draw", ["", "random_"])
    def test_look_up_bit_for_bit(self, golden, shift, draw):
        stored = {k: golden[f"shift{shift:.0f}.{draw}{k}"] for k in ("target", "index", "sigma", "timestep")}
        level = NoiseSchedule.rectified_flow(shift).match(stored["target"])
        assert torch.equal(level.index, stored["index"])
        assert torch.equal(level.sigma, stored["sigma"])
        assert torch.equal(level.timestep, stored["timestep"])


class TestFlowMatching:
    @pytest.mark.parametrize(
        "config", [{"shift": 3.0}, {"shift": 1.0}, {}, {"shift": 6.0, "num_train_timesteps": 500}]
    )
    def test_table_bit_for_bit(self, config):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
        schedule = NoiseSchedule.from_config(scheduler.config)
        assert schedule.process == "rectified_flow"
        assert torch.equal(schedule.sigmas, scheduler.sigmas)
        assert torch.equal(schedule.timesteps, scheduler.timesteps)

    def test_flux_is_not_shifted_in_training(self):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        assert torch.equal(NoiseSchedule.from_config(scheduler.config).sigmas, scheduler.sigmas)

    def test_mixing(self):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        schedule = NoiseSchedule.from_config(scheduler.config)
        z0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        level = schedule.match(torch.tensor([0.1, 0.4, 0.8]))
        expected = scheduler.scale_noise(z0, level.timestep, eps)
        torch.testing.assert_close(schedule.add_noise(z0, eps, level.sigma), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("shift", [1.0, 3.0])
    @pytest.mark.parametrize("num_steps", [1, 2, 28])
    def test_sampler_grid(self, shift, num_steps):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(num_steps)
        torch.testing.assert_close(sigma_grid(num_steps, shift=shift), scheduler.sigmas, rtol=0, atol=1e-7)

    def test_euler_step(self):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(4)
        z, velocity = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        expected = scheduler.step(velocity, scheduler.timesteps[0], z).prev_sample
        actual = euler_step(z, velocity, scheduler.sigmas[:1], scheduler.sigmas[1:2])
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


class TestVariancePreserving:
    @pytest.mark.parametrize(
        "name",
        [
            "DDPMScheduler",
            "DDIMScheduler",
            "PNDMScheduler",
            "EulerDiscreteScheduler",
            "DPMSolverMultistepScheduler",
        ],
    )
    @pytest.mark.parametrize(
        "config",
        [
            STABLE_DIFFUSION,
            {},
            {"beta_schedule": "squaredcos_cap_v2"},
            {"trained_betas": [0.001, 0.01, 0.1, 0.5]},
            {**STABLE_DIFFUSION, "num_train_timesteps": 100},
        ],
        ids=["scaled_linear", "linear", "cosine", "trained", "short"],
    )
    def test_table(self, name, config):
        scheduler = getattr(diffusers, name)(**config)
        schedule = NoiseSchedule.from_config(scheduler.config)
        expected = (1 - scheduler.alphas_cumprod) ** 0.5  # as add_noise rounds it
        assert schedule.process == "variance_preserving"
        assert torch.equal(schedule.sigmas, expected)

    def test_zero_terminal_snr(self):
        scheduler = diffusers.DDIMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True)
        schedule = NoiseSchedule.from_config(scheduler.config)
        expected = (1 - scheduler.alphas_cumprod.double()).sqrt().float()
        torch.testing.assert_close(
            schedule.sigmas, expected, rtol=0, atol=1e-5
        )  # theirs goes through betas again

    def test_mixing(self):
        scheduler = diffusers.DDPMScheduler(**STABLE_DIFFUSION)
        schedule = NoiseSchedule.from_config(scheduler.config)
        z0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        level = schedule.match(torch.tensor([0.05, 0.6, 1.0]))
        assert torch.equal(level.timestep, level.index.float())
        expected = scheduler.add_noise(z0, eps, level.index)
        torch.testing.assert_close(schedule.add_noise(z0, eps, level.sigma), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
    def test_ddim_step(self, kind):
        scheduler = diffusers.DDIMScheduler(
            **STABLE_DIFFUSION, prediction_type=kind, clip_sample=False, set_alpha_to_one=False
        )
        scheduler.set_timesteps(10)
        schedule = NoiseSchedule.from_config(scheduler.config)
        z, prediction = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        now, following = scheduler.timesteps[3], scheduler.timesteps[4]
        expected = scheduler.step(prediction, now, z)
        sigma, sigma_next = schedule.sigmas[now][None], schedule.sigmas[following][None]
        actual = ddim_step(z, prediction, sigma, sigma_next, kind=kind)
        torch.testing.assert_close(actual, expected.prev_sample, rtol=1e-5, atol=1e-5)
        clean = clean_and_noise(z, prediction, sigma, kind=kind).clean
        torch.testing.assert_close(clean, expected.pred_original_sample, rtol=1e-5, atol=1e-5)
