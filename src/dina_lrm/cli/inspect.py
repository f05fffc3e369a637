"""`dina-lrm inspect`: what is in a set of preference data, with or without its images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dina_lrm.cli.console import UsageError, log, print_json, print_table
from dina_lrm.cli.options import JsonFlag
from dina_lrm.runs.pace import WorkProgress

if TYPE_CHECKING:
    from dina_lrm.data.inspection import Inspection

SHOWN = 8
"""Resolutions listed in the table; --json has all."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Count rows, prompts, pairs, ties, votes, repetitions, missing images and resolutions of a data set."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """hpdv3, hpdv3++, hpdv2, imagereward, imagerewarddb, genai-bench, pickapic, rapidata,
    open-image-preferences, editreward, latent-cache, folder, or jsonl: your own rows, in .jsonl, .json, .csv
    or .parquet, the text forms also with .gz."""
    root: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder with the data set's files as published; for rows, the file. Without it, genai-bench, pickapic,
    rapidata, open-image-preferences and editreward are streamed from the Hugging Face hub, and imagerewarddb
    is downloaded."""
    split: str | None = None
    """The part of the data set, such as train; by default the one that is evaluated on."""
    images: bool = True
    """Look whether the images are there, and at their sizes."""
    max_sizes: int = 10_000
    """Images whose header is read for the resolutions."""
    as_json: JsonFlag = False
    """Print one JSON object instead of a table."""


def main(arguments: Sequence[str]) -> int:
    options = tyro.cli(Inspect, prog="dina-lrm inspect", args=arguments)
    if options.max_sizes < 0:
        raise UsageError(f"--max-sizes is at least 0; got {options.max_sizes}")

    from dina_lrm.data.inspection import inspect
    from dina_lrm.data.sources.hub import read_hub
    from dina_lrm.data.sources.registry import read_source

    if options.root is None:
        stream = read_hub(options.source, split=options.split, check_images="none")
    else:
        stream = read_source(options.source, options.root, split=options.split, check_images="none")
    with WorkProgress() as progress:
        found = inspect(
            stream,
            look_at_images=options.images,
            max_sizes=options.max_sizes,
            on_row=partial(progress.tell, "rows"),
        )
    if options.as_json:
        print_json({"source": options.source, "split": options.split, **found.to_dict()})
    else:
        print_table(
            ["", "count"], list(lines(found)), title=f"{options.source} in {options.root or 'the hub'}"
        )
        for kind, first in found.first_of.items():
            log(f"{kind}, the first: {first}")
    if not found.strict_pairs + found.ties:
        rows = f"{found.rows:,} rows, all of them rejected" if found.rows else "no rows"
        log(f"there is nothing to compare in {options.source}: {rows}")
    return 0


def lines(found: "Inspection") -> list[tuple[str, str]]:
    """The table."""
    rows = [
        ("rows", f"{found.rows:,}"),
        ("prompts", f"{found.prompts:,}"),
        ("strict pairs", f"{found.strict_pairs:,}"),
        ("ties", f"{found.ties:,}"),
        ("compared more than once", f"{found.repeated_pairs:,}"),
    ]
    if found.pairs_with_votes:
        mean = found.total_votes / found.pairs_with_votes
        rows.append(("pairs with votes", f"{found.pairs_with_votes:,} ({mean:.1f} votes each)"))
        rows.append(("unanimous", f"{found.unanimous:,}"))
    if found.pairs_with_confidence:
        rows.append(("confidence of 0.95 or more", f"{found.confident:,} of {found.pairs_with_confidence:,}"))
    rows.append(("images", f"{found.images:,}"))
    rows.append(("images under several prompts", f"{found.shared_images:,}"))
    if found.missing_images is not None:
        rows.append(("missing images", f"{found.missing_images:,}"))
        rows.append(("unreadable images", f"{found.unreadable_images:,}"))
    rows += [(f"rejected: {reason}", f"{count:,}") for reason, count in found.rejects.most_common()]
    sizes = found.resolutions.most_common(SHOWN)
    rows += [(f"size {size}", f"{count:,}") for size, count in sizes]
    if len(found.resolutions) > SHOWN:
        rest = found.resolutions.total() - sum(count for _, count in sizes)
        rows.append((f"{len(found.resolutions) - SHOWN} other sizes", f"{rest:,}"))
    return rows
