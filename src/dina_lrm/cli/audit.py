"""`dina-lrm audit`: what a test set shares with training data, and whether its sides stand evenly."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from dina_lrm.cli.console import UsageError, log, print_json, print_table
from dina_lrm.cli.options import JsonFlag
from dina_lrm.files import atomic_write
from dina_lrm.runs.pace import WorkProgress


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Compare a test set with the data a model may have been trained on, by prompt, file and perceptual hash,
    and measure how often the side that stood first was chosen."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """The tested set: any source of `dina-lrm inspect`."""
    root: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder with its files as published; for jsonl, also the file."""
    split: str | None = None
    """The part of the tested set, such as test; by default the one that is evaluated on."""
    against: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None
    """What it is compared with; by default the same source."""
    against_root: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the other set; by default the same folder."""
    against_split: str | None = None
    """The part of the other set; by default train, or the only one that it has."""
    images: bool = True
    """Hash the images; without, only prompts are compared."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Lists everything shared, one JSON object a line."""
    as_json: JsonFlag = False
    """Print one JSON object instead of a table."""


def main(arguments: Sequence[str]) -> int:
    options = tyro.cli(Audit, prog="dina-lrm audit", args=arguments)
    if options.output is not None and options.output.exists():
        raise UsageError(f"{options.output} exists: choose another --output")

    from dina_lrm.data.inspection import PHASH_DISTANCE, audit
    from dina_lrm.data.sources.registry import read_source

    other_name, against_split = options.against or options.source, other_split(options)
    tested = read_source(options.source, options.root, split=options.split, check_images="none")
    other = read_source(
        other_name,
        options.against_root or options.root,
        split=against_split,
        check_images="none",
    )
    with WorkProgress() as progress:
        found = audit(
            tested,
            other,
            look_at_images=options.images,
            on_image=partial(progress.tell, "images"),
        )
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(asdict(overlap), ensure_ascii=False) + "\n" for overlap in found.overlaps)
        atomic_write(options.output, lines.encode())
        log(f"{len(found.overlaps)} overlaps listed in {options.output}")
    bias = found.position_bias
    if options.as_json:
        record = {name: value for name, value in asdict(found).items() if name != "overlaps"}
        print_json({**record, "position_bias": bias})
        return 0
    rows = [("prompts shared", f"{found.shared_prompts:,} of {found.prompts:,}")]
    if found.shared_files is not None:
        rows.append(("images with the same bytes", f"{found.shared_files:,} of {found.images:,}"))
        near = f"images within {PHASH_DISTANCE} bits of perceptual hash"
        rows.append((near, f"{found.shared_pictures:,} of {found.images:,}"))
        rows.append(("images that could not be read", f"{found.unreadable_images:,}"))
    rows.append(("comparisons touched by any of it", f"{found.tainted_pairs:,} of {found.pairs:,}"))
    if bias is None:
        rows.append(("first side chosen", "not known: the layout keeps no positions"))
    else:
        share, low, high = (100 * number for number in bias)
        stated = f"{share:.1f} % ({low:.1f} to {high:.1f}) of {found.positioned_pairs:,}"
        rows.append(("first side chosen", stated))
    print_table(
        ["", "found"], rows, title=f"{options.source} against {other_name} {against_split or ''}".rstrip()
    )
    return 0


def other_split(options: Audit) -> str | None:
    """Split of the other set; UsageError where that would be the tested set once more."""
    from dina_lrm.data.sources.layouts import SOURCES
    from dina_lrm.data.sources.registry import LOCAL

    name = options.against or options.source
    own, other = SOURCES.get(options.source), SOURCES.get(name)
    split = options.against_split
    if split is None and other is not None:
        if "train" in other.splits:
            split = "train"
        elif len(other.splits) == 1:
            split = other.default_split
        else:
            raise UsageError(f"{name} has no split train: give --against-split {'|'.join(other.splits)}")
    tested = options.split or (own.default_split if own is not None else None)
    root = options.against_root or options.root
    if options.source not in (*SOURCES, *LOCAL):
        return split  # which `read_source` refuses by name
    if (name, root.resolve(), split) == (options.source, options.root.resolve(), tested):
        of = f"split {split} of {name}" if split else name
        raise UsageError(
            f"nothing to compare with: {of} is the tested set itself. Say what a model was trained on: "
            "--against SOURCE --against-root DIR, or another --against-split"
        )
    return split
