"""CLIPScore and PickScore against the formula, by hand."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dina_lrm.evaluation.baselines import (
    ClipScore,
    PickScore,
)
from tests.unit.evaluation.baselines.scorers import (
    PROMPTS,
    ROUNDING,
    check_interface,
    cropped_by_hand,
    save_clip_processor,
    tiny_clip,
    tokenizer,
)


def cosine_by_hand(prompt: str, pixels: Tensor) -> float:
    """In float64, one unpadded prompt, tower by tower."""
    model = tiny_clip().double()
    tokens = tokenizer("<s>", "</s>")
    ids = tokens(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model.text_model(input_ids=ids).last_hidden_state[0]
        end = ids[0].tolist().index(tokens.eos_token_id)
        text = model.text_projection.weight @ hidden[end]
        vision = model.vision_model(pixel_values=pixels.double()[None]).pooler_output[0]
        image = model.visual_projection.weight @ vision
        return float(text @ image / (text.square().sum().sqrt() * image.square().sum().sqrt()))


@pytest.mark.parametrize(("kind", "scale"), [(ClipScore, 100.0), (PickScore, math.exp(3.0))])
def test_cosine_scorers_by_hand(
    kind: Any, scale: float, clip_folder: Path, even_images: list[Image.Image]
) -> None:
    scorer = kind.from_pretrained(clip_folder)
    scores = check_interface(scorer, even_images, tolerance=100 * ROUNDING)
    expected = [
        scale * cosine_by_hand(prompt, cropped_by_hand(image))
        for prompt, image in zip(PROMPTS, even_images, strict=True)
    ]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=scale * 1e-5)
    assert len(set(scores.tolist())) == 3


def test_long_prompt_is_cut_not_refused(clip_folder: Path, images: list[Image.Image]) -> None:
    scorer = ClipScore.from_pretrained(clip_folder)
    long = " ".join(["red"] * 40)
    kept = " ".join(["red"] * 10)  # 12 positions, two of them taken by start and end
    assert torch.equal(scorer.score([long], images[:1]), scorer.score([kept], images[:1]))


def test_kinds_of_images_agree(clip_folder: Path, tmp_path: Path, images: list[Image.Image]) -> None:
    scorer = ClipScore.from_pretrained(clip_folder)
    buffer = io.BytesIO()
    images[0].save(buffer, format="PNG")
    images[0].save(tmp_path / "a.png")
    given = [images[0], buffer.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png")]
    scores = scorer.score(["a red circle"] * 4, given)
    torch.testing.assert_close(scores, scores[:1].expand(4), rtol=1e-5, atol=1e-4)


def test_no_pairs_no_scores(clip_folder: Path) -> None:
    assert ClipScore.from_pretrained(clip_folder).score([], []).shape == (0,)


def test_pickscore_takes_a_processor_from_elsewhere(
    clip_folder: Path, tmp_path: Path, images: list[Image.Image]
) -> None:
    tiny_clip().save_pretrained(tmp_path / "weights")
    save_clip_processor(tmp_path / "processor")
    scorer = PickScore.from_pretrained(tmp_path / "weights", processor=tmp_path / "processor")
    assert torch.equal(
        scorer.score(PROMPTS, images), PickScore.from_pretrained(clip_folder).score(PROMPTS, images)
    )
