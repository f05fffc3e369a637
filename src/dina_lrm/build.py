"""From a config to objects: the one place that knows both.

Modules and functions elsewhere take plain values, so each can be used without a config.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from dina_lrm.config import ModelConfig, TrainConfig
from dina_lrm.data.latents import LatentPairs, encode_pairs, mix_seeds
from dina_lrm.data.pairs import Reject, read_pairs, write_rejects
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.config import LikelihoodConfig
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.training.trainer import StepMetrics, TrainResult, train

__all__ = ["latent_pairs", "reward_model", "run_training", "shapes_pairs"]

Log = Callable[[str], None]


def reward_model(
    config: ModelConfig,
    likelihood: LikelihoodConfig | None = None,
    *,
    seed: int = 0,
    pipeline: Any = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> RewardModel:
    """A new reward over `config.pipeline`; its untrained weights follow from `seed`.

    Args:
        pipeline: instead of `config.pipeline`, as `RewardModel.initialize` takes it.
        device, dtype: of the backbone.
    """
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
        seed=mix_seeds(seed, 4),
    )


def latent_pairs(
    source: str,
    model: RewardModel,
    *,
    num_prompts: int = 1000,
    seed: int = 0,
    image_root: str | None = None,
    rejects_file: Path | None = None,
    log: Log | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentPairs:
    """Pairs of latents from "shapes", a latents file (.safetensors), a folder of such files, or preference
    rows (.jsonl, .parquet).

    Args:
        num_prompts, seed: of shapes pairs; read only for them.
        image_root: of relative paths in rows; read only for them.
        rejects_file: where unusable rows are listed with their reason.
        log: told what was found.
        on_progress: called with (images done, images in all).
    """
    if source == "shapes":
        return shapes_pairs(model, num_prompts=num_prompts, seed=seed, on_progress=on_progress)
    if _holds_latents(source):
        path = Path(source)
        if not path.is_dir():
            return LatentPairs.load(path)
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise InvalidInputError(f"the folder {source!r} holds no latents file (.safetensors)")
        return LatentPairs.concatenate([LatentPairs.load(file) for file in files])
    match Path(source).suffix:
        case ".jsonl" | ".parquet":
            rows = read_pairs(source, image_root=image_root, check_images=False)
            unreadable: list[Reject] = []
            pairs = encode_pairs(model, rows.pairs, rejects=unreadable, on_progress=on_progress)
            rejects = [*rows.rejects, *unreadable]
            if rejects and rejects_file is not None:
                write_rejects(rejects, rejects_file)
            if log is not None:
                where = f", listed in {rejects_file}" if rejects and rejects_file is not None else ""
                log(f"{source}: {rows.summary()}; {len(unreadable)} pairs could not be encoded{where}")
            return pairs
        case _:
            raise InvalidInputError(
                'pairs come from "shapes", a .safetensors file of latents or a folder of them, or '
                ".jsonl / .parquet rows; "
                f"not {source!r}"
            )


def _holds_latents(source: str) -> bool:
    """Whether pairs lie ready in a latents file or a folder of them; "shapes" is the domain, whatever folder
    has its name."""
    return source != "shapes" and (source.endswith(".safetensors") or Path(source).is_dir())


def shapes_pairs(
    model: RewardModel,
    *,
    num_prompts: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentPairs:
    """Simulated pairs of the bundled domain, made with the bundled pipeline and encoded by `model`."""
    # Here, since only this source loads the generator.
    from dina_lrm.shapes.pairs import make_shapes_pairs
    from dina_lrm.shapes.pipeline import load_pipeline

    pipeline = load_pipeline(device=str(model.device))
    made = make_shapes_pairs(pipeline, num_prompts=num_prompts, seed=seed, on_progress=on_progress)
    return made.to_latents(model)


def run_training(
    config: TrainConfig,
    *,
    on_step: Callable[[StepMetrics], None] | None = None,
    log: Log | None = None,
    console: Console | None = None,
) -> tuple[RewardModel, TrainResult]:
    """A whole run: build the model, get the pairs, train.

    Encoded pairs are kept in OUTPUT/pairs, so that a resumed run finds the same ones without making them
    again.
    """
    console = console or Console(stderr=True)
    likelihood = LikelihoodConfig(
        kind=config.loss.likelihood, slope=config.loss.slope, floor=config.loss.floor
    )
    model = reward_model(config.model, likelihood, seed=config.seed)
    output = None if config.output is None else Path(config.output)

    def pairs(part: str, source: str, num_prompts: int, seed: int) -> LatentPairs:
        stored = (
            None if output is None or _holds_latents(source) else output / "pairs" / f"{part}.safetensors"
        )
        if stored is not None and config.resume and stored.exists():
            return LatentPairs.load(stored)
        with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task(f"{part} pairs", total=None)
            tenths = 0

            def report(done: int, total: int) -> None:
                nonlocal tenths
                progress.update(task, completed=done, total=total)
                if log is not None and not console.is_terminal and 10 * done // total > tenths:
                    tenths = 10 * done // total
                    log(f"{part} pairs: {done} of {total} pictures")

            made = latent_pairs(
                source,
                model,
                num_prompts=num_prompts,
                seed=seed,
                image_root=config.data.image_root,
                rejects_file=None if output is None else output / f"rejects_{part}.jsonl",
                log=log,
                on_progress=report,
            )
        if log is not None:
            log(f"{part}: {len(made)} pairs of {made.num_prompts} prompts")
        if stored is not None:
            made.save(stored)
        return made

    data = config.data
    train_pairs = pairs("train", data.train, data.train_prompts, mix_seeds(config.seed, 5))
    validation_pairs = None
    if data.validation is not None:
        validation_pairs = pairs(
            "validation", data.validation, data.validation_prompts, mix_seeds(config.seed, 6)
        )
    result = train(config, model, train_pairs, validation_pairs, on_step=on_step, console=console)
    return model, result
