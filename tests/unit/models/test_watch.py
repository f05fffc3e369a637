"""A policy shared with a reward, and its sampling watched: no trace is left, and the score is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_lrm import InvalidInputError, RewardModel
from dina_lrm.backbones.backbone import NoisyState
from dina_lrm.backbones.lora import tuner_layers
from dina_lrm.models.watch import RewardWatch
from tests.families import (
    family_conditioning,
    family_latents,
    generate_latents,
    load_pipeline,
    make_family_reward,
    network_of,
)
from tests.tiny import PROMPT

GUIDED = {"sd3": {"guidance_scale": 4.0}, "sd15": {"guidance_scale": 4.0}, "sdxl": {"guidance_scale": 4.0}}
GUIDED |= {"z_image": {"guidance_scale": 4.0}, "wan": {"guidance_scale": 4.0}}
GUIDED |= {
    name: {"true_cfg_scale": 3.0, "negative_prompt": "a blue square on a white background"}
    for name in ("flux", "qwen_image")
}
PLAIN = {
    name: {"guidance_scale": 0.0 if name == "z_image" else 1.0}
    for name in ("sd3", "sd15", "sdxl", "z_image", "wan")
}
PLAIN |= {"flux": {}, "qwen_image": {"true_cfg_scale": 1.0}}


def with_policy_adapter(network: Any) -> None:
    """The policy's own LoRA, with dropout, on layers the reward adapts too."""
    from peft import LoraConfig

    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], lora_dropout=0.5), "policy")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".policy." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def state_of(network: Any) -> dict[str, Any]:
    """Everything about a policy that someone could notice."""
    plain = dict(network.named_parameters())
    return {
        "values": {name: p.detach().clone() for name, p in plain.items()},
        "trained": {name: p.requires_grad for name, p in plain.items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in plain.items()},
        "modules": [(name, id(module), module.training) for name, module in network.named_modules()],
        "active": [tuple(layer.active_adapters) for layer in tuner_layers(network)],
    }


def assert_same_state(after: dict[str, Any], before: dict[str, Any]) -> None:
    assert after["trained"] == before["trained"]
    assert after["modules"] == before["modules"]
    assert after["active"] == before["active"]
    for part in ("values", "gradients"):
        for name, tensor in before[part].items():
            assert (
                (after[part][name] is None) if tensor is None else torch.equal(after[part][name], tensor)
            ), name


def output_of(pipeline: Any, model: RewardModel, family: str) -> Tensor:
    """What the policy predicts for some state, whatever its mode."""
    timestep = model.schedule.match(torch.tensor([0.3, 0.7])).timestep
    arguments = model.backbone.arguments(family_latents(family), family_conditioning(family), timestep)
    torch.manual_seed(0)  # its dropout
    output = network_of(pipeline)(**arguments)[0]
    return torch.stack(output) if isinstance(output, list) else output


# --- attach


@pytest.mark.parametrize("lora_rank", [2, 0])
def test_attached_rewards_leave_no_trace_in_the_policy(
    family: str, pipeline: Any, family_folders: Any, lora_rank: int
) -> None:
    model = make_family_reward(family_folders(family), lora_rank=lora_rank)
    arguments = (family_latents(family), family_conditioning(family), [0.2, 0.7])
    with torch.no_grad():
        expected = model.score_latents(*arguments, seed=0)
    network = network_of(pipeline)
    with_policy_adapter(network)
    network.train()
    next(iter(network.modules())).training = True
    policy = output_of(pipeline, model, family)
    policy.sum().backward()
    before = state_of(network)
    assert any(gradient is not None for gradient in before["gradients"].values())

    model.attach(pipeline)
    assert torch.equal(output_of(pipeline, model, family), policy)
    assert_same_state(state_of(network), before)
    latents = arguments[0].clone().requires_grad_()
    scores = model.score_latents(latents, *arguments[1:], seed=0)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert_same_state(state_of(network), before)
    scores.sum().backward()
    assert latents.grad is not None
    assert_same_state(state_of(network), before)

    block = model.backbone.kept_blocks[-1]
    hook = block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.score_latents(*arguments, seed=0)
    hook.remove()
    assert_same_state(state_of(network), before)
    assert torch.equal(output_of(pipeline, model, family), policy)

    model.detach()
    assert_same_state(state_of(network), before)
    assert torch.equal(output_of(pipeline, model, family), policy)
    torch.testing.assert_close(model.score_latents(*arguments, seed=0), expected, atol=1e-5, rtol=0)


def test_attached_weights_are_shared(family: str, pipeline: Any, family_folders: Any) -> None:
    model = make_family_reward(family_folders(family)).attach(pipeline)
    network = network_of(pipeline)
    theirs = {parameter.data_ptr() for parameter in network.parameters()}
    ours = [p for name, p in model.backbone.parts.named_parameters() if ".lora_" not in name]
    assert ours
    assert all(parameter.data_ptr() in theirs for parameter in ours)
    assert sum(p.numel() for p in model.parameters()) == model.num_parameters()["head"]


# --- watch


def watched(
    pipeline: Any, model: RewardModel, **settings: Any
) -> tuple[RewardWatch, list[NoisyState], Tensor]:
    """Sampling under a watch, the states it passed, and its result."""
    states: list[NoisyState] = []

    def callback(*arguments: Any) -> dict[str, Any]:
        assert watch._call is not None
        states.append(model.backbone.state(**watch._call))
        return watch(*arguments)

    with model.watch(pipeline) as watch:
        latents = generate_latents(
            pipeline,
            [PROMPT, "a blue square"],
            height=64,
            width=64,
            callback_on_step_end=callback,
            **settings,
        )
    return watch, states, latents


@pytest.mark.parametrize("guided", [False, True])
def test_a_frozen_reward_is_read_from_the_generators_own_forward(
    family: str, pipeline: Any, guided: bool, family_folders: Any
) -> None:
    settings = (GUIDED if guided else PLAIN)[family]
    plain = generate_latents(pipeline, [PROMPT, "a blue square"], height=64, width=64, **settings)
    model = make_family_reward(family_folders(family), lora_rank=0).attach(pipeline)
    runs: list[int] = []
    last = max(*model.config.image_taps, *model.config.text_taps)
    block = model.backbone.kept_blocks[last - 1]
    counter = block.register_forward_hook(lambda *_: runs.append(1))
    watch, states, latents = watched(pipeline, model, **settings)
    counter.remove()
    assert torch.equal(latents, plain), "watching changed what was sampled"
    assert not runs, "the backbone ran for the reward"
    assert len(watch.steps) == 3
    assert all(step.replayed for step in watch.steps)
    doubled = guided and model.backbone.conditional_half is not None
    for step, state in zip(watch.steps, states, strict=True):
        assert len(state.latents) == (4 if doubled else 2)
        first = 2 if doubled and model.backbone.conditional_half == "last" else 0
        with torch.no_grad():
            separate = model.score_state(*state.index_select(torch.arange(first, first + 2)))
        torch.testing.assert_close(step.scores, separate, atol=1e-5, rtol=0)
        assert step.sigma == pytest.approx(float(model.schedule.sigma_at(state.timestep[:1])))
    assert watch.steps[0].scores.std() > 1e-3
    sigmas = [step.sigma for step in watch.steps]
    assert sigmas == sorted(sigmas, reverse=True)


@pytest.mark.parametrize("attached", [False, True])
def test_a_lora_reward_costs_one_forward_of_its_blocks(
    family: str, pipeline: Any, attached: bool, family_folders: Any
) -> None:
    settings = GUIDED[family]
    plain = generate_latents(pipeline, [PROMPT, "a blue square"], height=64, width=64, **settings)
    model = make_family_reward(family_folders(family))
    separate = make_family_reward(family_folders(family))
    if attached:
        model.attach(pipeline)
    watch, states, latents = watched(pipeline, model, **settings)
    assert torch.equal(latents, plain)
    assert len(watch.steps) == 3
    assert not any(step.replayed for step in watch.steps)
    doubled = model.backbone.conditional_half is not None
    first = 2 if doubled and model.backbone.conditional_half == "last" else 0
    for step, state in zip(watch.steps, states, strict=True):
        rows = torch.arange(first, first + 2)
        with torch.no_grad():
            expected = separate.score_state(*state.index_select(rows))
        torch.testing.assert_close(step.scores, expected, atol=1e-5, rtol=0)


def test_a_policy_with_an_adapter_is_not_mistaken_for_the_reward(
    family: str, pipeline: Any, family_folders: Any
) -> None:
    model = make_family_reward(family_folders(family), lora_rank=0).attach(pipeline)
    with_policy_adapter(network_of(pipeline).eval())
    watch, states, _ = watched(pipeline, model, **PLAIN[family])
    assert not any(step.replayed for step in watch.steps)
    own = make_family_reward(family_folders(family), lora_rank=0)
    with torch.no_grad():
        expected = own.score_state(*states[1])
    torch.testing.assert_close(watch.steps[1].scores, expected, atol=1e-5, rtol=0)


def test_other_guidance_is_another_reward(family_folders: Any) -> None:
    pipeline = load_pipeline(family_folders("flux"))
    model = make_family_reward(family_folders("flux"), lora_rank=0).attach(pipeline)
    watch, states, _ = watched(pipeline, model, guidance_scale=7.0)
    assert not any(step.replayed for step in watch.steps)
    with torch.no_grad():
        torch.testing.assert_close(watch.steps[0].scores, model.score_state(*states[0]), atol=1e-5, rtol=0)


def test_a_call_that_broke_off_leaves_nothing_behind(family_folders: Any) -> None:
    """Neither a run without the callback nor one that raised is mistaken for the next run's first step."""
    pipeline = load_pipeline(family_folders("flux"))
    model = make_family_reward(family_folders("flux"), lora_rank=0).attach(pipeline)
    with model.watch(pipeline) as watch:
        generate_latents(pipeline, PROMPT, height=64, width=64, seed=0)
        with pytest.raises(ZeroDivisionError):
            generate_latents(
                pipeline, PROMPT, height=64, width=64, seed=1, callback_on_step_end=lambda *_: 1 / 0
            )
        generate_latents(pipeline, PROMPT, height=64, width=64, seed=2, callback_on_step_end=watch)
    with model.watch(pipeline) as alone:
        generate_latents(pipeline, PROMPT, height=64, width=64, seed=2, callback_on_step_end=alone)
    assert len(watch.steps) == len(alone.steps) == 3
    for one, other in zip(watch.steps, alone.steps, strict=True):
        assert torch.equal(one.scores, other.scores)


def test_cached_blocks_are_not_the_states_own(family_folders: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    pipeline = load_pipeline(family_folders("flux"))
    private = make_family_reward(family_folders("flux"))
    shared = make_family_reward(family_folders("flux"), lora_rank=0).attach(pipeline)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    watch, states, _ = watched(pipeline, private)
    with torch.no_grad():
        torch.testing.assert_close(watch.steps[2].scores, private.score_state(*states[2]), atol=1e-5, rtol=0)
    watch, states, _ = watched(pipeline, shared)
    assert not any(step.replayed for step in watch.steps)
    own = make_family_reward(family_folders("flux"), lora_rank=0)
    with torch.no_grad():
        torch.testing.assert_close(watch.steps[2].scores, own.score_state(*states[2]), atol=1e-5, rtol=0)
    with pytest.raises(InvalidInputError, match=r"transformer_blocks\.0 .*replaced"):
        own.attach(pipeline)


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen_image"], indirect=True)
def test_a_generator_that_rounds_the_time_is_not_read(family: str, pipeline: Any) -> None:
    """FLUX and Qwen-Image in bfloat16 work at 976 where the reward is told 978.26."""
    model = make_family_reward(pipeline, lora_rank=0)
    pipeline.to(torch.bfloat16)
    watch, states, _ = watched(pipeline, model, **PLAIN[family])
    assert [step.replayed for step in watch.steps] == [family == "sd3"] * 3
    told = pipeline.scheduler.timesteps.tolist()
    assert [step.timestep for step in watch.steps] == told
    for step, state in zip(watch.steps, states, strict=True):
        with torch.no_grad():
            exact = model.score_state(*state._replace(timestep=torch.full((2,), step.timestep)))
        torch.testing.assert_close(step.scores, exact, atol=0.02, rtol=0)


def test_a_watch_ends_with_its_context(family_folders: Any) -> None:
    pipeline = load_pipeline(family_folders("sd3"))
    model = make_family_reward(family_folders("sd3"), lora_rank=0).attach(pipeline)
    hooks = [
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in pipeline.transformer.modules()
    ]
    with pytest.raises(ZeroDivisionError), model.watch(pipeline) as watch:
        raise ZeroDivisionError
    now = [
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in pipeline.transformer.modules()
    ]
    assert now == hooks
    with pytest.raises(InvalidInputError, match="use `with`"):
        watch(pipeline, 0, 0, {"latents": torch.zeros(1)})
    with model.watch(pipeline) as watch:
        with pytest.raises(InvalidInputError, match=r"no network .*called"):
            watch(pipeline, 0, 0, {"latents": torch.zeros(1)})
    with pytest.raises(InvalidInputError, match="live diffusers pipeline"):
        model.watch(Path("somewhere"))
