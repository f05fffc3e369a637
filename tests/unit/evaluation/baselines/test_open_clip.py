"""HPSv2 and the weights of open_clip; how pictures become pixels."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from dina_lrm.errors import CheckpointError
from dina_lrm.evaluation.baselines import (
    HPSv2,
)
from dina_lrm.evaluation.baselines.open_clip import clip_state_from_open_clip
from dina_lrm.evaluation.baselines.pixels import cropped_pixels, padded_pixels
from dina_lrm.evaluation.baselines.weights import read_state
from tests.unit.evaluation.baselines.scorers import (
    PROMPTS,
    SIZE,
    check_interface,
    cropped_by_hand,
    draw,
    tiny_clip,
    to_open_clip,
)
from tests.unit.evaluation.baselines.test_clip import cosine_by_hand


def test_open_clip_there_and_back() -> None:
    model = tiny_clip()
    back = clip_state_from_open_clip(to_open_clip(model) | {"attn_mask": torch.zeros(12, 12)})
    assert back.keys() == model.state_dict().keys()
    other = tiny_clip()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(back)
    ids = torch.tensor([[2, 5, 6, 3]])
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits_per_image
        assert torch.equal(other(input_ids=ids, pixel_values=pixels).logits_per_image, expected)


def test_fused_attention_is_also_what_torch_computes() -> None:
    """open_clip's block is torch's own attention: an independent reading of in_proj_weight."""
    model = tiny_clip()
    state = to_open_clip(model)
    attention = nn.MultiheadAttention(32, 2, batch_first=True)
    prefix = "visual.transformer.resblocks.1.attn."
    attention.load_state_dict(
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    )
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = attention(hidden, hidden, hidden, need_weights=False)[0]
        found = model.vision_model.encoder.layers[1].self_attn(hidden_states=hidden, attention_mask=None)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["visual.trunk.blocks.0.norm.weight", "transformer.resblocks.0.ls_1.gamma"])
def test_open_clip_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"not the weights of an open_clip ViT: " + name):
        clip_state_from_open_clip({name: torch.zeros(1)})


def test_hpsv2_by_hand(hpsv2_folder: Path, images: list[Image.Image]) -> None:
    scorer = HPSv2.from_pretrained(hpsv2_folder)
    scores = check_interface(scorer, images)
    pixels = padded_pixels(images, SIZE)
    expected = [cosine_by_hand(prompt, one) for prompt, one in zip(PROMPTS, pixels, strict=True)]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    from_file = HPSv2.from_pretrained(hpsv2_folder / "HPS_v2.1_compressed.pt", processor=hpsv2_folder)
    assert torch.equal(from_file.score(PROMPTS, images), scores)


def test_hpsv2_refuses_what_does_not_fit(hpsv2_folder: Path) -> None:
    path = hpsv2_folder / "HPS_v2.1_compressed.pt"
    state = read_state(path)
    del state["visual.proj"]
    state["ln_final.bias"] = torch.zeros(7)
    torch.save(state, path)
    message = (
        r"1 missing: visual_projection.weight; 1 of another shape: .*final_layer_norm.bias \(7,\) for \(24,\)"
    )
    with pytest.raises(CheckpointError, match=message):
        HPSv2.from_pretrained(hpsv2_folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no HPS_v2\.1_compressed\.pt"):
        HPSv2.from_pretrained(hpsv2_folder)


class Trap:
    """What a pickle would run."""


def test_no_pickled_object_is_loaded(hpsv2_folder: Path) -> None:
    path = hpsv2_folder / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": Trap()}, path)
    with pytest.raises(CheckpointError, match="cannot load weights from"):
        HPSv2.from_pretrained(hpsv2_folder)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="does not hold a state dict"):
        HPSv2.from_pretrained(hpsv2_folder)


def test_padded_pixels_fit_the_longer_side_between_black_bars() -> None:
    white = Image.new(
        "RGB", (80, 20), (255, 255, 255)
    )  # scale 1/2: 10 rows of white, 15 black above, 15 below
    (pixels,) = padded_pixels([white], 40)
    restored = pixels[0] * 0.26862954 + 0.48145466
    expected = torch.zeros(40, 40)
    expected[15:25] = 1
    torch.testing.assert_close(restored, expected, rtol=0, atol=1e-5)


def test_cropped_pixels_are_the_middle_square() -> None:
    image = draw(SIZE, SIZE + 10, 3)
    (pixels,) = cropped_pixels([image], SIZE)
    torch.testing.assert_close(pixels.double(), cropped_by_hand(image), rtol=0, atol=1e-6)
    tall = draw(3 * SIZE, 2 * SIZE, 4)
    (pixels,) = cropped_pixels([tall], SIZE)
    torch.testing.assert_close(pixels.double(), cropped_by_hand(tall), rtol=0, atol=1e-6)
