"""flow_grpo's calls, as its registry and its trainers make them."""

import inspect
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dina_lrm import Conditioning, InvalidInputError, RewardModel
from dina_lrm.integrations.flow_grpo import diffusion_rm_score, dina_score, register
from dina_lrm.pipelines.source import bundled_folder


@pytest.fixture(scope="module")
def reward() -> Callable[..., Any]:
    return dina_score("cpu", reward="bundled", noise_levels=0.4, seed=3)


@pytest.fixture
def expected(bundled: RewardModel, prompts: list[str], pictures: Tensor) -> list[float]:
    return bundled.score(prompts, pictures, 0.4, 3).scores.tolist()


# --- pictures


def test_the_registry_can_tell_that_the_factory_takes_a_device() -> None:
    assert "device" in inspect.unwrap(dina_score).__code__.co_varnames


def test_float_tensors_and_uint8_arrays_score_as_the_model_does(
    reward: Callable[..., Any], prompts: list[str], pictures: Tensor, expected: list[float]
) -> None:
    arrays = pictures.permute(0, 2, 3, 1).numpy()
    arrays.flags.writeable = False
    from_arrays, info = reward(arrays, prompts, [{}, {}])
    assert (from_arrays, info) == (expected, {})
    from_floats, _ = reward(pictures.float() / 255, tuple(prompts), [{}, {}])
    assert from_floats == expected
    assert expected[0] != expected[1]


def test_threads_of_the_trainers_executor(
    reward: Callable[..., Any], prompts: list[str], pictures: Tensor, expected: list[float]
) -> None:
    images = pictures.float() / 255
    with ThreadPoolExecutor(8) as executor:
        futures = [executor.submit(reward, images, prompts, None) for _ in range(8)]
        assert [future.result()[0] for future in futures] == [expected] * 8


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 3, 64, 64), torch.nan), "nan"),
        (torch.full((2, 3, 64, 64), 1.5), r"must be in \[0, 1\]"),
        (torch.zeros(3, 64, 64), r"Tensor torch.float32 torch.Size\(\[3, 64, 64\]\)"),
        (np.zeros((2, 64, 64, 3), np.float32), r"ndarray float32 \(2, 64, 64, 3\)"),
        (np.zeros((2, 3, 64, 64), np.uint8), "1, 3 or 4 channels"),
        (["a.png", "b.png"], "images are list"),
        (torch.zeros(1, 3, 64, 64), "2 prompts for 1 images"),
    ],
)
def test_bad_pictures(reward: Callable[..., Any], prompts: list[str], images: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        reward(images, prompts, None)


# --- the registry


@pytest.fixture
def rewards(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of flow_grpo's shape: a registry inside multi_score, two rewards of its own."""
    module: Any = ModuleType("flow_grpo.rewards")

    def brightness(device: Any) -> Callable[..., Any]:
        return lambda images, prompts, metadata: (images.mean(dim=(1, 2, 3)).tolist(), {})

    def length() -> Callable[..., Any]:
        return lambda images, prompts, metadata: (np.array([len(prompt) for prompt in prompts]), {})

    def multi_score(device: Any, score_dict: dict[str, float]) -> Callable[..., Any]:
        registry = {"brightness": brightness, "length": length}
        functions = {
            name: registry[name](device)
            if "device" in registry[name].__code__.co_varnames
            else registry[name]()
            for name in score_dict
        }

        def _fn(
            images: Any, prompts: Any, metadata: Any, ref_images: Any = None, only_strict: bool = True
        ) -> Any:
            module.last_call = {"ref_images": ref_images, "only_strict": only_strict}
            total: list[float] = []
            details: dict[str, Any] = {}
            for name, weight in score_dict.items():
                scores, _ = functions[name](images, prompts, metadata)
                details[name] = scores
                weighted = [weight * score for score in scores]
                total = [a + b for a, b in zip(total, weighted, strict=True)] if total else weighted
            details["avg"] = total
            return details, {"from": "flow_grpo"}

        return _fn

    module.multi_score = multi_score
    package: Any = ModuleType("flow_grpo")
    package.rewards = module
    monkeypatch.setitem(sys.modules, "flow_grpo", package)
    monkeypatch.setitem(sys.modules, "flow_grpo.rewards", module)
    return module


def test_a_registered_reward_is_one_term_of_the_sum(
    rewards: Any, prompts: list[str], pictures: Tensor, expected: list[float]
) -> None:
    register("dina", reward="bundled", noise_levels=0.4, seed=3)
    images = pictures.float() / 255
    reward_fn = rewards.multi_score("cpu", {"length": 0.25, "dina": 2.0, "brightness": 3.0})
    found, info = reward_fn(images, prompts, [{}, {}], only_strict=False)
    assert list(found) == ["length", "brightness", "avg", "dina"]
    assert found["dina"] == expected
    bright = images.mean(dim=(1, 2, 3)).tolist()
    for i in range(2):
        by_hand = 0.25 * len(prompts[i]) + 3.0 * bright[i] + 2.0 * expected[i]
        assert found["avg"][i] == pytest.approx(by_hand, rel=1e-12)
    assert info == {"from": "flow_grpo"}
    assert rewards.last_call == {"ref_images": None, "only_strict": False}


def test_ours_alone_needs_nothing_of_theirs(
    rewards: Any, prompts: list[str], pictures: Tensor, expected: list[float]
) -> None:
    register(reward="bundled", noise_levels=0.4, seed=3)
    found, info = rewards.multi_score("cpu", {"dina": 0.5})(pictures.float() / 255, prompts, None)
    assert (found, info) == ({"dina": expected, "avg": [0.5 * score for score in expected]}, {})
    assert not hasattr(rewards, "last_call")


def test_two_names_and_a_name_registered_again(
    rewards: Any, bundled: RewardModel, prompts: list[str], pictures: Tensor
) -> None:
    register("low", reward="bundled", noise_levels=0.9, seed=0)
    register("high", reward="bundled", noise_levels=0.7, seed=0)
    register("low", reward="bundled", noise_levels=0.2, seed=0)
    found, _ = rewards.multi_score("cpu", {"low": 1.0, "high": 1.0})(pictures.float() / 255, prompts, None)
    low, high = (bundled.score(prompts, pictures, level, 0).scores.tolist() for level in (0.2, 0.7))
    assert (found["low"], found["high"]) == (low, high)
    assert found["avg"] == [a + b for a, b in zip(low, high, strict=True)]


def test_rewards_of_flow_grpo_alone_are_left_to_it(
    rewards: Any, prompts: list[str], pictures: Tensor
) -> None:
    register("dina", reward="nowhere")
    found, _ = rewards.multi_score("cpu", {"length": 2.0})(pictures, prompts, None, None, True)
    assert found["avg"] == [2.0 * len(prompt) for prompt in prompts]
    with pytest.raises(KeyError):
        rewards.multi_score("cpu", {"unknown": 1.0})


# --- latents


@pytest.fixture
def pipeline() -> Any:
    """A policy as the trainers have it: its transformer wrapped by PEFT, LoRA not at zero."""
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig, get_peft_model

    from dina_lrm.pipelines.libraries import quiet_loading

    with quiet_loading():
        pipeline = StableDiffusion3Pipeline.from_pretrained(bundled_folder("pipeline"))
    pipeline.transformer = get_peft_model(
        pipeline.transformer, LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    return pipeline


def embeds(conditioning: Conditioning) -> tuple[Tensor, Tensor]:
    assert conditioning.pooled_prompt_embeds is not None
    return conditioning.prompt_embeds, conditioning.pooled_prompt_embeds


def test_latents_score_as_the_model_does_over_the_policys_own_transformer(
    pipeline: Any, bundled: RewardModel, latents: Tensor, conditioning: Conditioning
) -> None:
    def policy() -> Tensor:
        with torch.no_grad():
            return pipeline.transformer(latents, *embeds(conditioning), torch.full((2,), 500.0)).sample

    before, trainable = policy(), [p for p in pipeline.transformer.parameters() if p.requires_grad]
    reward_fn = diffusion_rm_score(pipeline, "cpu", torch.float32, reward="bundled", seed=5)
    leaf = latents.clone().requires_grad_()
    found, info = reward_fn(leaf, *embeds(conditioning))
    scores = found["diffusion_rm_0.4"]
    expected = bundled.score_latents(latents, conditioning, 0.4, seed=5)
    assert (sorted(found), info) == (["avg", "diffusion_rm_0.4"], {})
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)  # LoRA beside, not merged
    assert found["avg"] == scores.tolist()

    wanted = latents.clone().requires_grad_()
    bundled.score_latents(wanted, conditioning, 0.4, seed=5).sum().backward()
    scores.sum().backward()
    assert wanted.grad is not None
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, wanted.grad, atol=1e-4 * float(wanted.grad.abs().max()), rtol=1e-3)

    assert torch.equal(policy(), before), "the policy keeps its adapter, without ours"
    assert [p for p in pipeline.transformer.parameters() if p.requires_grad] == trainable
    assert all(p.grad is None for p in pipeline.transformer.parameters())
    assert pipeline.transformer.active_adapters == ["default"]


def test_the_noise_level_is_in_the_name_and_fresh_noise_is_fresh(
    pipeline: Any, bundled: RewardModel, latents: Tensor, conditioning: Conditioning
) -> None:
    reward_fn = diffusion_rm_score(pipeline, "cpu", torch.float32, reward="bundled")
    with torch.no_grad():
        torch.manual_seed(0)
        first, _ = reward_fn(latents, *embeds(conditioning), u=0.7)
        second, _ = reward_fn(latents, *embeds(conditioning), u=0.7)
        torch.manual_seed(0)
        again, _ = reward_fn(latents, *embeds(conditioning), 0.7, [{}, {}])
    assert sorted(first) == ["avg", "diffusion_rm_0.7"]
    assert first["avg"] != second["avg"]
    assert first["avg"] == again["avg"]
    with pytest.raises(InvalidInputError, match="NaN"):
        reward_fn(torch.full_like(latents, torch.nan), *embeds(conditioning))
    with pytest.raises(InvalidInputError, match="4 channels"):
        reward_fn(latents[:, :4], *embeds(conditioning))
    with pytest.raises(InvalidInputError, match=r"= 1.5 is outside \[0, 1\]"):
        reward_fn(latents, *embeds(conditioning), u=1.5)


def test_a_transformer_on_another_device_is_said(pipeline: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"device = 'cuda'.* cpu"):
        diffusion_rm_score(pipeline, "cuda", torch.float32, reward="bundled")


def test_a_setting_that_is_misspelt_is_refused_when_it_is_registered(rewards: Any) -> None:
    with pytest.raises(InvalidInputError, match="did you mean noise_levels"):
        register("dina", reward="bundled", noise_level=0.4)
