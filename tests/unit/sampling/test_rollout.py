"""Sampling with a record: equal to the pipeline's own, seed by seed, whatever the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_lrm.core.transitions import gaussian_log_prob
from dina_lrm.errors import InvalidInputError
from dina_lrm.sampling.policy import Policy
from dina_lrm.sampling.rollout import SamplerConfig, rollout, transition_at
from tests.families import load_pipeline
from tests.tiny import MAX_TOKENS

PROMPTS = ["a red circle", "two blue square on a white background"]
Folders = Callable[[str], Path]
SHORT = {"max_sequence_length": MAX_TOKENS}
"""The tiny tokenizers' own limit, which `Policy.encode` pads to."""


def pictures_latents(pipeline: Any, prompts: list[str], seeds: list[int], **settings: Any) -> Tensor:
    """What the pipeline itself samples."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(
        prompt=prompts, generator=generators, output_type="latent", height=32, width=32, **settings
    ).images


@pytest.fixture
def policy(family_folders: Folders) -> Policy:
    return Policy(load_pipeline(family_folders("sd3")), lora_rank=2)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_deterministic_rollout_is_the_pipelines_picture(policy: Policy, guidance_scale: float) -> None:
    config = SamplerConfig(num_steps=4, guidance_scale=guidance_scale, height=32, width=32)
    ours = rollout(policy, policy.encode(PROMPTS), [3, 4], config).clean
    theirs = pictures_latents(
        policy.pipeline, PROMPTS, [3, 4], num_inference_steps=4, guidance_scale=guidance_scale, **SHORT
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_flux_too_whose_latents_are_packed(family_folders: Folders) -> None:
    pipeline = load_pipeline(family_folders("flux"))
    policy = Policy(pipeline)
    config = SamplerConfig(num_steps=3, height=32, width=32)
    ours = rollout(policy, policy.encode(PROMPTS), [3, 4], config).clean
    theirs = pictures_latents(pipeline, PROMPTS, [3, 4], num_inference_steps=3, guidance_scale=3.5, **SHORT)
    side = ours.shape[-1]
    unpacked = pipeline._unpack_latents(theirs, 32, 32, pipeline.vae_scale_factor)
    assert unpacked.shape[-1] == side
    torch.testing.assert_close(ours, unpacked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_variance_preserving_models_are_sampled_by_ddim(
    family_folders: Folders, family: str, guidance_scale: float
) -> None:
    from diffusers import DDIMScheduler

    pipeline = load_pipeline(family_folders(family))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    policy = Policy(pipeline)
    config = SamplerConfig(num_steps=3, guidance_scale=guidance_scale, height=32, width=32)
    ours = rollout(policy, policy.encode(PROMPTS), [3, 4], config).clean
    theirs = pictures_latents(pipeline, PROMPTS, [3, 4], num_inference_steps=3, guidance_scale=guidance_scale)
    scale = theirs.abs().max()
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rule", ["sde", "cps"])
def test_a_sample_depends_on_its_own_seed_alone(policy: Policy, rule: Any) -> None:
    config = SamplerConfig(num_steps=4, rule=rule, height=32, width=32, batch_size=2)
    prompts = policy.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    together = rollout(policy, prompts, [5, 6, 7], config)
    alone = rollout(policy, policy.encode([PROMPTS[0]]), [7], config)
    torch.testing.assert_close(together.states[:, 2:], alone.states, rtol=1e-4, atol=1e-4)
    assert not torch.equal(together.clean[0], together.clean[2])


@pytest.mark.parametrize("rule", ["sde", "cps"])
def test_the_ratio_is_exactly_one_before_the_first_update(policy: Policy, rule: Any) -> None:
    """With gradients on, as a trainer computes it: the log-probability of every stored step again."""
    config = SamplerConfig(num_steps=4, rule=rule, height=32, width=32)
    conditioning = policy.encode(PROMPTS)
    path = rollout(policy, conditioning, [1, 2], config)
    assert list(path.steps) == ([1] if rule == "sde" else [0, 1])
    for step in path.steps:
        where = transition_at(policy, path.states[step], conditioning, path.grid, step, config)
        again = gaussian_log_prob(path.states[step + 1], where)
        assert again.requires_grad
        assert (again.detach() - path.log_probs[step]).exp().tolist() == [1.0, 1.0]
    assert path.log_probs[2:].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_only_the_window_is_stochastic(policy: Policy) -> None:
    config = SamplerConfig(num_steps=4, rule="cps", window=(1, 2), height=32, width=32)
    conditioning = policy.encode(PROMPTS)
    path = rollout(policy, conditioning, [1, 2], config)
    plain = rollout(policy, conditioning, [1, 2], SamplerConfig(num_steps=4, height=32, width=32))
    assert torch.equal(path.states[:2], plain.states[:2])
    assert not torch.equal(path.states[2], plain.states[2])
    assert torch.equal(path.states[3:], torch.stack([path.means[2], path.means[3]]))


def test_ddim_with_eta_ends_somewhere_else(family_folders: Folders) -> None:
    policy = Policy(load_pipeline(family_folders("sd15")))
    conditioning = policy.encode(PROMPTS)
    paths = [
        rollout(policy, conditioning, [1, 2], SamplerConfig(num_steps=3, height=32, width=32, rule=rule))
        for rule in ("ode", "ddim")
    ]
    assert torch.equal(paths[0].states[0], paths[1].states[0])
    assert not torch.allclose(paths[0].clean, paths[1].clean)


def test_settings_that_cannot_be_are_refused(policy: Policy) -> None:
    with pytest.raises(InvalidInputError, match="1 seeds for 2 prompts"):
        rollout(policy, policy.encode(PROMPTS), [1], SamplerConfig())
    with pytest.raises(InvalidInputError, match=r"window = \(2, 9\).* 4 steps"):
        SamplerConfig(num_steps=4, window=(2, 9))
    with pytest.raises(InvalidInputError, match=r"guidance_scale = 0\.5"):
        SamplerConfig(guidance_scale=0.5)
    with pytest.raises(InvalidInputError, match=r"height = 33.* 8 pixels"):
        policy.latent_shape(33, 32)
