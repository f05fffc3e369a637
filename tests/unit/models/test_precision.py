"""Half precision: what it may round, and what must stay float32 in every path from a level to a score."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_lrm import RewardModel
from dina_lrm.core.preference import group_advantages
from tests.families import FAMILIES, family_conditioning, family_latents, make_family_reward
from tests.tiny import make_tiny_reward, tiny_conditioning, tiny_latents

TIME_EMBEDDERS = {
    "sd3": "time_text_embed",
    "flux": "time_text_embed",
    "z_image": "t_embedder",
    "qwen_image": "time_text_embed",
    "sd15": "time_proj",
    "sdxl": "time_proj",
    "wan": "condition_embedder.timesteps_proj",
}
"""The module of each network that is told the timestep."""
LEVELS = [0.2, 0.7, 0.9783]

# Under autocast an RMSNorm meets bfloat16 tokens with a float32 scale, as intended.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


def score(model: RewardModel, family: str, levels: Any = LEVELS) -> Tensor:
    return model.score_latents(family_latents(family), family_conditioning(family), levels, seed=0)


def under_autocast(model: RewardModel, family: str, levels: Any = LEVELS) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return score(model, family, levels)


def in_bfloat16(model: RewardModel, family: str, levels: Any = LEVELS) -> Tensor:
    return score(model.to(torch.bfloat16), family, levels)


HALF_PATHS = [under_autocast, in_bfloat16]


@pytest.mark.parametrize("half", HALF_PATHS)
@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_half_precision_scores_are_the_float32_scores(
    family: str, half: Callable[..., Tensor], family_folders: Callable[[str], Path]
) -> None:
    model = make_family_reward(family_folders(family)).requires_grad_(False)
    expected = torch.stack([score(model, family, level) for level in LEVELS])
    found = torch.stack([half(model, family, level) for level in LEVELS])
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("half", HALF_PATHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_networks_are_told_unrounded_times(
    family: str, half: Callable[..., Tensor], family_folders: Callable[[str], Path]
) -> None:
    """978.26 is 976 in bfloat16, and a guidance of 1000 x 3.5 is 3504: other states of another reward."""
    model = make_family_reward(family_folders(family)).requires_grad_(False)
    told: list[tuple[Any, ...]] = []
    embedder = model.backbone.parts.get_submodule(TIME_EMBEDDERS[family])
    embedder.register_forward_pre_hook(lambda _, args: told.append(args))
    levels = [0.30021, 0.9783]
    half(model, family, levels)
    times = told[0][0]
    assert times.dtype == torch.float32
    expected = model.schedule.match(torch.tensor(levels)).timestep.repeat_interleave(2)
    if family == "qwen_image":  # multiplied by 1000 inside
        expected = expected / 1000
    if family == "z_image":
        expected = 1000 - expected
    torch.testing.assert_close(times, expected, atol=0, rtol=1e-6)
    if family == "flux":
        assert told[0][1].tolist() == [3500.0] * 4


@pytest.mark.parametrize("half", HALF_PATHS)
def test_scores_are_float32(half: Callable[..., Tensor], family_folders: Callable[[str], Path]) -> None:
    """Scores near 10 lie 0.06 apart in bfloat16, so that pictures of one group would seem to tie."""
    model = make_family_reward(family_folders("sd3"), logistic=False).requires_grad_(False)
    with torch.no_grad():
        model.head.head.bias.fill_(10.0)
    latents = torch.cat([family_latents("sd3"), family_latents("sd3", seed=1)])
    conditioning = family_conditioning("sd3", 4)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    close = latents[:1] + 1e-2 * (latents - latents[:1])
    for ensemble in ("tokens", "scores"):
        exact = model.score_latents(close, conditioning, [0.2, 0.7], noise, ensemble=ensemble)
        with torch.autocast("cpu", torch.bfloat16, enabled=half is under_autocast):
            scorer = model if half is under_autocast else model.to(torch.bfloat16)
            found = scorer.score_latents(close, conditioning, [0.2, 0.7], noise, ensemble=ensemble)
            state = scorer.score_state(close, conditioning, torch.full((4,), 300.0))
            raw = scorer(close, conditioning, torch.full((4,), 0.4))
        assert found.dtype == state.dtype == raw.dtype == torch.float32
        assert len(set(found.tolist())) == 4, "rounded to steps of 0.06"
        torch.testing.assert_close(found, exact, atol=0.05, rtol=0)
        model.float()
    assert group_advantages(found[None]).abs().max() > 0


def test_a_merge_under_autocast_is_that_of_float32(tiny_backbone: Path) -> None:
    """Merged weights are kept, so whoever scores first would decide everybody's precision."""
    arguments = (tiny_latents(), tiny_conditioning(), 0.4, tiny_latents(seed=9))
    model = make_tiny_reward(tiny_backbone).requires_grad_(False)
    expected = model.score_latents(*arguments)
    other = make_tiny_reward(tiny_backbone).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        other.score_latents(*arguments)
    assert torch.equal(other.score_latents(*arguments), expected)


@pytest.mark.parametrize("lora_rank", [2, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_after_inference_mode(
    family: str, lora_rank: int, family_folders: Callable[[str], Path]
) -> None:
    """What inference mode leaves behind (merged weights, position tables, prompts) serves gradients too."""
    folder = family_folders(family)
    with torch.inference_mode():
        model = make_family_reward(folder, lora_rank=lora_rank).requires_grad_(False)
        conditioning = model.encode_prompts(["a red circle", "a blue square"])
        model.decode_latents(family_latents(family))
        inside = model.score_latents(family_latents(family), conditioning, [0.2, 0.7], seed=0)
        model(family_latents(family), conditioning, torch.full((2,), 0.4))
    latents = family_latents(family).requires_grad_()
    conditioning = model.encode_prompts(["a red circle", "a blue square"])
    scores = model.score_latents(latents, conditioning, [0.2, 0.7], seed=0)
    torch.testing.assert_close(scores.detach(), inside.clone(), atol=0, rtol=0)
    (model.decode_latents(latents).square().mean() + scores.sum()).backward()
    assert latents.grad is not None
    assert bool(latents.grad.flatten(1).abs().amax(dim=1).gt(0).all())
    model.requires_grad_(True).train()
    model(latents.detach(), conditioning, torch.full((2,), 0.4)).sum().backward()
    for parameter in model.adapter.parameters() if model.adapter else []:
        assert parameter.grad is not None
