"""Flow steps and conversions: exact networks are inverted exactly, for both noise families."""

from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck

from dina_lrm.core.flow import clean_and_noise, ddim_step, euler_step, sigma_grid
from dina_lrm.core.noise import NoiseSchedule

FLOW = NoiseSchedule.rectified_flow()
DDPM = NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})


@pytest.fixture
def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z0, eps = torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    return z0, eps, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


def exact_prediction(kind, z0, eps, sigma):
    s = sigma.reshape(-1, 1, 1, 1)
    a = (1 - s**2).sqrt()
    return {"flow_prediction": eps - z0, "epsilon": eps, "v_prediction": a * eps - s * z0, "sample": z0}[kind]


@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "v_prediction", "sample"])
def test_an_exact_prediction_gives_both_parts_back(kind, parts):
    z0, eps, sigma = parts
    schedule = FLOW if kind == "flow_prediction" else DDPM
    noisy = schedule.add_noise(z0, eps, sigma)
    clean, noise = clean_and_noise(noisy, exact_prediction(kind, z0, eps, sigma), sigma, kind=kind)
    torch.testing.assert_close(clean, z0, rtol=0, atol=1e-12)
    torch.testing.assert_close(noise, eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "v_prediction", "sample"])
def test_the_parts_of_any_prediction_mix_to_the_noisy_latent(kind, parts):
    noisy, prediction, sigma = parts
    schedule = FLOW if kind == "flow_prediction" else DDPM
    clean, noise = clean_and_noise(noisy, prediction, sigma, kind=kind)
    torch.testing.assert_close(schedule.add_noise(clean, noise, sigma), noisy, rtol=0, atol=1e-12)


def test_euler_is_exact_on_a_straight_path(parts):
    z0, eps, _ = parts
    z, grid = eps, sigma_grid(7).double()
    for sigma, following in pairwise(grid):
        z = euler_step(z, eps - z0, sigma.expand(3), following.expand(3))
    torch.testing.assert_close(z, z0, rtol=0, atol=1e-12)


def test_an_euler_step_is_a_remix_of_the_predicted_parts(parts):
    noisy, velocity, sigma = parts
    clean, noise = clean_and_noise(noisy, velocity, sigma)
    following = sigma / 2
    torch.testing.assert_close(
        euler_step(noisy, velocity, sigma, following), FLOW.add_noise(clean, noise, following)
    )


def test_ddim_is_exact_for_an_exact_network(parts):
    z0, eps, sigma = parts
    following = sigma / 3
    actual = ddim_step(DDPM.add_noise(z0, eps, sigma), eps, sigma, following)
    torch.testing.assert_close(actual, DDPM.add_noise(z0, eps, following), rtol=0, atol=1e-12)


def test_gradcheck(parts):
    z0, eps, sigma = (x[:, :1, :2, :2] if x.ndim == 4 else x for x in parts)
    leaves = (z0.clone().requires_grad_(), eps.clone().requires_grad_())
    assert gradcheck(lambda z, u: euler_step(z, u, sigma, sigma / 2), leaves)
    for kind in ("epsilon", "v_prediction"):
        assert gradcheck(lambda z, u, kind=kind: ddim_step(z, u, sigma, sigma / 2, kind=kind), leaves)


def test_bfloat16_in_bfloat16_out(parts):
    noisy, velocity, sigma = (x.bfloat16() for x in parts)
    step = euler_step(noisy, velocity, sigma, sigma / 2)
    wide = euler_step(noisy.float(), velocity.float(), sigma.float(), sigma.float() / 2)
    assert step.dtype == torch.bfloat16
    assert torch.equal(step, wide.bfloat16())
    assert clean_and_noise(noisy, velocity, sigma).clean.dtype == torch.float32


def test_video_latents():
    z, u = torch.randn(2, 2, 4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert euler_step(z, u, torch.ones(2), torch.zeros(2)).shape == z.shape


def test_grid_ends():
    grid = sigma_grid(10)
    assert grid.shape == (11,)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()
    with pytest.raises(ValueError, match="num_steps is 0"):
        sigma_grid(0)
