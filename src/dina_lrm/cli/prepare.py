"""`dina-lrm prepare`: a data set to latent shards, once, for every training run after."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dina_lrm.cli.console import UsageError, log, print_json, print_table
from dina_lrm.cli.options import JsonFlag, find_device
from dina_lrm.runs.pace import WorkProgress

if TYPE_CHECKING:
    from dina_lrm.data.prepare.settings import Prepared
    from dina_lrm.data.split import SourcePart

SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Encode a data set: pictures to latents in aspect buckets, prompts to embeddings, into parquet shards.

    An interrupted run goes on where it stopped when the same command is given again, and ends in the same
    bytes. What cannot be used is listed in LATENTS/rejects.jsonl with its reason.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """hpdv3, hpdv3++, hpdv2, imagereward, imagerewarddb, genai-bench, pickapic, rapidata,
    open-image-preferences, editreward, folder, latent-cache, or jsonl: your own rows, in .jsonl, .json, .csv
    or .parquet, the text forms also with .gz."""
    root: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder with the data set's files as published; for jsonl, also the file. Without it, genai-bench,
    pickapic, rapidata, open-image-preferences and editreward are streamed from the Hugging Face hub, and
    imagerewarddb is downloaded."""
    pipeline: Annotated[str, tyro.conf.arg(metavar="ID")] = "bundled"
    """The generator whose VAE and text encoders are used: "bundled", a folder or a hub id."""
    output: Annotated[Path, tyro.conf.arg(metavar="LATENTS")]
    """Receives the shards."""
    split: str | None = None
    """The part of the data set; by default the one it is evaluated on, so say train to train."""
    test_fraction: float | None = None
    """Set so many of the pairs aside to test on: writes LATENTS/train and LATENTS/test, which have no prompt
    and no picture in common. Needs --root."""
    seed: int = 0
    """Seed of the split into train and test; read only with --test-fraction."""
    max_pixels: int | None = 1024 * 1024
    """Larger pictures are shrunk to about so many pixels; None keeps every size that the backbone can
    read."""
    mixed_sizes: Literal["pad", "reject"] = "pad"
    """Two pictures of different size are brought to that of the one with fewer pixels. Where their aspect
    ratios differ by 5 % or more: pad with mid-grey, or reject the pair."""
    ties: Literal["reject", "half"] = "reject"
    """Pairs that nobody won: reject, or keep with a target of one half."""
    min_confidence: float | None = None
    """Reject pairs that the data set is less sure of; those without a stated confidence are kept."""
    embeddings: bool = True
    """Store prompt embeddings. Without, training encodes prompts on the fly."""
    prompt_dtype: Literal["float16", "float32"] = "float16"
    """Precision of the stored embeddings."""
    max_text_tokens: int | None = None
    """Longest prompt of the main text encoder, in tokens; by default the pipeline's own limit."""
    processes: int | None = None
    """By default one for each GPU, or for each CPU core where there is none."""
    device: str = "auto"
    """cpu, or cuda for all GPUs, or one such as cuda:1."""
    pairs_per_shard: int = 1024
    """Comparisons behind each file: what is lost at most when a process is killed."""
    pairs_per_row_group: int = 64
    """Pairs that training reads at once."""
    as_json: JsonFlag = False
    """Print one JSON object instead of a table."""


def main(arguments: Sequence[str]) -> int:
    with stopping():
        return prepare(tyro.cli(Prepare, prog="dina-lrm prepare", args=arguments))


def prepare(options: Prepare) -> int:
    if options.processes is not None and options.processes < 1:
        raise UsageError(f"--processes is at least 1; got {options.processes}")
    if options.test_fraction is None and options.seed != Prepare.seed:
        raise UsageError("--seed goes with --test-fraction")
    if options.seed < 0:
        raise UsageError(f"--seed is at least 0; got {options.seed}")
    if options.test_fraction is not None and options.root is None:
        raise UsageError("--test-fraction splits local files: give their folder with --root")
    if options.test_fraction is None and (options.output / "train" / "prepare.json").exists():
        raise UsageError(f"{options.output} holds latents with a split: give --output another folder")
    parts = {"": None} if options.test_fraction is None else split(options)
    devices = find_devices(options.device, options.processes)

    from dina_lrm.build.pairs import prepare_source
    from dina_lrm.data.sources.registry import source_length

    names = ("source", "root", "pipeline", "split", "max_pixels", "mixed_sizes", "ties", "min_confidence")
    names += ("embeddings", "prompt_dtype", "max_text_tokens", "pairs_per_shard", "pairs_per_row_group")
    given = {name: getattr(options, name) for name in names}
    prepared: dict[str, Prepared] = {}
    for name, part in parts.items():
        total = None if part is None else len(part)
        if part is None and options.root is not None:
            log(f"counting {options.source} in {options.root}")
            total = source_length(options.source, options.root, split=options.split)
        elif name:
            log(f"{options.output / name}: {total:,} comparisons")
        with WorkProgress({"pairs": total}) as progress:
            output = options.output / name
            prepared[name] = prepare_source(
                **given, output=output, part=part, devices=devices, on_progress=progress.tell
            )
    if options.as_json:
        from dataclasses import asdict

        records = {name: asdict(one) for name, one in prepared.items()}
        print_json({"output": str(options.output), **(records if options.test_fraction else records[""])})
        return 0
    for name, one in prepared.items():
        print_table(["", "count"], list(lines(one)), title=f"{options.source} in {options.output / name}")
    if options.test_fraction is not None:
        items, pairs = (
            sum(getattr(one, f"num_{kind}") for one in prepared.values()) for kind in ("items", "pairs")
        )
        counts = " + ".join(f"{one.num_pairs:,} for {name}" for name, one in prepared.items())
        log(f"{items:,} comparisons: {counts} + {items - pairs:,} rejected; no prompt or picture is in both")
    trained = options.output / "train" if options.test_fraction is not None else options.output
    log(f"next: dina-lrm train {recipe_of(options.pipeline)} --data.train {trained} --output RUN")
    if options.test_fraction is not None:
        log(f"then: dina-lrm evaluate --model RUN --pairs {options.output / 'test'}")
    return 0


def split(options: Prepare) -> "dict[str, SourcePart | None]":
    """The parts, for folders that are not yet, or hold the same."""
    if (options.output / "prepare.json").exists():
        raise UsageError(f"{options.output} holds latents without a split: give --output another folder")
    from dina_lrm.build.pairs import source_parts

    log(f"splitting {options.source} in {options.root}")
    assert options.root is not None
    assert options.test_fraction is not None
    return {
        **source_parts(
            options.source,
            options.root,
            fraction=options.test_fraction,
            seed=options.seed,
            split=options.split,
            ties=options.ties,
            min_confidence=options.min_confidence,
        )
    }


def recipe_of(pipeline: str) -> str:
    """The recipe for a generator, with the option that a recipe for another one of its kind needs."""
    if pipeline == "bundled":
        return "bundled"
    from dina_lrm.backbones.families import read_architecture
    from dina_lrm.cli.plan import recipe_for
    from dina_lrm.pipelines.source import PipelineSource
    from dina_lrm.recipes.training import recipe

    name = recipe_for(pipeline, read_architecture(PipelineSource(pipeline).network_config()))
    if name is not None and recipe(name).model.pipeline == pipeline:
        return name
    return f"{name or 'RECIPE'} --model.pipeline {pipeline}"


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Ctrl-C and SIGTERM say at once that the run stops and how it goes on; main gives the exit code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        line = "stopping; what was finished is kept: run the same command again to go on\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())  # not print: it may be busy
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_devices(name: str, processes: int | None) -> list[str]:
    """One device a process: all GPUs in turn, or the CPU."""
    import torch

    device = find_device(name)
    if device.type == "cuda" and device.index is None:
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        return [gpus[index % len(gpus)] for index in range(processes or len(gpus))]
    if device.type == "cpu":
        return ["cpu"] * (processes or len(os.sched_getaffinity(0)))
    return [str(device)] * (processes or 1)


def lines(prepared: "Prepared") -> list[tuple[str, str]]:
    """The table."""
    rows = [
        ("comparisons read", f"{prepared.num_items:,}"),
        ("pairs", f"{prepared.num_pairs:,}"),
        *((f"rejected: {reason}", f"{count:,}") for reason, count in prepared.rejects.items()),
        ("prompts", f"{prepared.num_prompts:,}"),
    ]
    if prepared.num_cut_prompts:
        rows.append(("prompts not read whole", f"{prepared.num_cut_prompts:,}"))
    shapes = list(prepared.buckets.items())
    rows += [(f"pairs of latents {shape}", f"{count:,}") for shape, count in shapes[:SHOWN]]
    if len(shapes) > SHOWN:
        rest = sum(count for _, count in shapes[SHOWN:])
        rows.append((f"pairs of {len(shapes) - SHOWN} other shapes", f"{rest:,}"))
    rows.append(("on disk", f"{prepared.num_bytes / 1e6:,.1f} MB"))
    return rows
