"""Text and pictures: the same embeddings and latents as the pipeline itself makes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dina_lrm import InvalidInputError, RewardModel
from dina_lrm.images import as_picture, as_pictures, fit
from tests.families import load_pipeline
from tests.tiny import MAX_TOKENS, PROMPT, TEXT_TOKENS, copy_of, make_tiny_reward


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline: Path):
    return load_pipeline(tiny_pipeline)


@pytest.fixture(scope="module")
def model(tiny_pipeline: Path) -> RewardModel:
    return make_tiny_reward(tiny_pipeline).requires_grad_(False)


# --- text


def test_embeddings_are_the_pipelines_own(model: RewardModel, pipeline) -> None:
    prompts = [PROMPT, "a green square"]
    conditioning = model.encode_prompts(prompts)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS
        )
    assert conditioning.prompt_embeds.shape == (2, TEXT_TOKENS, 64)
    assert torch.equal(conditioning.prompt_embeds, embeds)
    assert torch.equal(conditioning.pooled_prompt_embeds, pooled)


def encoded_batches(model: RewardModel) -> list[list[str]]:
    """The prompts that the text encoders are given from now on, one list a call."""
    encoder = model.encoders.text
    original, calls = encoder.encode_batch, []
    encoder.encode_batch = lambda pipeline, prompts, device: (
        calls.append(list(prompts)),
        original(pipeline, prompts, device),
    )[1]
    return calls


def test_a_prompt_is_encoded_once(tiny_pipeline: Path) -> None:
    model = make_tiny_reward(tiny_pipeline)
    first = model.encode_prompts([PROMPT, "a red square", PROMPT])
    assert torch.equal(first.prompt_embeds[0], first.prompt_embeds[2])
    calls = encoded_batches(model)
    again = model.encode_prompts(["a red square", "a blue square"])
    assert calls == [["a blue square"]]
    torch.testing.assert_close(again.prompt_embeds[0], first.prompt_embeds[1], atol=0, rtol=0)
    model.encoders.text.clear_cache()
    model.encode_prompts(PROMPT)
    assert calls[-1] == [PROMPT]


def test_the_cache_forgets_the_least_recently_used(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dina_lrm.backbones.prompts.CACHED_PROMPTS", 2)
    model = make_tiny_reward(tiny_pipeline)
    calls = encoded_batches(model)
    model.encode_prompts(["red", "green"])
    model.encode_prompts("red")
    model.encode_prompts("blue")
    assert calls == [["red", "green"], ["blue"]]
    for prompt in ("red", "blue"):
        model.encode_prompts(prompt)
    assert len(calls) == 2
    model.encode_prompts("green")
    assert calls[2:] == [["green"]]


def test_t5_length(tiny_pipeline: Path) -> None:
    model = make_tiny_reward(tiny_pipeline, max_text_tokens=7)
    assert model.encode_prompts("a red circle").prompt_embeds.shape[1] == MAX_TOKENS + 7


def test_a_pipeline_saved_without_t5(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Its tokens are then zeros, as in diffusers."""
    folder = copy_of(tiny_pipeline, tmp_path / "no_t5", without=("text_encoder_3", "tokenizer_3"))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    embeds = make_tiny_reward(folder, max_text_tokens=5).encode_prompts(PROMPT).prompt_embeds
    assert embeds.shape == (1, MAX_TOKENS + 5, 64)
    assert not embeds[:, MAX_TOKENS:].any()
    assert embeds[:, :MAX_TOKENS, :64].any()


# --- pictures


def gradient(height: int = 16, width: int = 24) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) % 256], axis=-1).astype(np.uint8)


def test_latents_are_the_vaes_mean_shifted_and_scaled(model: RewardModel, pipeline) -> None:
    pixels = torch.from_numpy(gradient()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        mean = pipeline.vae.encode(pixels).latent_dist.mode()
    expected = (mean - 0.06) * 1.5
    latents = model.encode_images(Image.fromarray(gradient()))
    assert latents.shape == (1, 16, 4, 6)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)


def test_posterior_samples_follow_their_seeds(model: RewardModel) -> None:
    images = [Image.fromarray(gradient())] * 3
    samples = model.encode_images(images, sample=True, seed=[1, 2, 1])
    assert torch.equal(samples[0], samples[2])
    assert not torch.equal(samples[0], samples[1])
    torch.testing.assert_close(
        model.encode_images(images[0], sample=True, seed=2)[0], samples[1], atol=1e-5, rtol=0
    )
    mean = model.encode_images(images[0])
    many = model.encode_images([images[0]] * 200, sample=True, seed=list(range(200)))
    spread = many.std(dim=0)
    assert ((many.mean(dim=0) - mean[0]).abs() < 5 * spread / 200**0.5 + 1e-6).all()


def test_a_differentiable_picture_gets_its_gradient(model: RewardModel) -> None:
    pixels = torch.rand(3, 16, 16, requires_grad=True)
    model.encode_images(pixels).square().sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.any()
    assert not model.encode_images(pixels.detach()).requires_grad


def test_every_kind_of_picture_gives_the_same_pixels(tmp_path: Path) -> None:
    pixels = gradient()
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = tensor.float() / 255
    kinds = [image, str(tmp_path / "image.png"), tmp_path / "image.png", stream.getvalue(), tensor, expected]
    for kind in kinds:
        torch.testing.assert_close(as_picture(kind), expected)
    assert len(as_pictures(expected.expand(4, -1, -1, -1))) == 4
    assert len(as_pictures(kinds)) == 6
    assert len(as_pictures(tmp_path / "image.png")) == 1


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert as_picture(clear).eq(1).all()
    half = as_picture(Image.new("RGBA", (8, 8), (255, 0, 0, 128)))
    torch.testing.assert_close(half[:, 0, 0], torch.tensor([1.0, 0.498, 0.498]), atol=2e-3, rtol=0)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.info["transparency"] = 0
    assert as_picture(palette).eq(1).all()
    tensor = torch.cat([torch.zeros(3, 4, 4), torch.full((1, 4, 4), 0.25)])
    torch.testing.assert_close(as_picture(tensor), torch.full((3, 4, 4), 0.75))


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(gradient(16, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert as_picture(tmp_path / "turned.jpg").shape == (3, 24, 16)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "I;16", "F"])
def test_other_modes(mode: str) -> None:
    grey = gradient()[..., 0]
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    else:
        image = Image.fromarray(gradient()).convert(mode)
    picture = as_picture(image)
    assert picture.shape == (3, 16, 24)
    assert picture.min() >= 0
    assert picture.max() <= 1
    if mode in ("I;16", "F"):
        torch.testing.assert_close(picture[0], torch.from_numpy(grey).float() / 255, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((64, 64), {}, (64, 64)),
        ((67, 41), {}, (64, 40)),
        ((200, 100), {"max_side": 96}, (96, 48)),
        ((200, 100), {"max_pixels": 5000}, (96, 48)),
        ((640, 640), {"max_side": 64}, (64, 64)),
        ((16, 16), {"max_side": 4096, "max_pixels": 10**9}, (16, 16)),
    ],
)
def test_sizes(size: tuple, limits: dict, expected: tuple) -> None:
    picture = torch.rand(3, *size)
    result = fit(picture, multiple=8, **{"max_side": 1000, **limits})
    assert tuple(result.shape[1:]) == expected
    assert result.min() >= 0
    assert result.max() <= 1
    if size == expected:
        assert result is picture


def test_pictures_shrink_to_the_position_table(model: RewardModel) -> None:
    latents = model.encode_images(torch.rand(3, 400, 200))
    assert latents.shape == (1, 16, 24, 12), "24 latents a side are the most this backbone has positions for"


def test_latents_of_different_sizes_do_not_stack(model: RewardModel) -> None:
    with pytest.raises(InvalidInputError, match="different sizes"):
        model.encode_images([torch.rand(3, 16, 16), torch.rand(3, 16, 24)])
