"""Fingerprints: another weight shows, another precision, layout or quantisation of the same does not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dina_lrm import CheckpointError, RewardModel
from dina_lrm.backbones.fingerprint import check_fingerprint, differing, fingerprint, sampled_values
from tests.tiny import make_tiny_reward


@pytest.fixture(scope="module")
def model(tiny_backbone: Path) -> RewardModel:
    return make_tiny_reward(tiny_backbone)


def test_every_base_weight_and_nothing_else_is_recorded(model: RewardModel, tiny_backbone: Path) -> None:
    frozen = make_tiny_reward(tiny_backbone, lora_rank=0)
    names = [name for name, _ in frozen.backbone.parts.named_parameters()]
    assert list(sampled_values(frozen.backbone.parts)) == names
    assert model.fingerprint is not None
    assert (
        model.fingerprint["probes"]
        == sampled_values(model.backbone.parts)
        == sampled_values(frozen.backbone.parts)
    )
    assert any("attn.to_q.weight" in name for name in names)
    assert make_tiny_reward(tiny_backbone, device="meta").fingerprint is None


@pytest.mark.parametrize("chain", [(torch.bfloat16,), (torch.float16, torch.bfloat16), (torch.float64,)])
def test_other_precisions_are_the_same_weights(model: RewardModel, chain: tuple[torch.dtype, ...]) -> None:
    parts = copy.deepcopy(model.backbone.parts)
    for dtype in chain:
        parts.to(dtype)
    assert differing(sampled_values(model.backbone.parts), parts) == []
    assert differing(sampled_values(parts), model.backbone.parts) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_lora_in_every_attention_shows(model: RewardModel, dtype: torch.dtype) -> None:
    """One percent of the size of the weights, and no other parameter."""
    parts = copy.deepcopy(model.backbone.parts)
    generator = torch.Generator().manual_seed(0)
    changed = 0
    with torch.no_grad():
        for name, weight in parts.named_parameters():
            if ".base_layer.weight" in name:
                rows, columns = weight.shape
                delta = torch.randn(rows, 4, generator=generator) @ torch.randn(
                    4, columns, generator=generator
                )
                weight.add_(0.01 * weight.norm() * delta / delta.norm())
                changed += 1
    found = differing(sampled_values(model.backbone.parts), parts.to(dtype))
    assert len(found) > changed / 2
    assert all("attn" in name for name in found)


def test_the_layout_in_memory_is_not_the_order_of_values() -> None:
    layer = nn.Conv2d(6, 5, 3)
    recorded = sampled_values(layer)
    assert differing(recorded, layer.to(memory_format=torch.channels_last)) == []  # type: ignore[call-overload]
    assert sampled_values(layer) == recorded


def test_older_checkpoints_recorded_eight_values_of_three_weights(model: RewardModel) -> None:
    weights = {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.backbone.parts.named_parameters()
    }
    name = "context_embedder.weight"
    flat = weights[name].detach().flatten()
    values = flat[:: flat.numel() // 8][:8].tolist()
    record: dict[str, Any] = {"architecture": {}, "probes": {name: values}}
    check_fingerprint(record, model.backbone.parts, "it")
    record["probes"][name] = [value + 0.1 for value in values]
    with pytest.raises(
        CheckpointError, match=r"it was trained on another backbone.*\(context_embedder.weight\)"
    ):
        check_fingerprint(record, model.backbone.parts, "it")


def test_codes_of_quantised_weights_are_not_compared(model: RewardModel) -> None:
    recorded = fingerprint(model.backbone.architecture, model.backbone.parts)
    assert recorded is not None
    parts = copy.deepcopy(model.backbone.parts)
    for layer in parts.modules():
        if isinstance(layer, nn.Linear):
            codes = torch.zeros(layer.weight.shape, dtype=torch.int8)
            layer.weight = nn.Parameter(codes, requires_grad=False)
    check_fingerprint(recorded, parts, "it")
    with torch.no_grad():
        parts.get_parameter("pos_embed.proj.weight").add_(0.1)
    with pytest.raises(CheckpointError, match=r"\(pos_embed.proj.weight\)"):
        check_fingerprint(recorded, parts, "it")
