"""FLOPs and memory of a score, counted on shapes."""

from dataclasses import replace

import pytest
import torch

from dina_lrm import RewardModel
from dina_lrm.build import reward_model
from dina_lrm.evaluation.cost import score_flops, weight_bytes
from dina_lrm.models.architecture import Architecture
from dina_lrm.models.flux import FLUX1_DEV
from dina_lrm.models.qwen_image import QWEN_IMAGE
from dina_lrm.models.sd3 import SD35_LARGE, SD35_MEDIUM
from dina_lrm.models.unet import SD15, SDXL
from dina_lrm.models.wan import WAN21_1B
from dina_lrm.models.z_image import Z_IMAGE
from dina_lrm.recipes import recipe

FULL_SIZE: dict[str, Architecture] = {
    "sd35m-12-layers": SD35_MEDIUM,
    "sd35l-19-layers": SD35_LARGE,
    "flux-19-layers": FLUX1_DEV,
    "zimage-16-layers": Z_IMAGE,
    "qwenimage-20-layers": QWEN_IMAGE,
    "sd15-down-mid": SD15,
    "sdxl-down-mid": SDXL,
    "wan-15-layers": WAN21_1B,
}


def on_meta(name: str) -> RewardModel:
    return reward_model(recipe(name).model, pipeline=FULL_SIZE[name], device="meta", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def medium() -> RewardModel:
    return on_meta("sd35m-12-layers")


@pytest.mark.parametrize(
    ("pixels", "text_tokens", "backbone"),
    [
        (512, 333, 1.37),
        (768, 333, 3.22),
        (1024, 333, 6.63),
        (512, 205, 1.26),
        (768, 205, 3.09),
        (1024, 205, 6.46),
    ],
)
def test_sd35_medium(medium: RewardModel, pixels: int, text_tokens: int, backbone: float) -> None:
    """TFLOP counted independently, before this package existed."""
    flops = score_flops(medium, pixels, pixels, text_tokens=text_tokens)
    assert flops.backbone / 1e12 == pytest.approx(backbone, rel=0.005)
    if pixels == 1024:
        assert flops.head / 1e12 == pytest.approx(0.13, rel=0.03)
    assert flops.total == flops.backbone + flops.head


def test_levels_multiply_the_backbone(medium: RewardModel) -> None:
    one, three = (score_flops(medium, 512, 768, num_levels=levels) for levels in (1, 3))
    assert three.backbone == 3 * one.backbone
    assert 2.9 * one.head < three.head < 3 * one.head  # the queries' own part is computed once


@pytest.mark.parametrize("name", FULL_SIZE)
def test_recipes_at_full_size(name: str) -> None:
    """Every recipe builds over the shapes of its generator, and its cost can be counted."""
    model, config = on_meta(name), recipe(name).model
    assert model.backbone.num_blocks == config.num_blocks
    assert tuple(model.config.image_taps) == config.image_taps
    assert model.config.text_taps == config.text_taps
    small, large = score_flops(model, 512, 512), score_flops(model, 1024, 1024)
    assert 2.5 < large.backbone / small.backbone < 8
    counts = model.num_parameters()
    assert weight_bytes(model) >= 2 * counts["backbone"] + 4 * (counts["head"] + counts["lora"])
    assert weight_bytes(model) < 1.05 * (2 * counts["backbone"] + 4 * (counts["head"] + counts["lora"]))


def test_what_is_published() -> None:
    flux, z_image = recipe("flux-19-layers").model, recipe("zimage-16-layers").model
    assert (flux.num_blocks, flux.image_taps, flux.text_taps) == (19, (8, 12, 16, 19), (8, 12, 16, 19))
    assert (z_image.num_blocks, z_image.image_taps) == (16, (4, 8, 12, 16))
    assert (z_image.lora_rank, z_image.head.width) == (32, 1536)


def test_lora_is_counted_as_merged(medium: RewardModel) -> None:
    bare = replace(recipe("sd35m-12-layers").model, tuning="frozen")
    frozen = reward_model(bare, pipeline=SD35_MEDIUM, device="meta")
    assert score_flops(frozen, 512, 512) == score_flops(medium, 512, 512)


def test_only_shapes_are_counted(tiny_backbone: str) -> None:
    with pytest.raises(ValueError, match="meta"):
        score_flops(RewardModel.initialize(tiny_backbone), 64, 64)
