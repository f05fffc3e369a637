"""The adapter that is trained: its reference, its size, its file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_lrm.backbones.lora import tuner_layers
from dina_lrm.errors import InvalidInputError
from dina_lrm.sampling.policy import Policy
from tests.families import load_pipeline, make_family_reward

PROMPTS = ["a red circle", "two blue square"]
Folders = Callable[[str], Path]


def trained(policy: Policy) -> Policy:
    """As if some updates had been made."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def prediction(policy: Policy) -> torch.Tensor:
    latents = torch.randn(2, *policy.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.predict(latents, policy.encode(PROMPTS), torch.tensor([400.0, 400.0]))


@pytest.mark.parametrize("family", ["sd3", "flux", "sd15", "sdxl"])
def test_reference_is_the_network_without_the_adapter(family_folders: Folders, family: str) -> None:
    plain = prediction(Policy(load_pipeline(family_folders(family))))
    policy = Policy(load_pipeline(family_folders(family)), lora_rank=2)
    assert torch.equal(prediction(policy), plain)  # B = 0 at first
    trained(policy)
    changed = prediction(policy)
    assert not torch.allclose(changed, plain)
    with policy.reference():
        assert torch.equal(prediction(policy), plain)
    assert torch.equal(prediction(policy), changed)


def test_only_the_adapter_is_trainable(family_folders: Folders) -> None:
    policy = Policy(load_pipeline(family_folders("sd3")), lora_rank=2)
    trainable = {name for name, value in policy.network.named_parameters() if value.requires_grad}
    assert trainable == set(policy.parameters())
    assert all(value.dtype == torch.float32 for value in policy.parameters().values())


def test_distance_is_the_relative_norm_of_the_change(family_folders: Folders) -> None:
    policy = Policy(load_pipeline(family_folders("sd3")), lora_rank=2)
    assert policy.distance() == 0.0
    trained(policy)
    moved = total = 0.0
    for layer in tuner_layers(policy.network):
        delta = layer.get_delta_weight("policy").detach().double()
        moved += float(delta.square().sum())
        total += float(layer.get_base_layer().weight.double().square().sum())
    assert policy.distance() == pytest.approx((moved / total) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_the_file_is_loaded_by_diffusers(family_folders: Folders, family: str, tmp_path: Path) -> None:
    policy = trained(Policy(load_pipeline(family_folders(family)), lora_rank=2))
    policy.save_lora(tmp_path)
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()
    pipeline = load_pipeline(family_folders(family))
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(prediction(Policy(pipeline)), prediction(policy), rtol=1e-4, atol=1e-5)


def test_an_attached_reward_scores_without_the_policys_adapter(family_folders: Folders) -> None:
    """The reward does not change with the policy, and the policy does not with the reward."""
    pipeline = load_pipeline(family_folders("sd3"))
    policy = Policy(pipeline, lora_rank=2)
    reward = make_family_reward(pipeline)
    latents = torch.randn(2, *policy.latent_shape(32, 32), generator=torch.Generator().manual_seed(1))
    alone = reward.eval().score_latents(latents, reward.encode_prompts(PROMPTS), seed=0)
    reward.attach(pipeline)
    trained(policy)
    changed = prediction(policy)
    shared = reward.score_latents(latents, reward.encode_prompts(PROMPTS), seed=0)
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(prediction(policy), changed)


def test_checkpointing_changes_no_gradient(family_folders: Folders) -> None:
    gradients = []
    for checkpointing in (False, True):
        pipeline = load_pipeline(family_folders("sd3"))
        policy = trained(Policy(pipeline, lora_rank=2, gradient_checkpointing=checkpointing))
        latents = torch.randn(2, *policy.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
        policy.predict(
            latents, policy.encode(PROMPTS), torch.tensor([400.0, 400.0])
        ).square().mean().backward()
        gradients.append([value.grad for value in policy.parameters().values()])
    assert any(one is not None and one.abs().max() > 0 for one in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_a_policy_is_refused(family_folders: Folders) -> None:
    with pytest.raises(InvalidInputError, match="a live diffusers pipeline"):
        Policy(str(family_folders("sd3")))
    with pytest.raises(InvalidInputError, match=r"sd3, flux, unet.* qwen_image"):
        Policy(load_pipeline(family_folders("qwen_image")))
    pipeline = load_pipeline(family_folders("sd3"))
    Policy(pipeline, lora_rank=2)
    with pytest.raises(InvalidInputError, match="an adapter 'policy' already"):
        Policy(pipeline, lora_rank=2)


def styled(folder: Path, tmp_path: Path) -> tuple[Any, torch.Tensor]:
    """A pipeline with a LoRA "style" that is active, and what it predicts."""
    other = trained(Policy(load_pipeline(folder), lora_rank=2, seed=3))
    other.save_lora(tmp_path)
    pipeline = load_pipeline(folder)
    pipeline.load_lora_weights(tmp_path, adapter_name="style")
    return pipeline, prediction(other)


def test_an_active_lora_is_not_dropped_silently(family_folders: Folders, tmp_path: Path) -> None:
    pipeline, pictures = styled(family_folders("sd3"), tmp_path)
    assert torch.allclose(prediction(Policy(pipeline)), pictures, rtol=1e-4, atol=1e-5)  # without an adapter
    with pytest.raises(InvalidInputError, match=r"active LoRA \(style\).* unload_lora_weights\(\)"):
        Policy(pipeline, lora_rank=2)
    pipeline.fuse_lora()
    with pytest.raises(InvalidInputError, match=r"fused into its weights .*\(style\)"):
        Policy(pipeline, lora_rank=2)
    pipeline.unload_lora_weights()  # as both messages say: the run starts from the style
    policy = Policy(pipeline, lora_rank=2)
    torch.testing.assert_close(prediction(policy), pictures, rtol=1e-4, atol=1e-5)
    with policy.reference():
        torch.testing.assert_close(prediction(policy), pictures, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(prediction(trained(policy)), pictures, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_lora_that_is_switched_off_stays_off_and_the_policy_learns(
    family_folders: Folders, tmp_path: Path
) -> None:
    plain = prediction(Policy(load_pipeline(family_folders("sd3"))))
    pipeline, _ = styled(family_folders("sd3"), tmp_path)
    pipeline.disable_lora()
    policy = Policy(pipeline, lora_rank=2)
    assert torch.equal(prediction(policy), plain)
    assert not torch.allclose(prediction(trained(policy)), plain)


class TensorOfItsOwn(torch.Tensor):
    """What torchao and quanto keep their integers in: a tensor type that calls itself bfloat16."""


@pytest.mark.parametrize("kind", ["integers", "type"])
def test_quantised_weights_are_refused(family_folders: Folders, kind: str) -> None:
    """bitsandbytes keeps int8 parameters; the layer is named."""
    pipeline = load_pipeline(family_folders("sd3"))
    layer = pipeline.transformer.transformer_blocks[1].attn.to_k
    if kind == "integers":
        layer.weight = torch.nn.Parameter((layer.weight * 100).to(torch.int8), requires_grad=False)
    else:
        layer.weight = torch.nn.Parameter(
            layer.weight.detach().as_subclass(TensorOfItsOwn), requires_grad=False
        )
    with pytest.raises(InvalidInputError, match=r"quantised weights .* transformer_blocks\.1\.attn\.to_k"):
        Policy(pipeline, lora_rank=2)
