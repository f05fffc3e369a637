"""Folders of the published scorers, with tiny random weights."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dina_lrm.evaluation.baselines import (
    PixelFusion,
    PixelNetwork,
)
from tests.tiny import randomize
from tests.unit.evaluation.baselines.scorers import (
    MED_CONFIG,
    SIZE,
    bert,
    draw,
    published_image_reward,
    save_clip_processor,
    save_tiny_hpsv3,
    tiny_clip,
    to_open_clip,
    tokenizer,
)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [draw(40, 32, 0), draw(33, 61, 1), draw(28, 28, 2)]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip().save_pretrained(folder)
    save_clip_processor(folder)
    return folder


@pytest.fixture(scope="module")
def even_images() -> list[Image.Image]:
    """Sizes whose margins are even, so that no rule of rounding decides where the square is cut."""
    return [draw(56, 64, 0), draw(SIZE, 44, 1), draw(SIZE, SIZE, 2)]


@pytest.fixture(scope="module")
def pixel_folder(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoImageProcessor

    network = PixelFusion(tiny_clip(), width=16, num_layers=2, num_heads=2)
    randomize(network.fusion)
    folder = tmp_path_factory.mktemp("pixel")
    processor = AutoImageProcessor.from_pretrained(clip_folder)
    PixelNetwork(network, tokenizer("<s>", "</s>"), processor).save_pretrained(folder)
    return folder


@pytest.fixture
def hpsv2_folder(tmp_path: Path) -> Path:
    model = tiny_clip()
    model.config.save_pretrained(tmp_path)
    save_clip_processor(tmp_path)
    torch.save({"state_dict": to_open_clip(model)}, tmp_path / "HPS_v2.1_compressed.pt")
    return tmp_path


@pytest.fixture
def image_reward_folder(tmp_path: Path) -> Path:
    torch.save(published_image_reward(), tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(MED_CONFIG), encoding="utf-8")
    bert().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def hpsv3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hpsv3")
    save_tiny_hpsv3(folder)
    return folder
