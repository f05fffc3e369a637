"""What holds for every scorer: bad input, missing files, names, half precision."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dina_lrm.errors import CheckpointError, InvalidInputError
from dina_lrm.evaluation.baselines import (
    SCORERS,
    UNIFIED_REWARD,
    ClipScore,
    HPSv3,
    ImageReward,
    RewardScorer,
    ServerScorer,
    load_scorer,
)
from dina_lrm.evaluation.baselines.weights import read_state
from tests.tiny import make_tiny_reward
from tests.unit.evaluation.baselines.scorers import PROMPTS, draw, save_clip_processor, tiny_clip


@pytest.fixture
def scorers(clip_folder: Path, image_reward_folder: Path, hpsv3_folder: Path) -> list[Any]:
    return [
        ClipScore.from_pretrained(clip_folder),
        ImageReward.from_pretrained(image_reward_folder),
        HPSv3.from_pretrained(hpsv3_folder),
        ServerScorer("http://127.0.0.1:9", "none", UNIFIED_REWARD, num_retries=0),
    ]


def test_bad_input_is_named(scorers: list[Any], tmp_path: Path, images: list[Image.Image]) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    half = tmp_path / "half.png"
    images[0].save(half)
    half.write_bytes(half.read_bytes()[:500])
    for scorer in scorers:
        with pytest.raises(InvalidInputError, match="2 prompts for 3 images"):
            scorer.score(PROMPTS[:2], images)
        with pytest.raises(InvalidInputError, match=r"prompt 1 .*'  '"):
            scorer.score(["red", "  "], images[:2])
        with pytest.raises(InvalidInputError, match="prompts must be a list"):
            scorer.score("red", images[:1])
        with pytest.raises(InvalidInputError, match=r"image 0: unreadable image: .*broken\.png"):
            scorer.score(["red"], [broken])
        with Image.open(half) as lazy, pytest.raises(InvalidInputError, match=r"image 0: .*truncated"):
            scorer.score(["red"], [lazy])
        with pytest.raises(InvalidInputError, match=r"image 0: missing file: .*none\.png"):
            scorer.score(["red"], [str(tmp_path / "none.png")])
        with pytest.raises(InvalidInputError, match="image 0 is a Tensor"):
            scorer.score(["red"], [torch.zeros(3, 4, 4)])


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"]
)
def test_missing_file_in_a_folder(file: str, tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path)
    save_clip_processor(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=f"from {tmp_path}"):
        ClipScore.from_pretrained(tmp_path)


def test_missing_weights_are_never_left_random(tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path)
    save_clip_processor(tmp_path)
    state = read_state(tmp_path / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights of CLIPModel: text_projection\.weight"):
        ClipScore.from_pretrained(tmp_path)


def test_nothing_at_the_location(tmp_path: Path) -> None:
    for kind in (ClipScore, ImageReward):
        with pytest.raises(CheckpointError, match="there is nothing at"):
            kind.from_pretrained(tmp_path / "none")


def test_reward_scorer_is_the_reward_model(tiny_pipeline: Path, images: list[Image.Image]) -> None:
    model = make_tiny_reward(tiny_pipeline)
    scorer = RewardScorer(model, noise_levels=[0.2, 0.6], seed=3)
    prompts = ["a red circle", "a blue square", "two small circle"]
    scores = scorer.score(prompts, images)
    expected = [
        float(model.score(prompt, image, noise_levels=[0.2, 0.6], seed=3, allow_untrained=True).scores)
        for prompt, image in zip(prompts, images, strict=True)
    ]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


def test_dina_by_name() -> None:
    scorer = load_scorer("dina", noise_levels=[0.4], seed=1)
    prompts, pictures = (
        ["a red circle on a gray background"] * 2,
        [draw(64, 64, 0), Image.new("RGB", (64, 64))],
    )
    scores = scorer.score(prompts, pictures)
    assert isinstance(scorer, RewardScorer)
    expected = scorer.model.score(prompts, pictures, noise_levels=[0.4], seed=1).scores
    torch.testing.assert_close(scores, expected.float(), rtol=1e-5, atol=1e-5)


def test_half_precision_is_near(
    clip_folder: Path, image_reward_folder: Path, hpsv3_folder: Path, images: list[Image.Image]
) -> None:
    """bfloat16 has 8 bits: a relative error of 0.004 a rounding, over a handful of layers."""
    folders = {"clip-score": clip_folder, "imagereward": image_reward_folder, "hpsv3": hpsv3_folder}
    for name, folder in folders.items():
        half, full = (
            load_scorer(name, location=folder, dtype=dtype).score(PROMPTS, images)
            for dtype in (torch.bfloat16, torch.float32)
        )
        torch.testing.assert_close(half, full, rtol=0.1, atol=5.0 if name == "clip-score" else 0.1)
        assert not torch.equal(half, full)


def test_registry(clip_folder: Path, hpsv2_folder: Path, images: list[Image.Image]) -> None:
    assert list(SCORERS) == [
        "clip-score",
        "pickscore",
        "hpsv2",
        "imagereward",
        "hpsv3",
        "unified-reward",
        "visualquality-r1",
        "pixel-network",
        "dina",
    ]
    for name, folder in (("clip-score", clip_folder), ("pickscore", clip_folder), ("hpsv2", hpsv2_folder)):
        scorer = load_scorer(name, location=str(folder), batch_size=2)
        assert scorer.name == name
        assert scorer.score(PROMPTS, images).shape == (3,)
    with pytest.raises(InvalidInputError, match=r"'mps'.* clip-score, pickscore"):
        load_scorer("mps")


def test_import_is_light() -> None:
    code = (
        "import sys, dina_lrm.evaluation.baselines;"
        "assert not {'transformers', 'torchvision'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
