"""Whole alignment runs on a tiny random pipeline: they learn, resume to the same bits, and stop with care."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dina_lrm.alignment.config import (
    AlignConfig,
    DpoConfig,
    GrpoConfig,
    MonitorConfig,
    PolicyConfig,
    ReflConfig,
    SamplerConfig,
    StepDpoConfig,
)
from dina_lrm.alignment.dpo import Dpo
from dina_lrm.alignment.record import RunResult
from dina_lrm.alignment.run import AlignmentError, Run
from dina_lrm.build.alignment import algorithm_of
from dina_lrm.data.latents import LatentPairs
from dina_lrm.errors import InvalidInputError
from dina_lrm.runs.config import OptimizerConfig
from dina_lrm.sampling.policy import Policy
from dina_lrm.sampling.rewards import LatentReward, Reward, RewardError
from tests.families import load_pipeline, make_family_reward

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square")]
HELD_OUT = ["a yellow circle", "a yellow square", "two black circle"]
ODE = SamplerConfig(num_steps=4, height=32, width=32, batch_size=8)
CPS = replace(ODE, rule="cps", noise_level=0.5)
ALGORITHMS: dict[str, AlignConfig] = {
    "refl": ReflConfig(sampler=ODE, gradient_steps=2, divergence_weight=0.1, pretraining_weight=0.1),
    "refl-random-stop": ReflConfig(sampler=ODE, random_stop=2),
    "alignprop": ReflConfig(sampler=ODE, gradient_steps=4, random_gradient_steps=True),
    "grpo": GrpoConfig(sampler=CPS, group_size=4, divergence_weight=0.1),
    "grpo-guard": GrpoConfig(
        sampler=replace(CPS, rule="sde"),
        group_size=4,
        normalise_ratio=True,
        divide_by_dt=True,
        divergence_weight=0.1,
    ),
    "grpo-public": GrpoConfig(
        sampler=CPS, group_size=4, advantages="uncentred", log_probability="unscaled", clip_range=1e-4
    ),
    "grpo-dense": GrpoConfig(sampler=CPS, group_size=4, dense=True, advantages="batch"),
    "dpo": DpoConfig(sampler=ODE, samples_per_prompt=3, repeats=2),
    "step-dpo": StepDpoConfig(sampler=CPS, branches=3),
    "d3po": StepDpoConfig(sampler=CPS, preference="trajectory"),
}


def small(config: AlignConfig, output: Path | None = None, **settings: Any) -> AlignConfig:
    return replace(
        config,
        **{
            "policy": PolicyConfig(lora_rank=2),
            "optimizer": OptimizerConfig(learning_rate=3e-3, weight_decay=0.0, ema_decay=0.5),
            "monitor": MonitorConfig(every=2, num_prompts=3, grid_size=2),
            "output": None if output is None else str(output),
            "num_steps": 4,
            "batch_size": 4,
            "max_loss_rows": 8,
            "checkpoint_every": 1,
            "precision": "float32",
            "cpu": True,
        }
        | settings,
    )


def brightness(prompts: Sequence[str], pictures: Sequence[Image.Image]) -> list[float]:
    return [float(np.asarray(picture.convert("L")).mean()) / 255 for picture in pictures]


def new_run(folder: Path, config: AlignConfig, reward: Reward | None = None) -> Run:
    pipeline = load_pipeline(folder)
    policy = Policy(pipeline, lora_rank=config.policy.lora_rank, seed=1)
    if reward is None:
        model = make_family_reward(pipeline, noise_levels=(0.3,)).attach(pipeline)
        reward = LatentReward(model)
    return Run(config, policy, reward, PROMPTS, HELD_OUT, golds={"brightness": brightness})


def align(folder: Path, config: AlignConfig, reward: Reward | None = None) -> tuple[Run, RunResult]:
    run = new_run(folder, config, reward)
    return run, run.train(algorithm_of(config))


def weights(run: Run) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in run.state.parameters.values()]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_resumed_run_is_the_uninterrupted_one(tiny_pipeline: Path, tmp_path: Path, name: str) -> None:
    """Stopped after two of four updates: equal weights and equal metrics, bit for bit."""
    whole, result = align(tiny_pipeline, small(ALGORITHMS[name], tmp_path / "whole"))
    align(tiny_pipeline, small(ALGORITHMS[name], tmp_path / "parts", num_steps=2))
    resumed, again = align(tiny_pipeline, small(ALGORITHMS[name], tmp_path / "parts", resume=True))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert any(value.abs().max() > 0 for key, value in whole.state.parameters.items() if "lora_B" in key)

    def told(run: RunResult) -> list[dict[str, float]]:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in run.history]

    assert told(again) == told(result)
    assert [one.proxy for one in again.evaluations] == [one.proxy for one in result.evaluations]
    assert [one.step for one in result.evaluations] == [0, 2, 4]


@pytest.mark.parametrize("name", ["refl", "grpo", "grpo-dense", "dpo", "step-dpo", "d3po"])
def test_the_reward_rises(tiny_pipeline: Path, name: str) -> None:
    """On prompts that were not trained on, at fixed seeds; a latent reward on the same backbone."""
    config = small(
        ALGORITHMS[name], num_steps=24, monitor=MonitorConfig(every=24, num_prompts=3, grid_size=2)
    )
    if name == "refl":
        config = replace(config, divergence_weight=0.0, pretraining_weight=0.0)  # type: ignore[call-arg]
    if name in ("dpo", "step-dpo", "d3po"):
        config = replace(config, beta=20.0)  # type: ignore[call-arg]
    _, result = align(tiny_pipeline, config)
    before, after = (
        sum(one.proxy) / len(one.proxy) for one in (result.evaluations[0], result.evaluations[-1])
    )
    assert after > before
    assert result.evaluations[-1].distance > result.evaluations[0].distance == 0.0


def test_what_is_written(tiny_pipeline: Path, tmp_path: Path) -> None:
    run, result = align(tiny_pipeline, small(ALGORITHMS["refl"], tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"last", "metrics.jsonl", "evaluations.jsonl", "align_config.json", "pictures"} <= names
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["000000", "000002", "000004"]
    # The saved adapter is the policy as it ended, which is the average of the weights.
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(saved) == len(run.state.parameters)
    assert run.state.average is not None
    torch.testing.assert_close(weights(run), list(run.state.average.shadow_params))
    assert result.stopped_by == "steps"


def test_a_nan_reward_stops_the_run_and_keeps_the_checkpoint(tiny_pipeline: Path, tmp_path: Path) -> None:
    calls = 0

    def fails_later(latents: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        nonlocal calls
        calls += 1
        found = latents.mean(dim=(1, 2, 3))
        return found * float("nan") if calls > 3 else found

    config = small(ALGORITHMS["refl"], tmp_path, monitor=MonitorConfig(every=9, num_prompts=3, grid_size=2))
    with pytest.raises(RewardError, match=r"4 of 4 pictures.* nan .*'a "):
        align(tiny_pipeline, config, fails_later)
    position = json.loads((tmp_path / "last" / "training_state" / "position.json").read_text())
    assert position["step"] == 2
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_a_gradient_that_explodes_changes_nothing(tiny_pipeline: Path, tmp_path: Path) -> None:
    calls = 0

    def explodes(latents: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        nonlocal calls
        calls += 1
        return latents.mean(dim=(1, 2, 3)) * (1e12 if calls == 3 else 1.0)

    config = small(ALGORITHMS["refl"], tmp_path, monitor=MonitorConfig(every=9, num_prompts=3, grid_size=2))
    run = new_run(tiny_pipeline, config, explodes)
    before: list[Tensor] = []

    def update(run: Run, step: int) -> dict[str, float]:
        before[:] = weights(run)
        return algorithm_of(config)(run, step)

    with pytest.raises(AlignmentError, match=r"update 1.* gradient_limit = 100000"):
        run.train(update)
    assert all(torch.equal(a, b) for a, b in zip(weights(run), before, strict=True))
    assert json.loads((tmp_path / "last" / "training_state" / "position.json").read_text())["step"] == 1


@pytest.mark.parametrize("value", [1.0, 1000.1])
@pytest.mark.parametrize("name", ["grpo", "dpo", "step-dpo"])
def test_rewards_that_are_all_alike_teach_nothing(tiny_pipeline: Path, name: str, value: float) -> None:
    """Zero variance in every group: no NaN, no step, whatever the rounding of their mean."""
    config = small(ALGORITHMS[name], num_steps=2)
    run = new_run(tiny_pipeline, config)
    assert isinstance(run.reward, LatentReward)

    class Flat(LatentReward):
        def __call__(self, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            return torch.full((len(prompts),), value)

        def of_state(self, noisy_latents: Tensor, prompts: Sequence[str], timestep: Tensor) -> Tensor:
            return torch.full((len(prompts),), value)

    run.reward = Flat(run.reward.model)
    before = weights(run)
    result = run.train(algorithm_of(config))
    assert all(torch.equal(a, b) for a, b in zip(weights(run), before, strict=True))
    if name == "grpo":
        assert [line["flat_groups"] for line in result.history] == [1.0, 1.0]


def test_parted_proxy_and_gold_stop_the_run(tiny_pipeline: Path, tmp_path: Path) -> None:
    """The reward is darkness, gold is brightness: they part at once."""
    monitor = MonitorConfig(every=1, num_prompts=3, grid_size=2, on_overoptimisation="stop", window=2)
    config = small(ALGORITHMS["refl"], tmp_path, num_steps=30, monitor=monitor)
    run = new_run(tiny_pipeline, config)
    told: list[str] = []
    run.log = told.append

    def dark(latents: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return -run.policy.decode(latents).mean(dim=(1, 2, 3))

    run.reward = dark
    result = run.train(algorithm_of(replace(config, divergence_weight=0.0, pretraining_weight=0.0)))  # type: ignore[call-arg]
    assert result.stopped_by == "overoptimisation"
    assert result.steps < 30
    assert any("over-optimised" in line for line in told)


def first_latents(run: Run) -> Tensor:
    """Twelve latents of noise."""
    shape = (12, *run.policy.latent_shape(32, 32))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def given_pairs(run: Run, latents: Tensor, target: Tensor) -> LatentPairs:
    """Six pairs, one a prompt: latent i against latent i + 6."""
    conditioning = run.policy.encode(PROMPTS)
    return LatentPairs(
        latents=latents,
        chosen=torch.arange(6),
        rejected=torch.arange(6, 12),
        target=target,
        prompt_embeds=conditioning.prompt_embeds,
        pooled_prompt_embeds=conditioning.pooled_prompt_embeds,
        prompts=PROMPTS,
        prompt_index=torch.arange(6),
    )


def test_dpo_learns_from_given_pairs(tiny_pipeline: Path) -> None:
    """The policy comes to denoise the preferred latents better than the others, against the reference."""
    config = small(DpoConfig(sampler=ODE, beta=50.0, repeats=2), num_steps=12)
    run = new_run(tiny_pipeline, config)
    latents = first_latents(run)
    latents[6:] *= 2
    pairs = given_pairs(run, latents, torch.ones(6))
    result = run.train(Dpo(config, pairs))  # type: ignore[arg-type]
    first, last = result.history[0], result.history[-1]
    assert last["loss"] < first["loss"]
    assert "reward" not in last


def test_given_ties_leave_the_policy_at_the_reference(tiny_pipeline: Path) -> None:
    """Conservative DPO: the gradient of a tie is sigmoid(x) - 1/2, and x = 0 at the start."""
    config = small(DpoConfig(sampler=ODE, beta=50.0, repeats=2), num_steps=2)
    run = new_run(tiny_pipeline, config)
    pairs = given_pairs(run, first_latents(run), torch.full((6,), 0.5))
    before = weights(run)
    result = run.train(Dpo(config, pairs))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(weights(run), before, strict=True))
    assert [line["accuracy"] for line in result.history] == [0.5, 0.5]


def test_settings_that_cannot_work_are_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"group_size": 1}, "group_size = 1: a group of one picture has no advantage"),
        ({"sampler": ODE}, "grpo learns from stochastic steps"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            GrpoConfig(**{"sampler": CPS} | settings)
    with pytest.raises(InvalidInputError, match=r"step-dpo.* stochastic"):
        StepDpoConfig(sampler=ODE)
    with pytest.raises(InvalidInputError, match=r"gradient_steps = 9, .* \[1, 4\]"):
        algorithm_of(ReflConfig(sampler=ODE, gradient_steps=9))
    config = small(ALGORITHMS["refl"], tmp_path, num_steps=1)
    align(tiny_pipeline, config)
    with pytest.raises(InvalidInputError, match=r"other settings: optimizer was .* seed was 0 and is 3"):
        align(tiny_pipeline, replace(config, resume=True, seed=3, optimizer=OptimizerConfig()))
    pipeline = load_pipeline(tiny_pipeline)
    with pytest.raises(InvalidInputError, match=r"1 held-out prompts.*'a red circle'"):
        Run(config, Policy(pipeline, lora_rank=2), lambda *_: torch.zeros(1), PROMPTS, ["a red circle", "x"])
