"""Prompts and pictures of every backbone family are encoded as its pipeline does it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_lrm import InvalidInputError, RewardModel
from dina_lrm.backbones.backbone import Backbone
from tests.families import (
    MASKED,
    load_pipeline,
    make_family_reward,
)
from tests.pictures import noise_picture
from tests.tiny import PROMPT


def test_prompts_are_encoded_by_the_pipeline(family: str, folder: Path) -> None:
    model, pipeline = make_family_reward(folder), load_pipeline(folder)
    prompts = ["a red circle", "a blue square above a green circle"]
    conditioning = model.encode_prompts(prompts)
    model.backbone.check_conditioning(conditioning)
    assert (conditioning.attention_mask is not None) == (family in MASKED)
    for row, prompt in enumerate(prompts):
        live = RewardModel.from_pretrained(
            make_family_reward(folder).save_pretrained(folder.parent / f"{family}-live"), pipeline
        ).encode_prompts(prompt)
        alone = model.encode_prompts(prompt)
        torch.testing.assert_close(alone.prompt_embeds, live.prompt_embeds, atol=1e-5, rtol=0)
        mask = conditioning.attention_mask
        real = slice(None) if mask is None else mask[row].bool()
        torch.testing.assert_close(
            conditioning.prompt_embeds[row][real], alone.prompt_embeds[0], atol=1e-5, rtol=0
        )
    scores = model.score(prompts, [noise_picture(0, 64, 32), noise_picture(1, 64, 32)]).scores
    each = [model.score(prompt, noise_picture(row, 64, 32)).scores[0] for row, prompt in enumerate(prompts)]
    torch.testing.assert_close(scores, torch.stack(each), atol=1e-5, rtol=0)


def test_latents_are_those_the_pipeline_decodes(family: str, folder: Path) -> None:
    """Decoding a pipeline's own final latents gives its picture; encoding undoes the scaling of decoding."""
    pipeline, model = load_pipeline(folder), make_family_reward(folder)
    settings = {"num_inference_steps": 2, "height": 64, "width": 64}
    pictures = pipeline(
        PROMPT, generator=torch.Generator().manual_seed(0), output_type="pt", **settings | _short(family)
    )[0]
    with model.watch(pipeline) as watch:
        final = pipeline(
            PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent",
            callback_on_step_end=watch, **settings | _short(family),
        )[0]  # fmt: skip
    factor = model.backbone.pixels_per_latent
    latents = unpacked(model.backbone, final, 64 // factor, 64 // factor)
    decoded = model.decode_latents(latents)
    expected = pictures.transpose(1, 2) if family == "wan" else pictures
    torch.testing.assert_close(decoded, expected.reshape(decoded.shape).float(), atol=1e-5, rtol=0)
    encoded = model.encode_images(decoded)
    assert encoded.shape == latents.shape
    model.backbone.check_latents(encoded)


def _short(family: str) -> dict[str, Any]:
    return {"num_frames": 1} if family == "wan" else {}


def unpacked(backbone: Backbone, latents: Tensor, height: int, width: int) -> Tensor:
    from dina_lrm.backbones.packing import unpack

    return unpack(latents, height // 2, width // 2) if latents.ndim == 3 else latents


def test_videos_are_encoded_frame_by_frame_of_four(family_folders: Any) -> None:
    model = make_family_reward(family_folders("wan"))
    video = torch.rand(3, 5, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = model.encode_images([video])
    assert latents.shape[2] == 2
    assert model.score(PROMPT, [video]).scores.shape == (1,)
    assert model.decode_latents(latents).shape == (1, *video.shape)
    with pytest.raises(InvalidInputError, match=r"video 0 has 6 frames.* multiple"):
        model.encode_images([torch.rand(3, 6, 32, 32)])
    with pytest.raises(InvalidInputError, match="pictures only"):
        make_family_reward(family_folders("sd15")).encode_images([video])
