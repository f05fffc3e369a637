"""The recipe of the released checkpoint at full size: same names, same shapes, same counts, no memory."""

import json
from pathlib import Path

import pytest

from dina_lrm import RewardModel
from dina_lrm.backbones.sd3 import SD35_MEDIUM


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.initialize(
        SD35_MEDIUM,
        num_blocks=12,
        image_taps=(4, 8, 12),
        text_taps=(4, 8, 12),
        lora_rank=64,
        lora_alpha=128,
        device="meta",
    )


def shapes(state: dict) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


def test_names_and_shapes(model: RewardModel, golden: Path) -> None:
    manifest = json.loads((golden / "released_manifest.json").read_text())
    assert shapes(model.head.state_dict()) == manifest["rm_head.pt"]
    assert shapes(model.adapter.state_dict()) == manifest["backbone_lora/adapter_model.safetensors"]
    counts = model.num_parameters()
    assert counts["head"] == manifest["parameters"]["head"]
    assert counts["lora"] == manifest["parameters"]["lora"]
    assert counts["trainable"] == manifest["parameters"]["trainable"]
    assert counts["backbone"] == manifest["parameters"]["kept_backbone_without_lora"]


def test_counts_without_the_golden_folder(model: RewardModel) -> None:
    counts = model.num_parameters()
    assert (counts["head"], counts["lora"], counts["backbone"]) == (139_296_003, 28_311_552, 1_232_739_840)
    assert counts["trainable"] == 139_296_003 + 28_311_552
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
