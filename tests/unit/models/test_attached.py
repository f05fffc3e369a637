"""An attached reward beside a pipeline that goes on living: either side is what it would be alone."""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dina_lrm import CheckpointError, InvalidInputError, RewardModel
from tests.families import (
    family_conditioning,
    family_latents,
    generate_latents,
    load_pipeline,
    make_family_reward,
    network_of,
)
from tests.tiny import PROMPT, WORDS

CHANGED = "base weights of the shared network have changed"


@pytest.fixture
def model(family: str, family_folders: Any) -> RewardModel:
    return make_family_reward(family_folders(family))


@pytest.fixture(autouse=True)
def peft_talks() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter style was active|Already found a `peft_config`")
        yield


def score(model: RewardModel, family: str) -> Tensor:
    with torch.no_grad():
        return model.score_latents(family_latents(family), family_conditioning(family), [0.2, 0.7], seed=0)


def picture_of(pipeline: Any) -> Tensor:
    return generate_latents(pipeline, PROMPT, steps=2, height=64, width=64)


def add_lora(pipeline: Any, name: str = "style", *, size: float = 0.1) -> None:
    """A LoRA of the pipeline's own, on attention alone, as those that people load."""
    from peft import LoraConfig

    network = network_of(pipeline)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if f".{name}." in key:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    network.set_adapter(name)


@pytest.mark.long
def test_adapters_of_the_pipeline_come_and_go(
    family: str, pipeline: Any, model: RewardModel, family_folders: Any
) -> None:
    """The reward scores the same, and the pipeline draws what a pipeline draws that has no reward."""
    expected, alone = score(model, family), load_pipeline(family_folders(family))
    plain, own = picture_of(alone), make_family_reward(family_folders(family))
    picture = Image.radial_gradient("L").resize((64, 64))
    model.attach(pipeline)
    drawn = []
    steps = (
        lambda pipe: None,
        add_lora,
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: add_lora(pipe, "other", size=0.2),
        lambda pipe: pipe.set_adapters("style"),
        lambda pipe: pipe.delete_adapters("style"),
        lambda pipe: pipe.delete_adapters("other"),
        add_lora,
        lambda pipe: pipe.unload_lora_weights(),
    )
    for number, step in enumerate(steps):
        for either in (pipeline, alone):
            step(either)
        torch.testing.assert_close(score(model, family), expected, atol=1e-5, rtol=0)
        prompt = f"a {WORDS[number]} circle"  # a new one, so that it is encoded
        one, other = (reward.score(prompt, picture).scores for reward in (model, own))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        drawn.append(picture_of(pipeline))
        assert torch.equal(drawn[-1], picture_of(alone))
    model.detach()
    torch.testing.assert_close(score(model, family), expected, atol=1e-5, rtol=0)
    assert torch.equal(drawn[-1], plain)
    assert not torch.equal(drawn[1], plain)


def test_fused_weights_are_refused_while_they_are_fused(
    family: str, pipeline: Any, model: RewardModel, tmp_path: Path, family_folders: Any
) -> None:
    expected = score(model, family)
    saved = model.save_pretrained(tmp_path / "reward")
    frozen = make_family_reward(family_folders(family), lora_rank=0).save_pretrained(tmp_path / "frozen")
    model.attach(pipeline)
    add_lora(pipeline, size=0.05)
    plain = picture_of(pipeline)
    pipeline.fuse_lora()
    for use in (lambda: score(model, family), model.detach):
        for _ in range(2):
            with pytest.raises(InvalidInputError, match=f"{CHANGED}.*att.*unfuse_lora"):
                use()
    pipeline.unfuse_lora()
    torch.testing.assert_close(score(model, family), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(picture_of(pipeline), plain, atol=1e-4, rtol=0)

    pipeline.fuse_lora()
    pipeline.unload_lora_weights()  # no trace but the values of attention weights
    fused = picture_of(pipeline)
    with pytest.raises(InvalidInputError, match=CHANGED):
        score(model, family)
    other = RewardModel.from_pretrained(saved)
    with pytest.raises(InvalidInputError, match=r"has other base weights than the reward.*att"):
        other.attach(pipeline)
    for reward in (saved, frozen):
        with pytest.raises(CheckpointError, match=r"another backbone.* base weights"):
            RewardModel.from_pretrained(reward, pipeline)
    assert torch.equal(picture_of(pipeline), fused)
    torch.testing.assert_close(score(other, family), expected, atol=0, rtol=0)


@pytest.mark.parametrize("lora_rank", [2, 0])
def test_other_weights_are_refused(
    family: str, pipeline: Any, lora_rank: int, tmp_path: Path, family_folders: Any
) -> None:
    """Even if a single weight is another one."""
    model = make_family_reward(family_folders(family), lora_rank=lora_rank)
    saved = model.save_pretrained(tmp_path / "reward")
    name = model.backbone.block_names[0]
    weight = [p for key, p in network_of(pipeline).get_submodule(name).named_parameters() if p.ndim > 1][-1]
    with torch.no_grad():
        weight.mul_(1.02)
    drawn = picture_of(pipeline)
    with pytest.raises(InvalidInputError, match=f"other base weights than the reward.*{name}"):
        model.attach(pipeline)
    with pytest.raises(CheckpointError, match=f"different base weights.*{name}"):
        RewardModel.from_pretrained(saved, pipeline)
    assert torch.equal(picture_of(pipeline), drawn)


def test_the_reward_follows_a_pipeline_that_is_cast(family: str, pipeline: Any, model: RewardModel) -> None:
    expected = score(model, family)
    model.attach(pipeline)
    pipeline.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    torch.testing.assert_close(score(model, family), expected, atol=0.05, rtol=0)
    with torch.no_grad():
        for parameter in network_of(pipeline).parameters():
            parameter.mul_(1.05)
    for _ in range(2):
        with pytest.raises(InvalidInputError, match=CHANGED):
            score(model, family)


def test_two_threads_on_one_pipeline(family: str, pipeline: Any, model: RewardModel) -> None:
    """One draws with a style of its own, the other scores with new prompts every time."""
    add_lora(pipeline)
    pictures = [Image.radial_gradient("L").resize((64, 64)), Image.linear_gradient("L").resize((64, 64))]
    prompts = [f"a {size} red circle" for size in ("small", "large", "green", "blue", "gray")]

    def draw() -> Tensor:
        return generate_latents(pipeline, PROMPT, steps=2, height=64, width=64)

    def judge(prompt: str) -> Tensor:
        with torch.no_grad():
            scores = model.score(prompt, pictures).scores
            return torch.cat([scores, score(model, family)])

    drawn, expected = draw(), [judge(prompt) for prompt in prompts]
    model.attach(pipeline)
    with ThreadPoolExecutor(2) as pool:
        drawing = pool.submit(lambda: [draw() for _ in range(6)])
        judging = pool.submit(lambda: [judge(prompt) for prompt in prompts])
        assert all(torch.equal(picture, drawn) for picture in drawing.result())
        for found, known in zip(judging.result(), expected, strict=True):
            torch.testing.assert_close(found, known, atol=1e-5, rtol=0)
    assert torch.equal(draw(), drawn)


def add_encoder_lora(encoder: Any) -> None:
    """By PEFT itself: some versions of transformers ask for one that is not out yet."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), encoder, "style"
    )


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_a_lora_of_a_text_encoder_does_not_reach_the_reward(
    family: str, pipeline: Any, model: RewardModel
) -> None:
    model.attach(pipeline)
    expected = model.encode_prompts(PROMPT)
    add_encoder_lora(pipeline.text_encoder)
    styled = pipeline.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False)[0]
    assert not torch.equal(styled, expected.prompt_embeds)
    assert model.encoders is not None
    model.encoders.text.clear_cache()
    assert torch.equal(model.encode_prompts(PROMPT).prompt_embeds, expected.prompt_embeds)


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_offloaded_parts(family: str, pipeline: Any, model: RewardModel) -> None:
    """Encoders whose weights come with their own calls are called; a network is refused, as is a LoRA."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    picture = Image.radial_gradient("L").resize((64, 64))
    expected = model.score(PROMPT, picture).scores
    model.attach(pipeline)
    for part in (pipeline.text_encoder, pipeline.vae):
        add_hook_to_module(part, ModelHook())
    torch.testing.assert_close(model.score(PROMPT, picture).scores, expected, atol=1e-5, rtol=0)
    add_encoder_lora(pipeline.text_encoder)
    with pytest.raises(InvalidInputError, match=r"text_encoder .*LoRA \(style\)"):
        model.score("a blue circle", picture)
    model.detach()
    add_hook_to_module(pipeline.unet.down_blocks[0], ModelHook())
    with pytest.raises(InvalidInputError, match=r"down_blocks\.0 .*replaced"):
        model.attach(pipeline)
