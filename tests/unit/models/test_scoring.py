"""Scores: the same alone and in any batch, reproducible, differentiable, and refused where they would lie."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dina_lrm import Calibration, Conditioning, InvalidInputError, RewardModel, UntrainedModelError
from dina_lrm.checkpoints.config import RewardModelConfig
from dina_lrm.core.noise import seeded_noise
from dina_lrm.models.head import HeadTokens
from dina_lrm.models.scoring import perceived_variance
from tests.pictures import noise_picture
from tests.tiny import PROMPT, make_tiny_reward, tiny_conditioning, tiny_latents, tiny_transformer_only

SIGMAS = [0.2, 0.5, 0.7]


@pytest.fixture(scope="module")
def model(tiny_backbone: Path) -> RewardModel:
    return make_tiny_reward(tiny_backbone).requires_grad_(False)


@pytest.fixture(scope="module")
def complete(tiny_pipeline: Path) -> RewardModel:
    return make_tiny_reward(tiny_pipeline).requires_grad_(False)


def picture(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    return noise_picture(seed, width, height)


def row(conditioning: Conditioning, index: int) -> Conditioning:
    return conditioning.index_select(torch.tensor([index]))


# --- independence of the batch


@pytest.mark.parametrize("levels", [0.4, SIGMAS])
def test_same_seed_same_score_alone_and_in_any_batch(model: RewardModel, levels: object) -> None:
    latents, conditioning, seeds = tiny_latents(5), tiny_conditioning(5), [3, 1, 4, 1, 5]
    together = model.score_latents(latents, conditioning, levels, seed=seeds)
    for i in range(5):
        alone = model.score_latents(latents[i : i + 1], row(conditioning, i), levels, seed=seeds[i])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)
    order = torch.tensor([4, 2, 0, 3, 1])
    shuffled = model.score_latents(
        latents[order], conditioning.index_select(order), levels, seed=[seeds[i] for i in order]
    )
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=0)


def test_one_int_seed_is_everyones(model: RewardModel) -> None:
    latents = tiny_latents(1).expand(3, -1, -1, -1)
    scores = model.score_latents(latents, tiny_conditioning(1), seed=7)
    torch.testing.assert_close(scores, scores[:1].expand(3), atol=1e-6, rtol=0)


def test_chunking_changes_nothing(tiny_backbone: Path) -> None:
    """In float64, where another order of summation shows in the last bits alone."""
    model = make_tiny_reward(tiny_backbone).requires_grad_(False).to(torch.float64)
    args = (tiny_latents(5).double(), tiny_conditioning(5).to("cpu", torch.float64), SIGMAS)
    whole = model.score_latents(*args, seed=0)
    for model.max_batch_size in (1, 2, 4, 7):
        torch.testing.assert_close(model.score_latents(*args, seed=0), whole, atol=1e-12, rtol=0)


def test_no_call_exceeds_the_batch_limit(tiny_backbone: Path) -> None:
    model = make_tiny_reward(tiny_backbone).requires_grad_(False)
    calls = []
    model.backbone.pos_embed.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    model.score_latents(tiny_latents(4), tiny_conditioning(1), SIGMAS, seed=0)
    assert calls == [12], "all levels of all samples in one call"
    calls.clear()
    model.max_batch_size = 5
    model.score_latents(tiny_latents(4), tiny_conditioning(1), SIGMAS, seed=0)
    assert sum(calls) == 12
    assert max(calls) <= 5


# --- noise


def test_given_noise_leaves_nothing_random(model: RewardModel) -> None:
    args = (tiny_latents(), tiny_conditioning(), 0.4, tiny_latents(seed=1))
    torch.manual_seed(1)
    first = model.score_latents(*args)
    torch.manual_seed(2)
    assert torch.equal(model.score_latents(*args), first)


def test_seeded_noise_is_what_is_used(model: RewardModel) -> None:
    latents, conditioning = tiny_latents(), tiny_conditioning()
    noise = seeded_noise(latents.shape[1:], [5, 6, 7])[0]
    by_hand = model.score_latents(latents, conditioning, 0.4, noise)
    assert torch.equal(model.score_latents(latents, conditioning, 0.4, seed=[5, 6, 7]), by_hand)


def test_fresh_noise_without_a_seed_follows_torchs_generator(model: RewardModel) -> None:
    args = (tiny_latents(), tiny_conditioning(), 0.4)
    torch.manual_seed(0)
    first, second = model.score_latents(*args), model.score_latents(*args)
    torch.manual_seed(0)
    assert torch.equal(model.score_latents(*args), first)
    assert not torch.equal(first, second)


def test_scoring_leaves_torchs_generator_alone(model: RewardModel) -> None:
    state = torch.random.get_rng_state()
    model.score_latents(tiny_latents(), tiny_conditioning(), 0.4, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_draws_average_and_give_standard_errors(complete: RewardModel) -> None:
    out = complete.score(PROMPT, picture(0), num_draws=4)
    latents, conditioning = complete.encode_images(picture(0)), complete.encode_prompts(PROMPT)
    noise = seeded_noise(latents.shape[1:], [0], num_draws=4)
    draws = torch.cat([complete.score_latents(latents, conditioning, 0.4, one) for one in noise])
    torch.testing.assert_close(out.scores[0], draws.mean(), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.standard_errors[0], draws.std() / 2, atol=1e-6, rtol=0)
    assert complete.score(PROMPT, picture(0)).standard_errors is None


# --- noise levels


def test_level_per_sample(model: RewardModel) -> None:
    latents, conditioning, noise = tiny_latents(), tiny_conditioning(), tiny_latents(seed=1)
    mixed = model.score_latents(latents, conditioning, torch.tensor(SIGMAS), noise)
    for i, level in enumerate(SIGMAS):
        uniform = model.score_latents(latents, conditioning, level, noise)
        torch.testing.assert_close(mixed[i], uniform[i], atol=1e-6, rtol=0)


def test_ensembles_by_tokens_and_by_scores(model: RewardModel) -> None:
    args = (tiny_latents(), tiny_conditioning())
    noise = tiny_latents(seed=1)
    single = torch.stack([model.score_latents(*args, level, noise) for level in SIGMAS])
    averaged = model.score_latents(*args, SIGMAS, noise, ensemble="scores")
    torch.testing.assert_close(averaged, single.mean(dim=0), atol=1e-6, rtol=0)
    joined = model.score_latents(*args, SIGMAS, noise)
    assert (joined - averaged).abs().max() > 1e-4, "a token ensemble is another function"
    reordered = model.score_latents(*args, SIGMAS[::-1], noise)
    torch.testing.assert_close(reordered, joined, atol=1e-6, rtol=0)
    per_sample = torch.tensor(SIGMAS)[:, None].expand(3, 3)
    torch.testing.assert_close(model.score_latents(*args, per_sample, noise), joined, atol=1e-6, rtol=0)


def test_ensemble_by_hand_from_features(model: RewardModel) -> None:
    latents, conditioning, noise = tiny_latents(), tiny_conditioning(), tiny_latents(seed=1)
    features = []
    for level in SIGMAS:
        sigma = model.schedule.match(torch.full((3,), level)).sigma
        features.append(model.backbone(model.schedule.add_noise(latents, noise, sigma), conditioning, sigma))
    by_hand = model.score_tokens(HeadTokens.stack([model.tokens(level) for level in features]).unfold(3))
    torch.testing.assert_close(
        model.score_latents(latents, conditioning, SIGMAS, noise), by_hand, atol=1e-6, rtol=0
    )


def test_default_levels_come_from_the_config(tiny_backbone: Path) -> None:
    model = make_tiny_reward(tiny_backbone, noise_levels=SIGMAS).requires_grad_(False)
    args, noise = (tiny_latents(), tiny_conditioning()), tiny_latents(seed=1)
    assert torch.equal(model.score_latents(*args, noise=noise), model.score_latents(*args, SIGMAS, noise))


def test_raw_forward_is_score_latents_without_the_mixing(model: RewardModel) -> None:
    latents, conditioning, noise = tiny_latents(), tiny_conditioning(), tiny_latents(seed=1)
    sigma = model.schedule.match(torch.full((3,), 0.4)).sigma
    raw = model(model.schedule.add_noise(latents, noise, sigma), conditioning, sigma)
    torch.testing.assert_close(raw, model.score_latents(latents, conditioning, 0.4, noise), atol=1e-6, rtol=0)


# --- gradients


@pytest.mark.parametrize(
    ("levels", "settings"), [([0.3, 0.8], {}), (0.4, {"lora_rank": 0, "logistic": True})]
)
def test_gradient_against_finite_differences(tmp_path: Path, levels: object, settings: dict) -> None:
    folder = tiny_transformer_only(tmp_path, qk_norm=None)
    assert gradient_is_right(folder, levels, settings)


def test_gradient_with_query_and_key_norms(tiny_backbone: Path) -> None:
    """diffusers takes the norms' variance in float32, so differences need a step well above its round-off."""
    assert gradient_is_right(tiny_backbone, 0.4, {}, eps=1e-3, atol=2e-3)


def gradient_is_right(folder: Path, levels: object, settings: dict, **precision: float) -> bool:
    model = make_tiny_reward(folder, num_blocks=2, image_taps=(0, 2), text_taps=(1,), **settings)
    model = model.double().requires_grad_(False)
    latents = tiny_latents(1, 2, 4).double().requires_grad_()
    noise, conditioning = tiny_latents(1, 2, 4, seed=1).double(), tiny_conditioning(1).to(dtype=torch.float64)
    return torch.autograd.gradcheck(
        lambda x: model.score_latents(x, conditioning, levels, noise), (latents,), **precision
    )


def test_half_precision_latents_are_mixed_in_float32(model: RewardModel) -> None:
    latents, noise = tiny_latents().bfloat16(), tiny_latents(seed=1)
    half = model.score_latents(latents, tiny_conditioning(), 0.4, noise)
    full = model.score_latents(latents.float(), tiny_conditioning(), 0.4, noise)
    assert torch.equal(half, full)


# --- pictures and prompts


def test_pictures_of_many_sizes_in_one_call(complete: RewardModel, tmp_path: Path) -> None:
    pictures = [picture(0), picture(1, 16, 40), picture(2), picture(3, 33, 47)]
    pictures[2].save(tmp_path / "two.png")
    together = complete.score(PROMPT, [pictures[0], pictures[1], tmp_path / "two.png", pictures[3]]).scores
    for i, one in enumerate(pictures):
        torch.testing.assert_close(complete.score(PROMPT, one).scores[0], together[i], atol=1e-5, rtol=0)


def test_pairs_and_broadcasting(complete: RewardModel) -> None:
    prompts, pictures = [PROMPT, "a green square"], [picture(0), picture(1)]
    pairs = complete.score(prompts, pictures).scores
    assert pairs.shape == (2,)
    crossed = complete.score(prompts, picture(1)).scores
    torch.testing.assert_close(crossed[1], pairs[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(complete.score(PROMPT, pictures).scores[0], pairs[0], atol=1e-5, rtol=0)
    with pytest.raises(InvalidInputError, match="2 prompts for 3 images"):
        complete.score(prompts, [*pictures, picture(2)])


def test_rank_is_score_in_descending_order(complete: RewardModel) -> None:
    pictures = [picture(seed) for seed in range(4)]
    ranked = complete.rank(PROMPT, pictures)
    scores = complete.score(PROMPT, pictures).scores.tolist()
    assert [item.score for item in ranked] == sorted(scores, reverse=True)
    assert all(item.image is pictures[item.index] and item.score == scores[item.index] for item in ranked)


def test_compare_by_the_training_likelihood(complete: RewardModel) -> None:
    a, b = picture(0), picture(1)
    margin = complete.score(PROMPT, [a, b], SIGMAS).scores.diff().neg().item()
    variance = 2 * min(SIGMAS) ** 2 + 0.05
    by_hand = torch.special.ndtr(torch.tensor(margin / (2 * variance) ** 0.5, dtype=torch.float64)).item()
    assert complete.compare(PROMPT, a, b, SIGMAS) == pytest.approx(by_hand, abs=1e-6)
    assert complete.compare(PROMPT, a, b) + complete.compare(PROMPT, b, a) == pytest.approx(1)
    assert complete.compare(PROMPT, a, a) == pytest.approx(0.5)


def test_compare_by_a_stored_calibration(tiny_pipeline: Path) -> None:
    model = make_tiny_reward(tiny_pipeline)
    plain = model.compare(PROMPT, picture(0), picture(1))
    model.config = replace(model.config, calibrations=(Calibration(noise_levels=(0.4,), scale=0.25),))
    margin = model.score(PROMPT, [picture(0), picture(1)]).scores.diff().neg().item()
    by_hand = torch.special.ndtr(torch.tensor(margin / 0.25, dtype=torch.float64)).item()
    assert model.compare(PROMPT, picture(0), picture(1)) == pytest.approx(by_hand, abs=1e-6)
    # Elsewhere the calibration's factor on v is kept: 0.25^2 / (2 v(0.4)) of 2 v(0.2).
    margin = model.score(PROMPT, [picture(0), picture(1)], 0.2).scores.diff().neg().item()
    scale = 0.25 * ((2 * 0.2**2 + 0.05) / (2 * 0.4**2 + 0.05)) ** 0.5
    elsewhere = torch.special.ndtr(torch.tensor(margin / scale, dtype=torch.float64)).item()
    assert model.compare(PROMPT, picture(0), picture(1), 0.2) == pytest.approx(elsewhere, abs=1e-6)
    assert plain != pytest.approx(by_hand, abs=1e-6)


def test_elsewhere_the_nearest_calibration_of_the_same_kind_counts() -> None:
    config = RewardModelConfig(
        num_blocks=1,
        image_taps=(1,),
        lora_rank=1,
        lora_alpha=1.0,
        calibrations=(
            Calibration(noise_levels=(0.2, 0.5, 0.7), scale=0.9),
            Calibration(noise_levels=(0.1,), scale=0.5),
            Calibration(noise_levels=(0.7,), scale=2.0),
        ),
    )

    def v(sigma: float) -> float:
        return 2 * sigma**2 + 0.05

    assert perceived_variance([0.7, 0.2, 0.5], config) == pytest.approx(0.9**2 / 2)
    assert perceived_variance([0.0], config) == pytest.approx(v(0.0) * 0.5**2 / (2 * v(0.1)))
    assert perceived_variance([0.5], config) == pytest.approx(v(0.5) * 2.0**2 / (2 * v(0.7)))
    assert perceived_variance([0.1, 0.7], config) == pytest.approx(v(0.1) * 0.9**2 / (2 * v(0.2)))
    assert perceived_variance([0.1], replace(config, calibrations=())) == pytest.approx(v(0.1))


# --- random weights never score by accident


def test_a_new_model_refuses_to_score(tiny_pipeline: Path) -> None:
    model = RewardModel.initialize(tiny_pipeline, num_blocks=2, image_taps=(2,), text_taps=(), lora_rank=2)
    calls = [
        lambda: model.score_latents(tiny_latents(), tiny_conditioning()),
        lambda: model.score(PROMPT, picture(0)),
        lambda: model.compare(PROMPT, picture(0), picture(1)),
        lambda: model.rank(PROMPT, [picture(0)]),
    ]
    for call in calls:
        with pytest.raises(UntrainedModelError, match="random weights"):
            call()
    assert model.score(PROMPT, picture(0), allow_untrained=True).scores.isfinite().all()
    model.allow_untrained = True
    assert 0 <= calls[2]() <= 1


def test_initialization_follows_its_seed(tiny_backbone: Path) -> None:
    def head(seed: int) -> torch.Tensor:
        return RewardModel.initialize(
            tiny_backbone, num_blocks=1, lora_rank=2, seed=seed
        ).head.agg_visual.weight

    state = torch.random.get_rng_state()
    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_on_meta_counts_but_does_not_score(tiny_backbone: Path) -> None:
    model = RewardModel.initialize(
        tiny_backbone, num_blocks=2, lora_rank=2, device="meta", allow_untrained=True
    )
    real = RewardModel.initialize(tiny_backbone, num_blocks=2, lora_rank=2)
    assert model.num_parameters() == real.num_parameters()
    assert model.num_parameters()["trainable"] == sum(p.numel() for p in real.trainable_parameters())
    with pytest.raises(UntrainedModelError, match="meta"):
        model.score_latents(tiny_latents(), tiny_conditioning())


# --- numbers and precision of the caller


def test_numbers_of_numpy_are_numbers(complete: RewardModel) -> None:
    picture = Image.linear_gradient("L").resize((16, 16))
    expected = complete.score(PROMPT, picture, 0.25, seed=7, num_draws=2).scores
    for level, seed in ((np.float32(0.25), np.int64(7)), (np.float64(0.25), np.array(7))):
        found = complete.score(PROMPT, picture, level, seed=seed, num_draws=np.int64(2)).scores
        assert torch.equal(found, expected)
    several = complete.score(PROMPT, [picture] * 3, [0.25, 0.5], seed=[1, 2, 3]).scores
    for seeds in (np.array([1, 2, 3]), torch.tensor([1, 2, 3]), (1, np.int64(2), 3)):
        found = complete.score(PROMPT, [picture] * 3, [np.float32(0.25), 0.5], seed=seeds).scores
        assert torch.equal(found, several)


def test_arrays_of_levels_are_as_tensors(model: RewardModel) -> None:
    args = (tiny_latents(), tiny_conditioning())
    for levels in (torch.tensor([0.1, 0.4, 0.7]), torch.rand(2, 3)):
        expected = model.score_latents(*args, levels, seed=0)
        assert torch.equal(model.score_latents(*args, levels.double().numpy(), seed=0), expected)
    assert torch.equal(
        model.score_latents(*args, np.array(0.4), seed=0), model.score_latents(*args, 0.4, seed=0)
    )
    with pytest.raises(InvalidInputError, match="list of numbers"):
        model.score_latents(*args, np.array([0.1, 0.4]), seed=0)
    with pytest.raises(InvalidInputError, match=r"<U3.* numbers"):
        model.score_latents(*args, np.array(["0.4"] * 3), seed=0)


def test_long_and_negative_seeds_are_seeds_of_their_own(model: RewardModel) -> None:
    seeds = [0, 2**32, 2**33, 2**63, 2**64 - 1, -1, -(2**63)]
    latents, conditioning = tiny_latents(1).expand(7, -1, -1, -1), tiny_conditioning(1)
    assert len(set(model.score_latents(latents, conditioning, 0.7, seed=seeds).tolist())) == 7


def test_every_bit_of_the_seed_of_initialization_counts(tiny_backbone: Path) -> None:
    weights = [RewardModel.initialize(tiny_backbone, seed=seed).head.query_tokens for seed in (0, 2**32, -1)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with pytest.raises(InvalidInputError, match="seed = True"):
        RewardModel.initialize(tiny_backbone, seed=True)


def test_pictures_that_are_compared_are_seen_through_one_noise(complete: RewardModel) -> None:
    """Also where it is fresh: a picture is never preferred to itself, beyond the last digit of a float32."""
    picture = Image.linear_gradient("L").resize((16, 16))
    assert complete.compare(PROMPT, picture, picture, 0.9, seed=None) == pytest.approx(0.5, abs=1e-6)
    first, second = complete.rank(PROMPT, [picture, picture], 0.9, seed=None)
    assert first.score == pytest.approx(second.score, abs=1e-6)
    with pytest.raises(InvalidInputError, match="2 seeds for 1 samples"):
        complete.compare(PROMPT, picture, picture, seed=[1, 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_callers_autocast_does_not_reach_a_score(tiny_pipeline: Path, dtype: torch.dtype) -> None:
    """Nor the embeddings that are kept for later."""
    plain, inside = (make_tiny_reward(tiny_pipeline).requires_grad_(False) for _ in range(2))
    a, b = (Image.linear_gradient("L").resize(size) for size in ((16, 16), (24, 16)))
    with torch.autocast("cpu", dtype=dtype):
        scores = inside.score(PROMPT, [a, b], [0.2, 0.5], num_draws=2).scores
        probability = inside.compare(PROMPT, a, b)
        ranked = inside.rank(PROMPT, [a, b])
        latents, conditioning = inside.encode_images(a), inside.encode_prompts(PROMPT)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, plain.score(PROMPT, [a, b], [0.2, 0.5], num_draws=2).scores)
    assert probability == plain.compare(PROMPT, a, b)
    assert [item.score for item in ranked] == [item.score for item in plain.rank(PROMPT, [a, b])]
    assert torch.equal(latents, plain.encode_images(a))
    assert torch.equal(conditioning.prompt_embeds, plain.encode_prompts(PROMPT).prompt_embeds)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_latents_are_scored_in_the_callers_autocast(model: RewardModel) -> None:
    """An alignment run says with it in which precision its reward is computed."""
    args = (tiny_latents(), tiny_conditioning(), 0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model.score_latents(*args, seed=0)
    exact = model.score_latents(*args, seed=0)
    assert not torch.equal(rough.float(), exact)
    torch.testing.assert_close(rough.float(), exact, atol=0.2, rtol=0)
