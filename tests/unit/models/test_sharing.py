"""A caller's pipeline is never changed unasked, and `attach` shares it without a trace in the policy."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dina_lrm import InvalidInputError, RewardModel
from tests.families import load_pipeline
from tests.tiny import PROMPT, make_tiny_reward, tiny_conditioning, tiny_latents


@pytest.fixture
def pipeline(tiny_pipeline: Path) -> Any:
    return load_pipeline(tiny_pipeline)


@pytest.fixture(scope="module")
def reward(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_reward(tiny_pipeline).save_pretrained(tmp_path_factory.mktemp("reward") / "lora")


@pytest.fixture(scope="module")
def frozen_reward(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_reward(tiny_pipeline, lora_rank=0).save_pretrained(
        tmp_path_factory.mktemp("reward") / "frozen"
    )


def state_of(transformer: Any) -> dict[str, Any]:
    """Everything about a module that someone could notice."""
    return {
        "modules": [
            (name, id(module), type(module), module.training) for name, module in transformer.named_modules()
        ],
        "parameters": [
            (name, id(p), p.requires_grad, p.dtype, p.device, p.data_ptr())
            for name, p in transformer.named_parameters()
        ],
        "values": {name: tensor.clone() for name, tensor in transformer.state_dict().items()},
    }


def assert_untouched(transformer: Any, before: dict[str, Any]) -> None:
    after = state_of(transformer)
    assert after["modules"] == before["modules"]
    assert after["parameters"] == before["parameters"]
    assert all(torch.equal(after["values"][name], before["values"][name]) for name in before["values"])


def assert_same_memory(model: RewardModel, transformer: Any) -> None:
    theirs = {parameter.data_ptr() for parameter in transformer.parameters()}
    ours = [p for name, p in model.backbone.parts.named_parameters() if ".lora_" not in name]
    assert ours
    assert all(parameter.data_ptr() in theirs for parameter in ours)


def score(model: RewardModel, latents: torch.Tensor | None = None) -> torch.Tensor:
    latents = tiny_latents() if latents is None else latents
    return model.score_latents(latents, tiny_conditioning(), [0.3, 0.6], tiny_latents(seed=1))


def velocity(transformer: Any, seed: int = 3) -> torch.Tensor:
    conditioning = tiny_conditioning()
    return transformer(
        tiny_latents(seed=seed),
        conditioning.prompt_embeds,
        conditioning.pooled_prompt_embeds,
        torch.full((3,), 500.0),
    ).sample


def with_policy_adapter(transformer: Any) -> Any:
    """The policy's own LoRA, on attention and on layers the reward does not adapt."""
    from peft import LoraConfig

    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "ff.net.2"]), "policy")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".policy." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return transformer


# --- from_pretrained and initialize with a live pipeline


@pytest.mark.parametrize("kind", ["lora", "frozen", "full"])
def test_nothing_done_to_a_reward_reaches_the_callers_transformer(
    pipeline: Any, reward: Path, frozen_reward: Path, kind: str
) -> None:
    transformer = pipeline.transformer
    before = state_of(transformer)
    match kind:
        case "lora":
            model = RewardModel.from_pretrained(reward, pipeline)
        case "frozen":
            model = RewardModel.from_pretrained(frozen_reward, pipeline)
        case "full":
            model = make_tiny_reward(pipeline, lora_rank=0, tuning="full")
    score(model)
    model.train()
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    model(tiny_latents(), tiny_conditioning(), torch.full((3,), 0.4)).sum().backward()
    optimizer.step()
    model.score(PROMPT, Image.new("RGB", (16, 16)))
    model.to(torch.bfloat16)
    model.double()
    model.requires_grad_(False).eval()
    assert_untouched(transformer, before)
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_a_frozen_reward_shares_the_callers_weights(
    pipeline: Any, frozen_reward: Path, tiny_pipeline: Path
) -> None:
    model = RewardModel.from_pretrained(frozen_reward, pipeline)
    assert_same_memory(model, pipeline.transformer)
    assert not list(model.backbone.parameters()), "not registered, so never moved, cast, trained or saved"
    expected = score(RewardModel.from_pretrained(frozen_reward, tiny_pipeline))
    torch.testing.assert_close(score(model), expected, atol=0, rtol=0)
    assert model.num_parameters()["backbone"] > 0


def test_a_frozen_reward_in_another_precision_is_a_copy(pipeline: Any, frozen_reward: Path) -> None:
    model = RewardModel.from_pretrained(frozen_reward, pipeline, dtype=torch.float64)
    assert model.dtype == torch.float64
    assert pipeline.transformer.dtype == torch.float32


def test_a_frozen_reward_ignores_the_policys_adapter(pipeline: Any, frozen_reward: Path) -> None:
    model = RewardModel.from_pretrained(frozen_reward, pipeline)
    expected = score(model)
    with_policy_adapter(pipeline.transformer)
    policy = velocity(pipeline.transformer)
    assert torch.equal(score(model), expected)
    assert torch.equal(velocity(pipeline.transformer), policy)


def test_a_copy_takes_the_base_from_under_the_policys_adapter(
    pipeline: Any, reward: Path, tiny_pipeline: Path
) -> None:
    with_policy_adapter(pipeline.transformer)
    copied = RewardModel.from_pretrained(reward, pipeline)
    torch.testing.assert_close(
        score(copied), score(RewardModel.from_pretrained(reward, tiny_pipeline)), atol=0, rtol=0
    )


def test_encoders_of_a_live_pipeline_are_used_in_place(
    pipeline: Any, reward: Path, tiny_pipeline: Path
) -> None:
    image = Image.radial_gradient("L").resize((16, 24))
    live, loaded = (RewardModel.from_pretrained(reward, source) for source in (pipeline, tiny_pipeline))
    assert live.encoders.source.live is pipeline
    torch.testing.assert_close(
        live.score(PROMPT, image).scores, loaded.score(PROMPT, image).scores, atol=1e-6, rtol=0
    )


# --- attach


@pytest.mark.parametrize("policy_adapter", [False, True])
def test_attach_scores_the_same_and_leaves_the_policy_bit_equal(
    pipeline: Any, reward: Path, policy_adapter: bool
) -> None:
    model = RewardModel.from_pretrained(reward, pipeline)
    expected = score(model).detach()
    if policy_adapter:
        with_policy_adapter(pipeline.transformer)
    policy = velocity(pipeline.transformer).detach()
    trained = {name for name, p in pipeline.transformer.named_parameters() if p.requires_grad}
    model.attach(pipeline)
    assert model.attached
    assert torch.equal(velocity(pipeline.transformer), policy)
    torch.testing.assert_close(score(model), expected, atol=1e-6, rtol=0)
    assert torch.equal(velocity(pipeline.transformer), policy)
    assert trained == {name for name, p in pipeline.transformer.named_parameters() if p.requires_grad}
    assert_same_memory(model, pipeline.transformer)
    assert sum(parameter.numel() for parameter in model.parameters()) == model.num_parameters()["head"]


def test_attached_state_is_restored_after_an_error(pipeline: Any, reward: Path) -> None:
    pipeline.transformer.requires_grad_(False)
    model = RewardModel.from_pretrained(reward, pipeline).attach(pipeline)
    with_policy_adapter(pipeline.transformer)
    policy = velocity(pipeline.transformer)
    hook = model.backbone.kept_blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(model)
    hook.remove()
    assert torch.equal(velocity(pipeline.transformer), policy)
    trained = [name for name, p in pipeline.transformer.named_parameters() if p.requires_grad]
    assert trained
    assert all("policy" in name for name in trained)


def test_attached_reward_gives_gradients_through_the_latents_only(pipeline: Any, reward: Path) -> None:
    """ReFL: the policy learns from what it made, not from the reward's own use of shared weights."""
    private = RewardModel.from_pretrained(reward, pipeline).requires_grad_(False)
    attached = RewardModel.from_pretrained(reward, pipeline).attach(pipeline)
    with_policy_adapter(pipeline.transformer)
    pipeline.transformer.requires_grad_(True)
    gradients = []
    for model in (private, attached):
        pipeline.transformer.zero_grad()
        latents = tiny_latents() - 0.4 * velocity(pipeline.transformer)
        score(model, latents).sum().backward()
        gradients.append(
            {
                name: p.grad.clone()
                for name, p in pipeline.transformer.named_parameters()
                if p.grad is not None
            }
        )
    assert set(gradients[0]) == set(gradients[1])
    assert gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_an_adapter_added_later_stays_active(pipeline: Any, reward: Path) -> None:
    model = RewardModel.from_pretrained(reward, pipeline).attach(pipeline)
    expected = score(model).detach()
    with_policy_adapter(pipeline.transformer)
    policy = velocity(pipeline.transformer).detach()
    torch.testing.assert_close(score(model), expected, atol=1e-6, rtol=0)
    assert torch.equal(velocity(pipeline.transformer), policy)


def test_two_rewards_on_one_transformer(pipeline: Any, reward: Path, tiny_pipeline: Path) -> None:
    first = RewardModel.from_pretrained(reward, tiny_pipeline)
    second = make_tiny_reward(tiny_pipeline, seed=8, num_blocks=2, image_taps=(2,), text_taps=())
    expected = [score(first).detach(), score(second).detach()]
    first.attach(pipeline)
    second.attach(pipeline)
    for model, value in zip((first, second), expected, strict=True):
        torch.testing.assert_close(score(model), value, atol=1e-6, rtol=0)


def test_detach_gives_the_pipeline_back(pipeline: Any, reward: Path) -> None:
    before = copy.deepcopy(pipeline.transformer.state_dict())
    model = RewardModel.from_pretrained(reward, pipeline)
    expected = score(model).detach()
    model.attach(pipeline).detach()
    assert not model.attached
    after = pipeline.transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(score(model), expected, atol=1e-6, rtol=0)
    with pytest.raises(AssertionError):
        assert_same_memory(model, pipeline.transformer)


def test_detach_leaves_the_policys_adapter(pipeline: Any, reward: Path) -> None:
    model = RewardModel.from_pretrained(reward, pipeline)
    with_policy_adapter(pipeline.transformer)
    policy = velocity(pipeline.transformer)
    model.attach(pipeline).detach()
    assert torch.equal(velocity(pipeline.transformer), policy)


@pytest.mark.parametrize("layout", ["dina", "published"])
def test_an_attached_reward_can_be_saved(
    pipeline: Any, reward: Path, tiny_pipeline: Path, tmp_path: Path, layout: str
) -> None:
    model = RewardModel.from_pretrained(reward, pipeline)
    expected = score(model).detach()
    with_policy_adapter(pipeline.transformer)
    model.attach(pipeline).save_pretrained(tmp_path / "again", layout)
    loaded = RewardModel.from_pretrained(tmp_path / "again", tiny_pipeline)
    torch.testing.assert_close(score(loaded), expected, atol=0, rtol=0)


def test_attach_refuses_what_cannot_work(
    pipeline: Any, reward: Path, tiny_pipeline: Path, tiny_backbone: Path
) -> None:
    model = RewardModel.from_pretrained(reward, tiny_pipeline)
    with pytest.raises(InvalidInputError, match="live diffusers pipeline"):
        model.attach(tiny_pipeline)
    with pytest.raises(InvalidInputError, match="nothing to share"):
        make_tiny_reward(tiny_backbone, lora_rank=0, tuning="full").attach(pipeline)
    model.attach(pipeline)
    with pytest.raises(InvalidInputError, match="already"):
        model.attach(pipeline)
    with_policy_adapter(pipeline.transformer)
    for layer in pipeline.transformer.modules():
        if hasattr(layer, "merged_adapters"):
            layer.merge(adapter_names=["policy"])
    with pytest.raises(InvalidInputError, match=r"base weights .*changed.*unfuse"):
        score(model)
