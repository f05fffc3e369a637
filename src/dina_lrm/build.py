"""From a config to objects: the one place that knows both.

Modules and functions elsewhere take plain values, so each can be used without a config.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress

from dina_lrm.config import ModelConfig, TrainConfig
from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.latents import LatentPairs, encode_pairs, mix_seeds
from dina_lrm.data.own_rows import read_pairs
from dina_lrm.data.pairs import Reject, image_name, write_rejects
from dina_lrm.data.prepare import (
    Prepared,
    PrepareSettings,
    content_digest,
    prepare,
    prompt_rows,
    unwanted,
)
from dina_lrm.data.shards import LatentShards, PairSet
from dina_lrm.data.sources import read_hub, read_source, source_files
from dina_lrm.data.split import SourcePart, split_source
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import file_fault
from dina_lrm.models.checkpoint import OWNED
from dina_lrm.models.config import LikelihoodConfig
from dina_lrm.models.encoders import Encoders, pipeline_encoders
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.models.storage import recover_folder
from dina_lrm.training.trainer import StepMetrics, TrainResult, train

__all__ = [
    "latent_pairs",
    "pair_encoder",
    "prepare_source",
    "reward_model",
    "run_training",
    "shapes_pairs",
    "source_parts",
]

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


def pair_encoder(
    device: str, *, pipeline: str, max_pixels: int | None, max_text_tokens: int | None
) -> Encoders:
    """VAE and text encoders that `data.prepare` uses; text encoders in bfloat16 on a GPU."""
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return pipeline_encoders(pipeline, max_pixels=max_pixels, max_text_tokens=max_text_tokens, dtype=dtype)


def prepare_source(
    source: str,
    root: str | Path | None,
    output: str | Path,
    *,
    pipeline: str = "bundled",
    split: str | None = None,
    max_pixels: int | None = 1024 * 1024,
    mixed_sizes: Literal["pad", "reject"] = "pad",
    ties: Literal["reject", "half"] = "reject",
    min_confidence: float | None = None,
    embeddings: bool = True,
    prompt_dtype: Literal["float16", "float32"] = "float16",
    max_text_tokens: int | None = None,
    pairs_per_shard: int = 1024,
    pairs_per_row_group: int = 64,
    part: SourcePart | None = None,
    devices: Sequence[str] = ("cpu",),
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Prepared:
    """A data set in its original layout to latent shards: what `dina-lrm prepare` does, see its help.

    Args:
        root: folder with its files; None streams a set that is published as a table from the hub.
        part: of the source, from `source_parts`; None is all of it.
        devices: one process each.
        on_progress: called with "pairs" or "prompts", how many are done, and how many of these were found
            done.
    """
    if root is None:
        files, base = {"from the hub": ""}, Path()
        stream = read_hub(source, split=split, check_images="none")
    else:
        root = Path(root)
        base = root if root.is_dir() else root.parent
        found = source_files(source, root, split=split)
        files = {image_name(file.relative_to(base)): content_digest(file) or "" for file in found}
        stream = read_source(source, root, split=split, check_images="none")
    if part is not None:
        stream = part.of(stream)
    encoder = pipeline_encoders(pipeline, dtype=torch.float32)
    if source != "latent-cache":
        encoder.picture_size(1024, 1024)  # a pipeline without a VAE is refused before anything is written
    settings = PrepareSettings(
        source=source,
        split=split,
        pipeline=pipeline,
        latent_space=encoder.latent_space,
        max_pixels=max_pixels,
        mixed_sizes=mixed_sizes,
        ties=ties,
        min_confidence=min_confidence,
        embeddings=embeddings,
        prompt_dtype=prompt_dtype,
        max_text_tokens=max_text_tokens,
        pairs_per_shard=pairs_per_shard,
        pairs_per_row_group=pairs_per_row_group,
        files=files,
        part=None if part is None else part.settings(),
    )
    load = partial(pair_encoder, pipeline=pipeline, max_pixels=max_pixels, max_text_tokens=max_text_tokens)
    return prepare(stream, Path(output), load, settings, root=base, devices=devices, on_progress=on_progress)


def source_parts(
    source: str,
    root: str | Path,
    *,
    fraction: float,
    seed: int = 0,
    split: str | None = None,
    ties: Literal["reject", "half"] = "reject",
    min_confidence: float | None = None,
) -> dict[str, SourcePart]:
    """The parts "train" and "test" of a local source for `prepare_source`, without a prompt or a picture in
    common.

    Args:
        fraction: of the pairs, for "test", in (0, 1).
        seed: of the split.
        ties, min_confidence: as `prepare_source` is going to be given them.
    """

    def usable(item: Comparison) -> bool:
        sides = (item.pair.chosen, item.pair.rejected)
        there = all(file_fault(side) is None for side in sides if isinstance(side, Path))
        return there and unwanted(item, ties=ties, min_confidence=min_confidence) is None

    stream = read_source(source, root, split=split, check_images="none")
    return split_source(stream, fraction=fraction, seed=seed, usable=usable)


def latent_pairs(
    source: str,
    model: RewardModel,
    *,
    num_prompts: int = 1000,
    seed: int = 0,
    image_root: str | None = None,
    rejects_file: Path | None = None,
    cache_gigabytes: float = 2.0,
    log: Log | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PairSet:
    """Pairs of latents from "shapes", a folder of `dina-lrm prepare`, a latents file (.safetensors), a folder
    of such files, or preference rows (.jsonl, .parquet).

    Args:
        num_prompts, seed: of shapes pairs; read only for them.
        image_root: of relative paths in rows; read only for them.
        rejects_file: where unusable rows are listed with their reason.
        cache_gigabytes: of shards kept in memory.
        log: told what was found.
        on_progress: called with (images done, images in all).
    """
    if source == "shapes":
        return shapes_pairs(model, num_prompts=num_prompts, seed=seed, on_progress=on_progress)
    if _holds_latents(source):
        path = Path(source)
        if not path.is_dir():
            return LatentPairs.load(path)
        if (path / "prepare.json").is_file() or (path / "manifest.json").is_file():
            return LatentShards.open(
                path,
                encode=lambda prompts: prompt_rows(model.encode_prompts(prompts)),
                cache_bytes=round(cache_gigabytes * 2**30),
            )
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise InvalidInputError(
                f"the folder {source!r} holds neither shards of `dina-lrm prepare` nor latents files "
                "(.safetensors)"
            )
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
                'pairs come from "shapes", a folder of `dina-lrm prepare`, a .safetensors file of latents '
                "or a folder of them, or .jsonl / .parquet rows; "
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
    if output is not None:
        recover_folder(output, OWNED)
    if config.resume and output is not None and log is not None:
        begun = any((output / name).exists() for name in ("last", "last.old"))
        log(f"going on with {output}" if begun else f"no checkpoint in {output} yet: starting anew")

    def pairs(part: str, source: str, num_prompts: int, seed: int) -> PairSet:
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
                cache_gigabytes=config.data.cache_gigabytes,
                log=log,
                on_progress=report,
            )
        if log is not None:
            log(f"{part}: {len(made)} pairs of {made.num_prompts} prompts")
        if stored is not None and isinstance(made, LatentPairs):
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
