"""Pairs of a run: prepared shards, rows that are encoded now, or the bundled world."""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from accelerate import PartialState
from rich.console import Console

from dina_lrm.checkpoints.dina import OWNED
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.latents import LatentPairs
from dina_lrm.data.pairs import image_name
from dina_lrm.data.prepare.run import prepare
from dina_lrm.data.prepare.settings import Prepared, PrepareSettings, unwanted
from dina_lrm.data.prepare.shard import prompt_rows
from dina_lrm.data.rows import PATTERNS
from dina_lrm.data.shards.columns import no_shards
from dina_lrm.data.shards.read import LatentShards, PairSet, set_aside
from dina_lrm.data.sources.hub import read_hub
from dina_lrm.data.sources.registry import read_source, source_files, source_length
from dina_lrm.data.split import SourcePart, fold_prompt, split_source
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import content_digest, file_fault, recover_folder
from dina_lrm.models.encoders import Encoders, pipeline_encoders
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.runs.distribution import on_cpu
from dina_lrm.runs.pace import WorkProgress
from dina_lrm.training.config import TrainConfig
from dina_lrm.training.trainer import check_batch_size

__all__ = [
    "Log",
    "RunPairs",
    "latent_pairs",
    "open_shards",
    "pair_encoder",
    "prepare_source",
    "raw_source",
    "shapes_pairs",
    "source_parts",
    "unseen_pairs",
]

Log = Callable[[str], None]
PAIRS_PER_SHARD = 1024
"""Comparisons behind each file of pairs that a run prepares itself: what is lost at most when it is killed.
"""
PAIRS_PER_PROMPT = 6
"""Pairs of the shapes domain: four pictures of a caption, every two compared."""


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


FORMS = (
    '"shapes", a folder of `dina-lrm prepare`, a latents file (.safetensors) or a folder of them, a file of '
    "preference rows, or a folder of pairs (NAME.txt, NAME.chosen.png, NAME.rejected.png)"
)


def latent_pairs(
    source: str,
    model: RewardModel,
    *,
    prepared: Path | None = None,
    num_prompts: int = 1000,
    seed: int = 0,
    part: Literal["train", "validation", "test"] | None = None,
    cache_gigabytes: float = 2.0,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> PairSet:
    """Pairs of latents, from wherever they are.

    Args:
        source: "shapes", a folder of `dina-lrm prepare`, a latents file (.safetensors), a folder of such
            files, preference rows, or a folder of pairs.
        prepared: folder that rows and folders of pairs are prepared into; what it holds of them is kept.
        num_prompts, seed, part: of shapes pairs.
        cache_gigabytes: of shards kept in memory.
        on_progress: called with how many pictures (shapes) or comparisons are done, how many there are, and
            how many were found done.

    Raises:
        InvalidInputError: there are no pairs there, or pictures and nowhere to prepare them.
    """

    def report(done: int, total: int, found: int = 0) -> None:
        if on_progress is not None:
            on_progress(done, total, found)

    if source == "shapes":
        return shapes_pairs(model, num_prompts=num_prompts, seed=seed, part=part, on_progress=report)
    path = Path(source)
    raw = raw_source(path)
    if raw is None:
        if not path.is_dir():
            return LatentPairs.load(path)
        files = sorted(path.glob("*.safetensors"))
        if files:
            return LatentPairs.concatenate([LatentPairs.load(file) for file in files])
        return open_shards(path, model, cache_gigabytes=cache_gigabytes)
    if prepared is None:
        raise InvalidInputError(f"{source} holds pictures, which are prepared first: where to is not said")
    total = source_length(raw, path)
    # Bytes do not depend on how many processes there are; a part is one task, and a GPU has room for one
    # process beside the model.
    useful = min(len(os.sched_getaffinity(0)), max(1, math.ceil(total / PAIRS_PER_SHARD)))
    prepare_source(
        raw,
        path,
        prepared,
        pipeline=model.config.backbone_id or "bundled",
        max_text_tokens=model.config.max_text_tokens,
        pairs_per_shard=PAIRS_PER_SHARD,
        devices=["cpu"] * useful if model.device.type == "cpu" else [str(model.device)],
        on_progress=lambda kind, done, found: report(done, total, found) if kind == "pairs" else None,
    )
    return open_shards(prepared, model, cache_gigabytes=cache_gigabytes)


def open_shards(folder: Path, model: RewardModel, *, cache_gigabytes: float = 2.0) -> LatentShards:
    """A folder of `dina-lrm prepare`; the model encodes prompts where it holds no embeddings."""
    return LatentShards.open(
        folder,
        encode=lambda prompts: prompt_rows(model.encode_prompts(prompts)),
        cache_bytes=round(cache_gigabytes * 2**30),
    )


def raw_source(path: Path) -> Literal["jsonl", "folder"] | None:
    """How `prepare` reads a path that holds pictures: as rows or as a folder of pairs; None for latents.

    Raises:
        InvalidInputError: nothing that pairs can be read from.
    """
    if path.is_file():
        return None if path.suffix == ".safetensors" else "jsonl"
    if not path.is_dir():
        raise InvalidInputError(f"no pairs at {str(path)!r}: pairs come from {FORMS}")
    if any((path / name).is_file() for name in ("prepare.json", "manifest.json")):
        return None
    if any(path.glob("*.safetensors")):
        return None
    if any((path / part / "prepare.json").is_file() for part in ("train", "test")):
        raise InvalidInputError(no_shards(path))
    if any(path.rglob("*.txt")):
        return "folder"
    if any(any(path.glob(pattern)) for pattern in PATTERNS):
        return "jsonl"
    raise InvalidInputError(f"the folder {str(path)!r} holds no pairs: pairs come from {FORMS}")


def shapes_pairs(
    model: RewardModel,
    *,
    num_prompts: int,
    seed: int,
    part: Literal["train", "validation", "test"] | None = None,
    kind: Literal["plain", "varied", "renders"] = "plain",
    num_raters: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentPairs:
    """Simulated pairs of the bundled domain, made with the bundled pipeline and encoded by `model`.

    Args:
        part: of the captions; None: all of them.
        kind: of the pictures, see `shapes.pairs`.
        num_raters: votes for each pair, an odd number.
    """
    # Here, since only this source loads the generator.
    from dina_lrm.shapes.pairs import make_shapes_pairs
    from dina_lrm.shapes.pipeline import load_pipeline
    from dina_lrm.shapes.raters import RaterPanel

    pipeline = None if kind == "renders" else load_pipeline(device=str(model.device))
    made = make_shapes_pairs(
        pipeline,
        num_prompts=num_prompts,
        seed=seed,
        part=part,
        kind=kind,
        panel=RaterPanel(num_raters=num_raters),
        on_progress=on_progress,
    )
    return made.to_latents(model)


def unseen_pairs(
    model: RewardModel,
    name: Literal["generators", "damage", "style"],
    *,
    num_prompts: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentPairs:
    """Simulated pairs off the distribution of training (`build.unseen`), encoded by `model`."""
    from dina_lrm.build.unseen import make_unseen_pairs

    made = make_unseen_pairs(
        name, num_prompts=num_prompts, seed=seed, device=str(model.device), on_progress=on_progress
    )
    return made.to_latents(model)


class RunPairs:
    """The pairs of a run, wherever they come from."""

    def __init__(self, config: TrainConfig, stack: ExitStack, log: Log, console: Console) -> None:
        self.config, self.console = config, console
        self.described: list[str] = []
        """Lines about the pairs, for the log and the model card."""
        self.train = config.data.train
        if self.train is None:
            raise InvalidInputError(f"give training pairs, --data.train PAIRS: {FORMS}")
        self.processes = PartialState(cpu=on_cpu(config.cpu))
        self.log: Log = log if self.processes.is_main_process else lambda line: None  # one process speaks
        self.output = None if config.output is None else Path(config.output)
        raw = [source for source in (self.train, config.data.validation) if self._is_raw(source)]
        if self.output is not None:
            recover_folder(self.output, OWNED)
            recover_folder(self.output / "last")
            self.folder = self.output / "pairs"
        elif raw and self.processes.num_processes > 1:
            raise InvalidInputError(f"several processes share the prepared pairs of {raw[0]}: give an output")
        else:
            self.folder = Path(stack.enter_context(TemporaryDirectory(prefix="dina-lrm-pairs-")))
        # What is known before anything is made or encoded; a table may hold several pairs in a row.
        if self.train == "shapes":
            check_batch_size(config.batch_size, PAIRS_PER_PROMPT * config.data.train_prompts)
        elif self._is_raw(self.train) and Path(self.train).suffix != ".parquet":
            check_batch_size(config.batch_size, source_length(raw_source(Path(self.train)) or "", self.train))
        if config.resume and self.output is not None:
            begun = (self.output / "last").exists()
            self.log(
                f"going on with {config.output}"
                if begun
                else f"no checkpoint in {config.output} yet: starting anew"
            )

    @staticmethod
    def _is_raw(source: str | None) -> bool:
        return source not in (None, "shapes", "auto") and raw_source(Path(source or "")) is not None

    def get(self, model: RewardModel) -> tuple[PairSet, PairSet | None]:
        """Training pairs, and validation pairs where there are to be any."""
        data, seed = self.config.data, self.config.seed
        assert self.train is not None
        pairs = self._named(
            "train", self.train, model, data.train_prompts, mix_seeds(seed, Stream.TRAINING_PAIRS)
        )
        source = data.validation
        if source == "auto" and self.train == "shapes":
            source = "shapes"
        if source is None:
            self._tell("validation: none")
            return pairs, None
        if source != "auto":
            held_out = self._named(
                "validation", source, model, data.validation_prompts, mix_seeds(seed, Stream.VALIDATION_PAIRS)
            )
            shared = used_prompts(pairs) & used_prompts(held_out)
            if shared:
                count = f"{len(shared)} of its {held_out.num_prompts}"
                self._tell(f"validation shares prompts with the training pairs: {count}")
            return pairs, held_out
        try:
            pairs, held_out = set_aside(
                pairs,
                data.validation_fraction,
                max_pairs=data.max_validation_pairs,
                seed=mix_seeds(seed, Stream.VALIDATION_PAIRS),
            )
        except InvalidInputError as error:
            raise InvalidInputError(
                f"no validation pairs can be set aside: {error}. Give others (--data.validation FILE), a "
                "larger share (--data.validation-fraction), or go without (--data.validation None)"
            ) from error
        self._tell(
            f"validation: {len(held_out)} of these pairs, of {held_out.num_prompts} prompts, set aside by "
            f"prompt and picture; {len(pairs)} pairs of {pairs.num_prompts} prompts are trained on"
        )
        return pairs, held_out

    def _tell(self, line: str) -> None:
        self.described.append(line)
        self.log(line)

    def _named(self, part: str, source: str, model: RewardModel, num_prompts: int, seed: int) -> PairSet:
        found = self._pairs(part, source, model, num_prompts, seed)
        line = f"{part}: {len(found)} pairs of {found.num_prompts} prompts from {source}"
        if isinstance(found, LatentShards):
            line += f"; {found.num_rejects} comparisons could not be used ({found.folder / 'rejects.jsonl'})"
        self._tell(line)
        return found

    def _pairs(self, part: str, source: str, model: RewardModel, num_prompts: int, seed: int) -> PairSet:
        config = self.config
        cache = config.data.cache_gigabytes
        stored = self.folder / f"{part}.safetensors" if source == "shapes" and self.output else None
        if stored is not None and config.resume and stored.exists():
            return LatentPairs.load(stored)
        prepared = self.folder / part
        if self._is_raw(source) and not self.processes.is_main_process:
            self.processes.wait_for_everyone()  # until the first process has prepared them
            return open_shards(prepared, model, cache_gigabytes=cache)
        with WorkProgress(console=self.console, log=self.log) as progress:

            def report(done: int, total: int, found: int) -> None:
                progress.tell(f"{part} pairs", done, found, total=total)

            made = latent_pairs(
                source,
                model,
                prepared=prepared,
                num_prompts=num_prompts,
                seed=seed,
                part="train" if part == "train" else "validation",
                cache_gigabytes=cache,
                on_progress=report,
            )
        if stored is not None and isinstance(made, LatentPairs):
            made.save(stored)
        if self._is_raw(source):
            self.processes.wait_for_everyone()
        return made


def used_prompts(pairs: PairSet) -> set[str]:
    """Folded prompts that at least one pair uses."""
    return {fold_prompt(pairs.prompts[row]) for row in pairs.prompt_index.unique().tolist()}
