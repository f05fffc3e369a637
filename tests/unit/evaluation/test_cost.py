"""FLOPs and memory of a score, counted on shapes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dina_lrm import InvalidInputError, RewardModel
from dina_lrm.backbones.families import BACKBONES
from dina_lrm.backbones.sd3 import SD35_MEDIUM
from dina_lrm.build.training import reward_model
from dina_lrm.evaluation.cost import (
    FULL_SIZE,
    TEXT_TOKENS,
    counted_flops,
    limited_text_tokens,
    peak_memory_bytes,
    reset_peak_memory,
    score_flops,
    weight_bytes,
)
from dina_lrm.recipes.training import recipe, recipe_names

pytestmark = pytest.mark.long  # networks of their full size, on shapes

OVER_RELEASED = [name for name in recipe_names() if recipe(name).model.pipeline in FULL_SIZE]


def on_meta(name: str) -> RewardModel:
    config = recipe(name).model
    return reward_model(config, pipeline=FULL_SIZE[config.pipeline], device="meta", dtype=torch.bfloat16)


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


@pytest.mark.parametrize("name", OVER_RELEASED)
def test_recipes_at_full_size(name: str) -> None:
    """Every recipe builds over its generator's shapes; memory is that of the tensors after a cast."""
    model, config = on_meta(name), recipe(name).model
    kept = model.config
    assert (kept.num_blocks, kept.image_taps, kept.text_taps) == (
        config.num_blocks,
        config.image_taps,
        config.text_taps,
    )
    assert kept.guidance == config.guidance
    model.backbone.cast(torch.bfloat16)
    base = [tensor for key, tensor in model.backbone.parts.state_dict().items() if ".lora_" not in key]
    wide = [*model.head.parameters(), *(model.adapter.parameters() if model.adapter else [])]
    assert {tensor.dtype for tensor in wide} == {torch.float32}
    assert weight_bytes(model) == sum(tensor.numel() * tensor.element_size() for tensor in base + wide)


@pytest.mark.parametrize(
    ("name", "width", "text"), [("flux-19-layers", 3072, 512), ("qwenimage-20-layers", 3072, 128)]
)
def test_double_stream_blocks(name: str, width: int, text: int) -> None:
    """By hand: a token passes 12 D^2 weights of a block (4 in attention, 8 in the MLP), and attention takes
    two products of N x N x D; embedders and modulation are the rest."""
    tokens = 64 * 64 + text
    block = 2 * 12 * width**2 * tokens + 2 * 2 * tokens**2 * width
    counted = score_flops(on_meta(name), 1024, 1024).backbone
    assert 1 < counted / (recipe(name).model.num_blocks * block) < 1.01


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("zimage-16-layers", 4), ("sdxl-down-mid", 4), ("sd15-down-mid", 6), ("wan-15-layers", 4)],
)
def test_other_families_can_be_counted(name: str, ratio: float) -> None:
    model = on_meta(name)
    small, large = score_flops(model, 512, 512), score_flops(model, 1024, 1024)
    assert large.backbone / small.backbone == pytest.approx(ratio, rel=0.2)


def test_the_position_table_is_counted(medium: RewardModel) -> None:
    """384 x 384 places of 1536 numbers: 453 MB of SD3.5-Medium."""
    counts = medium.num_parameters()
    weights = 2 * counts["backbone"] + 4 * (counts["head"] + counts["lora"])
    assert weight_bytes(medium) == weights + 2 * 384 * 384 * 1536


def test_text_tokens_to_plan_with() -> None:
    usual = {"sd3": 333, "flux": 512, "wan": 512, "unet": 77, "z_image": 128, "qwen_image": 128}
    assert usual == TEXT_TOKENS
    assert set(usual) == {backbone.family for backbone in BACKBONES}
    assert limited_text_tokens("sd3", {"tokenizer": 20, "tokenizer_2": 5, "tokenizer_3": 10**30}) == 276


def test_what_is_published() -> None:
    flux, z_image = recipe("flux-19-layers").model, recipe("zimage-16-layers").model
    assert (flux.num_blocks, flux.image_taps, flux.text_taps) == (19, (8, 12, 16, 19), (8, 12, 16, 19))
    assert (z_image.num_blocks, z_image.image_taps) == (16, (4, 8, 12, 16))
    assert (z_image.lora_rank, z_image.head.width) == (32, 1536)


def test_lora_is_counted_as_merged(medium: RewardModel) -> None:
    bare = replace(recipe("sd35m-12-layers").model, tuning="frozen")
    frozen = reward_model(bare, pipeline=SD35_MEDIUM, device="meta")
    assert score_flops(frozen, 512, 512) == score_flops(medium, 512, 512)


def test_what_cannot_be_counted(medium: RewardModel, tiny_backbone: Path) -> None:
    with pytest.raises(InvalidInputError, match="meta"):
        score_flops(RewardModel.initialize(tiny_backbone), 64, 64)
    with pytest.raises(InvalidInputError, match=r"position table.* 768"):
        score_flops(medium, 8192, 512)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux forgets a peak")
def test_peak_memory_is_measured_anew() -> None:
    """A peak of 400 MB is seen, and forgotten after a reset."""
    reset_peak_memory()
    before = peak_memory_bytes()
    large = torch.ones(100_000_000)
    assert peak_memory_bytes() - before > 350e6
    del large
    reset_peak_memory()
    assert peak_memory_bytes() - before < 100e6


def test_flops_of_a_call_are_counted() -> None:
    """A product of 8 x 16 by 16 x 4 matrices: 2 * 8 * 16 * 4."""
    a, b = torch.ones(8, 16), torch.ones(16, 4)
    assert counted_flops(lambda: a @ b) == 1024
    assert counted_flops(lambda: a + 1) is None
