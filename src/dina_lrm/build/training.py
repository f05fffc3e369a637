"""From a config to objects: the one place that knows both.

Modules and functions elsewhere take plain values, so each can be used without a config.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from dina_lrm.build.card import training_card
from dina_lrm.build.pairs import Log, RunPairs
from dina_lrm.checkpoints.config import LikelihoodConfig
from dina_lrm.core.precision import faster_precision
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.training.config import ModelConfig, TrainConfig
from dina_lrm.training.result import TrainResult
from dina_lrm.training.trainer import StepMetrics, train

__all__ = ["reward_model", "run_training"]

KEPT = (
    "tuning",
    "num_blocks",
    "image_taps",
    "text_taps",
    "lora_rank",
    "lora_alpha",
    "head",
    "logistic",
    "guidance",
    "max_text_tokens",
)
"""Settings that a reward keeps when it is trained further."""


def reward_model(
    config: ModelConfig,
    likelihood: LikelihoodConfig | None = None,
    *,
    seed: int = 0,
    pipeline: Any = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> RewardModel:
    """The reward that training starts with, over `config.pipeline`: that of `config.start_from`, or a new one
    whose untrained weights follow from `seed`.

    Args:
        likelihood: that it is to be trained with.
        pipeline: instead of `config.pipeline`, as `RewardModel.initialize` takes it.
        device, dtype: of the backbone.

    Raises:
        InvalidInputError: a setting differs from that of the reward to start from.
    """
    if config.start_from is not None:
        return _trained_further(config, likelihood, pipeline, device, dtype)
    return RewardModel.initialize(
        config.pipeline if pipeline is None else pipeline,
        device=device,
        dtype=dtype,
        num_blocks=config.num_blocks,
        image_taps=config.image_taps,
        text_taps=config.text_taps,
        tuning=config.tuning,
        lora_rank=config.lora_rank if config.tuning == "lora" else 0,
        lora_alpha=config.lora_alpha if config.tuning == "lora" else None,
        head=config.head,
        logistic=config.logistic,
        likelihood=likelihood,
        guidance=config.guidance,
        max_text_tokens=config.max_text_tokens,
        seed=mix_seeds(seed, Stream.FIRST_WEIGHTS),
    )


def _trained_further(
    config: ModelConfig,
    likelihood: LikelihoodConfig | None,
    pipeline: Any,
    device: str | None,
    dtype: torch.dtype | None,
) -> RewardModel:
    assert config.start_from is not None
    model = RewardModel.from_pretrained(
        config.start_from, config.pipeline if pipeline is None else pipeline, device=device, dtype=dtype
    )
    for name in KEPT:
        wanted, there = getattr(config, name), getattr(model.config, name)
        if name.endswith("_taps"):
            wanted = tuple(sorted(wanted))
        if name.startswith("lora_") and model.config.tuning != "lora":
            continue
        if wanted is None and name in ("guidance", "max_text_tokens"):
            continue
        if wanted != there:
            raise InvalidInputError(
                f"model.{name} = {wanted!r}, but the reward {config.start_from} has {there!r}, and keeps it"
            )
    if likelihood is not None:
        model.config = replace(model.config, likelihood=likelihood)
    return model


def run_training(
    config: TrainConfig,
    *,
    on_step: Callable[[StepMetrics], None] | None = None,
    log: Log | None = None,
    console: Console | None = None,
) -> tuple[RewardModel, TrainResult]:
    """A whole run: build the model, get the pairs, set some aside for validation, train.

    Pairs that have to be made or encoded are kept in OUTPUT/pairs, so that a resumed run finds the same ones
    without making them again. Where several processes train, the first one prepares rows for all.

    Raises:
        InvalidInputError: settings, pairs and pipeline do not fit each other.
        Interrupted: SIGINT or SIGTERM while it trains; see `training.trainer.train`.
    """
    with ExitStack() as stack:
        pairs = RunPairs(config, stack, log or (lambda line: None), console or Console(stderr=True))
        likelihood = LikelihoodConfig(
            kind=config.loss.likelihood, slope=config.loss.slope, floor=config.loss.floor
        )
        model = reward_model(config.model, likelihood, seed=config.seed)
        train_pairs, validation_pairs = pairs.get(model)
        described = pairs.described
        device = pairs.processes.device or model.device
        if config.precision not in ("float32", faster_precision(device.type)):
            pairs.log(
                f"warning: this CPU has no instructions for {config.precision}: --precision float32 takes a "
                "fraction of the time"
            )
        result = train(
            config,
            model,
            train_pairs,
            validation_pairs,
            on_step=on_step,
            console=pairs.console,
            card=lambda result: training_card(config, model.config, described, result),
        )
    if result.uncalibrated is not None:
        pairs.log(f"warning: {result.uncalibrated}")
    return model, result
