"""Latents, text, weights and relatives that a backbone does not take."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_lrm import CheckpointError, Conditioning, InvalidInputError, RewardModel
from dina_lrm.backbones.architecture import Architecture
from dina_lrm.backbones.families import backbone_of, read_architecture
from tests.families import (
    FAMILIES,
    architecture_of,
    family_conditioning,
    family_latents,
    load_pipeline,
    make_family_reward,
)
from tests.tiny import randomize_reward


def test_latents_and_text_of_another_kind(family: str, folder: Path) -> None:
    model = make_family_reward(folder)
    latents, conditioning = family_latents(family), family_conditioning(family)
    channels = model.backbone.architecture.latent_channels
    with pytest.raises(InvalidInputError, match=f"latents have {channels + 1} channels.*takes {channels}"):
        model.score_latents(torch.cat([latents, latents[:, :1]], dim=1), conditioning)
    with pytest.raises(InvalidInputError, match=r"latents has shape|frames"):
        model.score_latents(latents.flatten(2), conditioning)
    wide = Conditioning(
        conditioning.prompt_embeds.repeat(1, 1, 2),
        conditioning.pooled_prompt_embeds,
        conditioning.attention_mask,
    )
    with pytest.raises(InvalidInputError, match="prompt_embeds have width"):
        model.score_latents(latents, wide)
    if conditioning.pooled_prompt_embeds is not None:
        with pytest.raises(InvalidInputError, match="needs pooled_prompt_embeds"):
            model.score_latents(latents, Conditioning(conditioning.prompt_embeds))
    with pytest.raises(InvalidInputError, match="attention_mask has shape"):
        model.score_latents(latents, Conditioning(*_parts(conditioning), torch.ones(2, 99)))
    with pytest.raises(InvalidInputError, match=r"another family.* AutoencoderKL other"):
        model.check_inputs(latents, conditioning, "AutoencoderKL other")
    if family != "wan":
        with pytest.raises(InvalidInputError, match="latents has shape"):
            model.score_latents(latents.unsqueeze(2), conditioning)


def _parts(conditioning: Conditioning) -> tuple[Tensor, Tensor | None]:
    return conditioning.prompt_embeds, conditioning.pooled_prompt_embeds


def test_a_reward_for_another_backbone(
    family: str, folder: Path, family_folders: Any, tmp_path: Path
) -> None:
    saved = make_family_reward(folder).save_pretrained(tmp_path / "reward")
    for other in FAMILIES:
        if (
            backbone_of(architecture_of(family_folders(other))).family
            != backbone_of(architecture_of(folder)).family
        ):
            with pytest.raises(CheckpointError, match="is a reward for another backbone"):
                RewardModel.from_pretrained(saved, family_folders(other))
    other = "flux" if family == "sd3" else "sd3"
    model = RewardModel.from_pretrained(saved)
    for use in (model.attach, model.watch):
        with pytest.raises(InvalidInputError, match="differs from the reward's backbone"):
            use(load_pipeline(family_folders(other)))


def test_guidance(family_folders: Any) -> None:
    folder = family_folders("flux")
    model = make_family_reward(folder)
    assert model.config.guidance == 3.5
    arguments = (family_latents("flux"), family_conditioning("flux"), 0.4)
    with torch.no_grad():
        strong = randomize_reward(RewardModel.initialize(folder, lora_rank=2, guidance=9.0))
        weak = randomize_reward(RewardModel.initialize(folder, lora_rank=2, guidance=1.0))
        assert (
            strong.score_latents(*arguments, seed=0) - weak.score_latents(*arguments, seed=0)
        ).abs().min() > 1e-4
    with pytest.raises(InvalidInputError, match="takes no guidance scale"):
        RewardModel.initialize(_without_guidance(folder), guidance=3.5, device="meta")


def test_missing_guidance(family_folders: Any, tmp_path: Path) -> None:
    model = make_family_reward(family_folders("flux"))
    model.config = replace(model.config, guidance=None)
    saved = model.save_pretrained(tmp_path / "reward")
    with pytest.raises(InvalidInputError, match=r"guidance scale.* set guidance"):
        RewardModel.from_pretrained(saved)


def _without_guidance(folder: Path) -> Architecture:
    return replace(architecture_of(folder), guidance_embeds=False)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qwen_image", {"zero_cond_t": True}, "editing or layers"),
        ("wan", {"image_dim": 1280}, "image-to-video"),
        ("z_image", {"siglip_feat_dim": 8}, "reference pictures"),
        ("sdxl", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("sd15", {"addition_embed_type": "image"}, "addition_embed_type = image"),
        ("sd15", {"in_channels": 9}, "takes 9 latent channels and puts out 4"),
        ("flux", {"in_channels": 384, "out_channels": 64}, "takes 96 latent channels and puts out 16"),
    ],
)
def test_relatives_that_are_not_supported(family_folders: Any, kind: str, change: dict, message: str) -> None:
    from dina_lrm.pipelines.source import PipelineSource

    config = PipelineSource(family_folders(kind)).network_config()
    with pytest.raises(InvalidInputError, match=message):
        read_architecture(config | change)


def test_an_unknown_class() -> None:
    with pytest.raises(CheckpointError, match=r"PixArtTransformer2DModel.* SD3"):
        read_architecture({"_class_name": "PixArtTransformer2DModel"})
