"""ImageReward from its published files."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from dina_lrm.errors import CheckpointError
from dina_lrm.evaluation.baselines import (
    ImageReward,
)
from dina_lrm.evaluation.baselines.pixels import cropped_pixels
from tests.unit.evaluation.baselines.scorers import (
    PROMPTS,
    bert,
    check_interface,
    published_image_reward,
    tiny_blip,
)


def test_image_reward_by_hand(image_reward_folder: Path, images: list[Image.Image]) -> None:
    scorer = ImageReward.from_pretrained(image_reward_folder)
    scores = check_interface(scorer, images)
    vision, text, head = (module.double() for module in tiny_blip())
    expected = []
    with torch.no_grad():
        for prompt, pixels in zip(PROMPTS, cropped_pixels(images, 32), strict=True):
            seen = vision(pixel_values=pixels.double()[None]).last_hidden_state
            ids = bert()(prompt, return_tensors="pt")["input_ids"]  # neither padded nor masked
            value = text(input_ids=ids, encoder_hidden_states=seen).last_hidden_state[0, 0]
            for layer in head:
                value = layer.weight @ value + layer.bias
            expected.append((float(value) - 0.16717362830052426) / 1.0333394966054072)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_image_reward_reads_35_tokens(image_reward_folder: Path, images: list[Image.Image]) -> None:
    scorer = ImageReward.from_pretrained(image_reward_folder)
    prompts = [" ".join(["red"] * count) for count in (32, 33, 60)]  # and [CLS] and [SEP]
    fewer, full, cut = scorer.score(prompts, images[:1] * 3).tolist()
    assert full == pytest.approx(cut, abs=1e-5)
    assert fewer != pytest.approx(full, abs=1e-3)


def test_image_reward_refuses_what_does_not_fit(image_reward_folder: Path) -> None:
    path = image_reward_folder / "ImageReward.pt"
    whole = published_image_reward()
    lacking = {name: value for name, value in whole.items() if name != "mlp.layers.7.bias"}
    torch.save(lacking, path)
    with pytest.raises(CheckpointError, match=r"\(head\) do not fit: 1 missing: 7\.bias"):
        ImageReward.from_pretrained(image_reward_folder)
    torch.save(whole | {"blip.visual_encoder.rel_pos": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"names unknown to ImageReward: blip\.visual_encoder\.rel_pos"):
        ImageReward.from_pretrained(image_reward_folder)
    torch.save({}, path)
    with pytest.raises(CheckpointError, match="vision tower's sizes"):
        ImageReward.from_pretrained(image_reward_folder)
    torch.save(whole, path)
    (image_reward_folder / "med_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="text encoder lacks hidden_size"):
        ImageReward.from_pretrained(image_reward_folder)
    (image_reward_folder / "med_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no med_config\.json"):
        ImageReward.from_pretrained(image_reward_folder)
