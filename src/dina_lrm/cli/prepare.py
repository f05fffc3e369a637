"""`dina-lrm prepare`: a data set to latent shards, once, for every training run after."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dina_lrm.cli.console import UsageError, WorkProgress, log, print_json, print_table
from dina_lrm.cli.options import JsonFlag, find_device

if TYPE_CHECKING:
    from dina_lrm.data.prepare import Prepared

SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Encode a data set: pictures to latents in aspect buckets, prompts to embeddings, into parquet shards.

    An interrupted run goes on where it stopped when the same command is given again, and ends in the same
    bytes. What cannot be used is listed in OUTPUT/rejects.jsonl with its reason.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """hpdv3, hpdv3++, hpdv2, imagereward, imagerewarddb, genai-bench, pickapic, folder, jsonl (our own rows)
    or latent-cache."""
    root: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder with the data set's files as published; for jsonl, also the file. Without it genai-bench,
    pickapic and imagerewarddb are streamed from the Hugging Face hub."""
    pipeline: Annotated[str, tyro.conf.arg(metavar="ID")] = "bundled"
    """The generator whose VAE and text encoders are used: "bundled", a folder or a hub id."""
    output: Annotated[Path, tyro.conf.arg(metavar="LATENTS")]
    """Receives the shards."""
    split: str | None = None
    """Of the data set; by default the one it is evaluated on, so say train to train."""
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
    """Of the stored embeddings."""
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
    options = tyro.cli(Prepare, prog="dina-lrm prepare", args=arguments)
    if options.processes is not None and options.processes < 1:
        raise UsageError(f"--processes is at least 1; got {options.processes}")
    from dina_lrm.build import prepare_source
    from dina_lrm.data.sources import source_length

    total = None
    if options.root is not None:
        log(f"counting {options.source} in {options.root}")
        total = source_length(options.source, options.root, split=options.split)
    devices = find_devices(options.device, options.processes)
    names = ("source", "root", "pipeline", "output", "split", "max_pixels", "mixed_sizes", "ties")
    names += ("min_confidence", "embeddings", "prompt_dtype", "max_text_tokens", "pairs_per_shard")
    names += ("pairs_per_row_group",)
    with WorkProgress({"pairs": total}) as progress:
        prepared = prepare_source(
            **{name: getattr(options, name) for name in names}, devices=devices, on_progress=progress.tell
        )
    if options.as_json:
        from dataclasses import asdict

        print_json({"output": str(options.output), **asdict(prepared)})
        return 0
    print_table(["", "count"], list(lines(prepared)), title=f"{options.source} in {options.output}")
    log(f"next: dina-lrm train RECIPE --model.pipeline {options.pipeline} --data.train {options.output}")
    return 0


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
