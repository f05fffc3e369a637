"""The reward on pixels that the bundled domain is compared with."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dina_lrm.errors import CheckpointError
from dina_lrm.evaluation.baselines import (
    PixelNetwork,
    load_scorer,
)
from dina_lrm.evaluation.baselines.weights import read_state
from tests.unit.evaluation.baselines.scorers import PROMPTS, check_interface, tokenizer


def test_pixel_network_by_hand(pixel_folder: Path, images: list[Image.Image]) -> None:
    """In float64, one unpadded prompt at a time, the fusion's transformer written out."""
    scorer = load_scorer("pixel-network", location=pixel_folder)
    scores = check_interface(scorer, images)
    network = PixelNetwork.from_pretrained(pixel_folder).network.double()
    fusion = network.fusion
    for prompt, image, score in zip(PROMPTS, images, scores.tolist(), strict=True):
        ids = tokenizer("<s>", "</s>")(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            pixels = scorer.image_processor(images=[image], return_tensors="pt")["pixel_values"]
            seen = network.clip.vision_model(pixel_values=pixels.double())
            read = network.clip.text_model(input_ids=ids)
            x = torch.cat(
                [
                    fusion.kind[:1],
                    fusion.project_image(seen.last_hidden_state[0]) + fusion.kind[1],
                    fusion.project_text(read.last_hidden_state[0]) + fusion.kind[2],
                ]
            )
            for layer in fusion.layers.layers:
                y = layer.norm1(x)
                q, k, v = (y @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias).chunk(
                    3, dim=1
                )
                heads = [
                    torch.softmax(a @ b.T / math.sqrt(8), dim=1) @ c
                    for a, b, c in zip(q.split(8, 1), k.split(8, 1), v.split(8, 1), strict=True)
                ]
                x = x + layer.self_attn.out_proj(torch.cat(heads, dim=1))
                x = x + layer.linear2(nn.functional.gelu(layer.linear1(layer.norm2(x))))
            by_hand = float(fusion.score(fusion.norm(x[0])))
        assert score == pytest.approx(by_hand, abs=1e-4, rel=1e-4)


def test_pixel_network_refuses_what_is_not_there(
    clip_folder: Path, pixel_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"fusion\.json"):
        load_scorer("pixel-network", location=clip_folder)
    with pytest.raises(CheckpointError, match=r"fusion\.json.* None"):
        load_scorer("pixel-network")
    shutil.copytree(pixel_folder, tmp_path / "copy")
    state = read_state(pixel_folder / "fusion.safetensors")
    state.pop("kind")
    save_file(state, tmp_path / "copy" / "fusion.safetensors")
    with pytest.raises(CheckpointError, match="1 missing: kind"):
        load_scorer("pixel-network", location=tmp_path / "copy")
