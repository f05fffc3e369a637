"""LoRA: where it sits, that merging changes nothing but speed, and that its weights stay in float32."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dina_lrm import RewardModelConfig
from dina_lrm.backbones.sd3 import SD3Backbone
from tests.tiny import make_tiny_reward, tiny_conditioning, tiny_latents

PROJECTIONS, TEXT_PROJECTIONS = SD3Backbone.lora_targets, SD3Backbone.lora_text_targets

NOISE = tiny_latents(seed=9)


def score(model, **changes: object) -> torch.Tensor:
    with torch.no_grad():
        return model.score_latents(tiny_latents(), tiny_conditioning(), 0.4, NOISE, **changes)


@pytest.mark.parametrize(("text_taps", "adapted"), [((1, 3), True), ((1, 2), False), ((), False)])
def test_which_projections_are_adapted(tiny_backbone: Path, text_taps: tuple, adapted: bool) -> None:
    model = make_tiny_reward(tiny_backbone, text_taps=text_taps)
    assert model.adapter is not None
    modules = set(model.adapter.layers)
    expected = {f"transformer_blocks.{block}.attn.{name}" for block in range(3) for name in PROJECTIONS}
    expected |= {f"transformer_blocks.0.attn2.{name}" for name in PROJECTIONS[:4]}  # the dual block
    if not adapted:
        expected -= {f"transformer_blocks.2.attn.{name}" for name in TEXT_PROJECTIONS}
    assert modules == expected


def test_excluded_modules_are_recorded() -> None:
    config = RewardModelConfig(
        backbone="sd3", num_blocks=12, image_taps=(12,), text_taps=(12,), lora_rank=4, lora_alpha=8.0
    )
    assert config.lora_config().exclude_modules is None
    excluded = replace(config, text_taps=(8,)).lora_config().exclude_modules
    assert set(excluded) == {f"transformer_blocks.11.attn.{name}" for name in TEXT_PROJECTIONS}


def test_merged_equals_unmerged_and_unmerging_is_exact(tiny_backbone: Path) -> None:
    model = make_tiny_reward(tiny_backbone)
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    apart = score(model.unmerge())
    assert not model.adapter.merged
    merged = score(model.merge())
    assert model.adapter.merged
    torch.testing.assert_close(merged, apart, atol=1e-6, rtol=0)
    model.train()
    assert not model.adapter.merged
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_adapter_matters(tiny_backbone: Path) -> None:
    model = make_tiny_reward(tiny_backbone)
    with_adapter = score(model)
    for parameter in model.adapter.parameters():
        parameter.data.zero_()  # past autograd's version counter, as weight averaging does it
    assert (score(model) - with_adapter).abs().min() > 1e-3, "merged weights went stale"


def test_merged_only_while_no_gradient_is_wanted(tiny_backbone: Path) -> None:
    model = make_tiny_reward(tiny_backbone)
    score(model)
    assert model.adapter.merged
    model.score_latents(tiny_latents(), tiny_conditioning(), 0.4, NOISE).sum().backward()
    assert all(parameter.grad is not None for parameter in model.adapter.parameters())
    model.requires_grad_(False)
    model.score_latents(tiny_latents().requires_grad_(), tiny_conditioning(), 0.4, NOISE)
    assert model.adapter.merged


def test_state_dict_of_a_merged_model_is_that_of_an_unmerged_one(tiny_backbone: Path) -> None:
    model = make_tiny_reward(tiny_backbone)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_copy_of_a_merged_model_stands_alone(tiny_backbone: Path) -> None:
    model = make_tiny_reward(tiny_backbone)
    merged = score(model)
    twin = copy.deepcopy(model)
    model.train()
    torch.testing.assert_close(score(twin), merged, atol=0, rtol=0)
    twin.train()
    torch.testing.assert_close(score(twin), score(model.eval()), atol=1e-6, rtol=0)


def test_master_weights_stay_float32(tiny_backbone: Path) -> None:
    model = make_tiny_reward(tiny_backbone, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.adapter.parameters()} == {torch.float32}
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    assert score(model).dtype == torch.float32
    cast = make_tiny_reward(tiny_backbone).to(torch.bfloat16)
    assert cast.dtype == torch.bfloat16
    assert {p.dtype for p in (*cast.head.parameters(), *cast.adapter.parameters())} == {torch.float32}
    torch.testing.assert_close(score(cast), score(model), atol=0, rtol=0)
    torch.testing.assert_close(score(cast), score(make_tiny_reward(tiny_backbone)), atol=0.1, rtol=0)


def test_float64_throughout(tiny_backbone: Path) -> None:
    model = make_tiny_reward(tiny_backbone).double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert score(model).dtype == torch.float64


def test_gradients_reach_what_trains_and_nothing_else(tiny_backbone: Path) -> None:
    model = make_tiny_reward(tiny_backbone, num_blocks=4, image_taps=(1, 3), text_taps=(1, 2)).train()
    model(tiny_latents(), tiny_conditioning(), torch.full((3,), 0.4)).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    # a key's bias cancels in the softmax, so its gradient is zero up to round-off
    assert {name for name in trainable ^ with_gradient if "to_k_" not in name} == {
        # the text stream ends inside block 3: its queries and outputs are read by nobody
        f"backbone.transformer_blocks.2.attn.{projection}.{side}.default.weight"
        for projection in ("add_q_proj", "to_add_out")
        for side in ("lora_A", "lora_B")
    }
    assert not [name for name in trainable if "transformer_blocks.3" in name], "block 4 is after the last tap"
    assert all("lora_" in name for name in trainable if name.startswith("backbone."))


@pytest.mark.parametrize(
    ("settings", "trained"), [({"lora_rank": 0}, 0), ({"tuning": "full", "lora_rank": 0}, 1)]
)
def test_frozen_and_full(tiny_backbone: Path, settings: dict, trained: int) -> None:
    model = make_tiny_reward(tiny_backbone, **settings).train()
    model(tiny_latents(), tiny_conditioning(), torch.full((3,), 0.4)).sum().backward()
    grads = [p.grad is not None for p in model.backbone.parameters()]
    assert any(grads) == bool(trained)
    assert all(p.requires_grad == bool(trained) for p in model.backbone.parameters())
    assert all(p.requires_grad for p in model.head.parameters())
