"""Alignment runs as functions: the paper's, other generators', and the bundled one's.

A recipe is a generator's settings (`GENERATORS`) under an algorithm's (`ALGORITHMS`); `alignment_recipe`
puts the two together. Only those of the bundled domain have been run (benchmarks/alignment.py); the others
hold the published figures named beside them, and have not been run here.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

from dina_lrm.alignment.config import (
    AlignConfig,
    DpoConfig,
    GrpoConfig,
    MonitorConfig,
    PolicyConfig,
    ReflConfig,
    RewardConfig,
    SamplerConfig,
    StepDpoConfig,
)
from dina_lrm.core.precision import faster_precision
from dina_lrm.errors import InvalidInputError
from dina_lrm.runs.config import OptimizerConfig

__all__ = ["AlgorithmName", "GeneratorName", "alignment_recipe"]

AlgorithmName = Literal["refl", "grpo", "dpo", "step-dpo"]
GeneratorName = Literal["shapes", "sd35m-512", "sd35m-1024", "flux-512", "sdxl-1024"]

CONFIGS: dict[str, type[AlignConfig]] = {
    "refl": ReflConfig,
    "grpo": GrpoConfig,
    "dpo": DpoConfig,
    "step-dpo": StepDpoConfig,
}


def alignment_recipe(algorithm: str, generator: str) -> AlignConfig:
    """The settings of an algorithm on a generator.

    Raises:
        InvalidInputError: an unknown name; the message lists the known ones.
    """
    if algorithm not in get_args(AlgorithmName):
        raise InvalidInputError(
            f"unknown algorithm {algorithm!r}; known: {', '.join(get_args(AlgorithmName))}"
        )
    if generator not in get_args(GeneratorName):
        raise InvalidInputError(f"unknown recipe {generator!r}; known: {', '.join(get_args(GeneratorName))}")
    settings = GENERATORS[generator]()
    return ALGORITHMS[algorithm](settings, generator == "shapes")


# --- generators --------------------------------------------------------------------------------------------


def _shapes() -> dict[str, Any]:
    """Four steps without guidance leave the bundled generator room to improve."""
    return {
        "sampler": SamplerConfig(num_steps=4),
        "monitor": MonitorConfig(every=4, num_prompts=64, gold=("judge",)),
        "optimizer": OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, ema_decay=0.9),
        "batch_size": 16,
        "precision": faster_precision("cpu"),
    }


def _full(
    pipeline: str,
    reward: str,
    *,
    side: int,
    num_steps: int,
    guidance_scale: float,
    lora_rank: int,
    batch_size: int,
) -> dict[str, Any]:
    return {
        "policy": PolicyConfig(
            pipeline=pipeline, lora_rank=lora_rank, dtype="bfloat16", gradient_checkpointing=True
        ),
        "sampler": SamplerConfig(
            num_steps=num_steps, guidance_scale=guidance_scale, height=side, width=side, batch_size=8
        ),
        "reward": RewardConfig(models=(reward,)),
        "monitor": MonitorConfig(every=10, num_prompts=256, gold=("pickscore",)),
        "optimizer": OptimizerConfig(learning_rate=1e-4, weight_decay=1e-4, ema_decay=0.9),
        "prompts": "prompts.txt",
        "batch_size": batch_size,
        "max_loss_rows": 4,
        "num_steps": 150,
    }


_SD35M_REWARD = "liuhuohuo/DiNa-LRM-SD35M-12layers"


def _sd35m(side: int) -> dict[str, Any]:
    """The paper's: 150 updates of 256 pictures, 40 steps, guidance 4.5, LoRA, held-out PickScore as gold.
    Chosen here: rank 32, rate 1e-4."""
    return _full(
        "stabilityai/stable-diffusion-3.5-medium",
        _SD35M_REWARD,
        side=side,
        num_steps=40,
        guidance_scale=4.5,
        lora_rank=32,
        batch_size=256,
    )


def _flux() -> dict[str, Any]:
    """FLUX.1 [dev] with a reward on its own backbone, which has to be trained first (`flux-19-layers`).
    Guidance is told to the distilled network, so there is none at sampling."""
    return _full(
        "black-forest-labs/FLUX.1-dev",
        "runs/flux-19-layers",
        side=512,
        num_steps=28,
        guidance_scale=1.0,
        lora_rank=32,
        batch_size=64,
    )


def _sdxl() -> dict[str, Any]:
    """SDXL with a reward on its own backbone, which has to be trained first (`sdxl-down-mid`)."""
    return _full(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "runs/sdxl-down-mid",
        side=1024,
        num_steps=30,
        guidance_scale=5.0,
        lora_rank=32,
        batch_size=64,
    )


GENERATORS: dict[str, Callable[[], dict[str, Any]]] = {
    "shapes": _shapes,
    "sd35m-512": lambda: _sd35m(512),
    "sd35m-1024": lambda: _sd35m(1024),
    "flux-512": _flux,
    "sdxl-1024": _sdxl,
}


# --- algorithms --------------------------------------------------------------------------------------------


def _stochastic(settings: dict[str, Any]) -> dict[str, Any]:
    """The same sampler with noise: coefficients preserving for flows, DDIM's for SD 1.5 and SDXL."""
    policy: PolicyConfig = settings.get("policy", PolicyConfig())
    rule = "ddim" if "stable-diffusion-xl" in policy.pipeline else "cps"
    return {**settings, "sampler": replace(settings["sampler"], rule=rule, noise_level=0.7)}


def _refl(settings: dict[str, Any], bundled: bool) -> AlignConfig:
    """Reward gradients through the last steps."""
    if bundled:
        return ReflConfig(**settings, gradient_steps=4, num_steps=16)
    return ReflConfig(**settings, gradient_steps=1, random_stop=settings["sampler"].num_steps // 4)


def _grpo(settings: dict[str, Any], bundled: bool) -> AlignConfig:
    """Flow-GRPO: groups, clipped ratios, a window of stochastic steps at full size."""
    settings = _stochastic(settings)
    if bundled:
        settings["sampler"] = replace(settings["sampler"], window=(0, 1))
        settings["optimizer"] = replace(settings["optimizer"], learning_rate=5e-4, schedule="linear")
        settings["monitor"] = replace(settings["monitor"], every=12)
        return GrpoConfig(**{**settings, "batch_size": 12}, group_size=8, num_steps=48)
    sampler = settings["sampler"]
    steps = min(10, sampler.num_steps)  # Flow-GRPO trains on 10 steps and evaluates on 40
    settings["sampler"] = replace(sampler, num_steps=steps, window=(0, max(1, steps // 2)))
    return GrpoConfig(
        **{**settings, "batch_size": 32}, group_size=16, clip_range=1e-4, divergence_weight=0.01
    )


def _dpo(settings: dict[str, Any], bundled: bool) -> AlignConfig:
    """Diffusion-DPO on the reward's best and worst of four."""
    if bundled:
        settings["optimizer"] = replace(settings["optimizer"], learning_rate=8e-4, schedule="linear")
        settings["monitor"] = replace(settings["monitor"], every=4)
        return DpoConfig(**settings, beta=100.0, num_steps=16)
    return DpoConfig(**{**settings, "batch_size": 64}, beta=2000.0)


def _step_dpo(settings: dict[str, Any], bundled: bool) -> AlignConfig:
    """Step-level preferences of branches of noisy states."""
    settings = _stochastic(settings)
    if bundled:
        settings["monitor"] = replace(settings["monitor"], every=6)
        return StepDpoConfig(**settings, num_steps=24)
    sampler = settings["sampler"]
    settings["sampler"] = replace(sampler, num_steps=min(20, sampler.num_steps))
    return StepDpoConfig(**{**settings, "batch_size": 32})


ALGORITHMS: dict[str, Callable[[dict[str, Any], bool], AlignConfig]] = {
    "refl": _refl,
    "grpo": _grpo,
    "dpo": _dpo,
    "step-dpo": _step_dpo,
}
