"""Search while sampling: what is kept, what it costs, and the same inside a diffusers pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from dina_lrm import RewardModel
from dina_lrm.core.flow import clean_and_noise
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.errors import InvalidInputError
from dina_lrm.sampling import candidates, search
from dina_lrm.sampling.policy import Policy
from dina_lrm.sampling.rollout import SamplerConfig
from tests.families import load_pipeline, make_family_reward
from tests.tiny import MAX_TOKENS

PROMPT = "a red circle on a gray background"
SAMPLER = SamplerConfig(num_steps=6, height=32, width=32)
Folders = Callable[[str], Path]


@pytest.fixture
def pipeline(family_folders: Folders) -> Any:
    return load_pipeline(family_folders("sd3"))


@pytest.fixture
def policy(pipeline: Any) -> Policy:
    return Policy(pipeline)


@pytest.fixture
def model(pipeline: Any) -> RewardModel:
    return make_family_reward(pipeline).requires_grad_(False).eval()


def test_best_of_n_ranks_all(policy: Policy, model: RewardModel) -> None:
    found = search.best_of_n(policy, model, PROMPT, samples=5, sampler=SAMPLER)
    assert sorted(found.indices) == [0, 1, 2, 3, 4]
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    again = model.score_latents(found.latents, model.encode_prompts(PROMPT), seed=0)
    torch.testing.assert_close(again, found.scores, rtol=1e-4, atol=1e-4)
    # 5 pictures x 6 steps, and a score of one level at 2 of 4 blocks each
    assert found.evaluations == 30 + 5 * model.backbone.num_blocks / 4


def test_best_of_a_draft_is_sampled_again_in_full(policy: Policy, model: RewardModel) -> None:
    """The winner of 2 steps, from its own noise in 6: what a full search of it alone gives."""
    coarse = SamplerConfig(num_steps=2, height=32, width=32)
    wanted = search.best_of_n(policy, model, PROMPT, samples=5, sampler=coarse).indices[0]
    found = search.best_of_n(policy, model, PROMPT, samples=5, draft=2, sampler=SAMPLER)
    assert found.indices == (wanted,)
    whole = search.best_of_n(policy, model, PROMPT, samples=5, sampler=SAMPLER)
    expected = whole.latents[whole.indices.index(wanted)]
    torch.testing.assert_close(found.latents[0], expected, rtol=1e-4, atol=1e-4)
    share = model.backbone.num_blocks / 4
    assert found.evaluations == 5 * 2 + 6 + (5 + 1) * share
    assert found.alive == (5, 5, 1, 1, 1, 1, 1, 1)


def test_a_confidence_of_one_drops_nobody(policy: Policy, model: RewardModel) -> None:
    whole = search.best_of_n(policy, model, PROMPT, samples=4, sampler=SAMPLER)
    same = search.successive_halving(policy, model, PROMPT, samples=4, confidence=1.0, sampler=SAMPLER)
    assert same.indices == whole.indices
    torch.testing.assert_close(same.latents, whole.latents, rtol=1e-4, atol=1e-4)


def test_halving_keeps_the_better_half_and_counts_passes(policy: Policy, model: RewardModel) -> None:
    found = search.successive_halving(
        policy, model, PROMPT, samples=8, first_check=2, every=2, sampler=SAMPLER
    )
    assert found.alive == (8, 8, 4, 4, 2, 2)
    assert len(found.scores) == 2
    share = model.backbone.num_blocks / 4
    assert found.evaluations == sum(found.alive) + (8 + 4 + 2) * share
    # The survivors are those that a full sampling gives for the same candidates.
    whole = search.best_of_n(policy, model, PROMPT, samples=8, sampler=SAMPLER)
    place = [whole.indices.index(one) for one in found.indices]
    torch.testing.assert_close(found.latents, whole.latents[place], rtol=1e-3, atol=1e-3)


def test_a_draft_on_a_coarse_grid_chooses_who_is_sampled(policy: Policy, model: RewardModel) -> None:
    found = search.successive_halving(
        policy, model, PROMPT, samples=8, draft=4, first_check=2, sampler=SAMPLER
    )
    # Two coarse steps with all, one each with 4 and 2, and six fine ones with the survivor of the last check.
    assert found.alive == (8, 8, 4, 2, 2, 2, 2, 2, 2, 2)
    share = model.backbone.num_blocks / 4
    assert found.evaluations == sum(found.alive) + (8 + 4) * share + 2 * share
    whole = search.best_of_n(policy, model, PROMPT, samples=8, sampler=SAMPLER)
    place = [whole.indices.index(one) for one in found.indices]
    torch.testing.assert_close(found.latents, whole.latents[place], rtol=1e-3, atol=1e-3)
    assert search.draft_steps(28) == 10
    assert search.draft_steps(12) == 12
    with pytest.raises(InvalidInputError, match=r"draft_steps = 7: must be in \[1, 6\]"):
        search.successive_halving(policy, model, PROMPT, draft=7, sampler=SAMPLER)


def test_predicted_clean_latents_are_what_the_network_says(policy: Policy, model: RewardModel) -> None:
    """What is scored at a check is the denoiser's own prediction of the clean latent, at one low level."""
    theirs = model.encode_prompts(PROMPT)
    shape = policy.latent_shape(32, 32)
    grid = policy.grid(6, shape)
    state = search.first_noise(shape, [1, 2, 3])
    rows = policy.encode([PROMPT] * 3)
    with torch.no_grad():
        after = search.advance(policy, state, rows, grid, 0, SAMPLER)
        predicted = policy.predict(state, rows, grid.timesteps[0].expand(3))
        clean = clean_and_noise(state, predicted, grid.sigmas[0].expand(3)).clean
        expected = model.score_latents(clean, theirs, candidates.SCORED_LEVEL, seed=0)
        found = candidates.score_predicted(
            model, state, after, theirs, (1.0, float(grid.sigmas[1])), 0, batch_size=2
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_who_is_dropped_follows_the_rewards_own_law(model: RewardModel) -> None:
    """v(0.5) = 2 * 0.25 + 0.05 = 0.55: a lead of x is certain with Phi(x / sqrt(1.1)); 0.9 needs 1.344."""
    scores = torch.tensor([0.0, -1.3, -1.4, -2.0])
    assert candidates.to_drop(model, scores, 0.5, 0.9).tolist() == [False, False, True, True]
    scores = torch.tensor([0.0, -0.1, -1.3, -1.4])
    assert candidates.to_drop(model, scores, 0.5, 0.9).tolist() == [False, False, False, True]
    # At sigma = 0, v = 0.05 and 0.9 needs 0.405, but never more than half of them go at once.
    assert candidates.to_drop(model, scores, 0.0, 0.9).tolist() == [False, False, True, True]


def test_guidance_raises_the_reward(policy: Policy, model: RewardModel) -> None:
    plain = search.guided(policy, model, PROMPT, samples=4, strength=0.0, sampler=SAMPLER)
    steered = search.guided(policy, model, PROMPT, samples=4, strength=0.2, sampler=SAMPLER)
    assert steered.scores.mean() > plain.scores.mean()
    assert steered.evaluations > plain.evaluations == 24 + 4 * model.backbone.num_blocks / 4


def test_the_pruner_does_in_a_pipeline_what_halving_does(policy: Policy, model: RewardModel) -> None:
    pipeline = policy.pipeline
    seeds = [mix_seeds(0, Stream.CANDIDATE, index) for index in range(8)]
    prune = search.Pruner(model, PROMPT, steps=6, first_check=2, every=2)
    latents = pipeline(
        prompt=PROMPT,
        num_images_per_prompt=8,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=6,
        guidance_scale=3.0,
        height=32,
        width=32,
        max_sequence_length=MAX_TOKENS,
        output_type="latent",
        callback_on_step_end=prune,
        callback_on_step_end_tensor_inputs=prune.tensor_inputs(pipeline),
    ).images
    assert len(latents) == len(prune.kept) == 2
    guided_sampler = SamplerConfig(num_steps=6, guidance_scale=3.0, height=32, width=32)
    ours = search.successive_halving(
        policy, model, PROMPT, samples=8, first_check=2, every=2, sampler=guided_sampler
    )
    assert sorted(ours.indices) == prune.kept
    order = [prune.kept.index(one) for one in ours.indices]
    torch.testing.assert_close(latents[order], ours.latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_the_pruner_reads_the_prediction_off_a_pipelines_states(
    family_folders: Folders, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Also where the scheduler's states are inflated by their noise, as those of the Euler kind are."""
    pipeline = load_pipeline(family_folders("sdxl"))
    options = {"clip_sample": False} if kind == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **options)
    pipeline.scheduler = scheduler
    model = make_family_reward(pipeline).requires_grad_(False).eval()
    predicted: list[torch.Tensor] = []
    step = scheduler.step

    def recorded(*args: Any, **options: Any) -> Any:
        result = step(*args, **{**options, "return_dict": True})
        predicted.append(result.pred_original_sample)
        return (result.prev_sample,)

    monkeypatch.setattr(scheduler, "step", recorded)
    found: list[torch.Tensor] = []
    score = model.score_latents
    monkeypatch.setattr(
        model,
        "score_latents",
        lambda clean, *args, **options: found.append(clean) or score(clean, *args, **options),
    )
    prune = search.Pruner(model, PROMPT, steps=6, first_check=2, every=2)
    pipeline(
        prompt=PROMPT,
        num_images_per_prompt=4,
        generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
        num_inference_steps=6,
        guidance_scale=3.0,
        height=32,
        width=32,
        output_type="latent",
        callback_on_step_end=prune,
        callback_on_step_end_tensor_inputs=prune.tensor_inputs(pipeline),
    )
    assert len(found) == 2
    torch.testing.assert_close(found[0], predicted[1], rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(found[1], predicted[3], rtol=5e-3, atol=5e-3)


def test_the_guide_moves_a_pipelines_states(policy: Policy, model: RewardModel) -> None:
    def sample(**callback: Any) -> torch.Tensor:
        return policy.pipeline(
            prompt=PROMPT,
            generator=[torch.Generator().manual_seed(1)],
            num_inference_steps=6,
            guidance_scale=1.0,
            height=32,
            width=32,
            max_sequence_length=MAX_TOKENS,
            output_type="latent",
            **callback,
        ).images

    conditioning = model.encode_prompts(PROMPT)
    before, after = (
        model.score_latents(sample(**callback), conditioning, seed=0)
        for callback in ({}, {"callback_on_step_end": search.Guide(model, PROMPT, strength=0.2)})
    )
    assert after.item() > before.item()


def test_packed_latents_and_bad_settings_are_refused(
    family_folders: Folders, policy: Policy, model: RewardModel
) -> None:
    flux = load_pipeline(family_folders("flux"))
    reward = make_family_reward(flux).requires_grad_(False).eval()
    with pytest.raises(InvalidInputError, match="packs its latents"):
        flux(
            prompt=PROMPT,
            num_inference_steps=2,
            height=32,
            width=32,
            output_type="latent",
            callback_on_step_end=search.Guide(reward, PROMPT),
        )
    for settings, message in (
        ({"confidence": 0.3}, r"confidence = 0\.3: must be in \[0\.5, 1\]"),
        ({"samples": 0}, "samples = 0: must be at least 1"),
        ({"first_check": 9}, "first_check = 9"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            search.successive_halving(policy, model, PROMPT, sampler=SAMPLER, **settings)
    with pytest.raises(InvalidInputError, match="strength = -1"):
        search.guided(policy, model, PROMPT, strength=-1.0, sampler=SAMPLER)
