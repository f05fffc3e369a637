"""Public preference data from local files in its original layout, as one stream of comparisons.

    hpdv3        train.json, test.json, all.json: path1 is preferred, choice_dist are the votes
    hpdv3++      train/train_{aes,tf}.json, test/test_{aes,tf}.json: path1 is preferred
    hpdv2        train.json: human_preference of file_path; test.json: rank of image_path, lower is better
    imagereward  test.json: ranking of generations, 1 is best, ties allowed
    genai-bench  parquet: left_image, right_image, vote_type
    pickapic     parquet: jpg_0, jpg_1, label_0, label_1
    imagerewarddb  images/SPLIT/SPLIT_N.zip, also unpacked (see `imagerewarddb`); parquet of its configs
                   *_pair (img_better, img_worse) and *_group (lists with ranks)
    rapidata     parquet: image1, image2, votes_image1, votes_image2
    open-image-preferences  parquet: chosen, rejected
    editreward   train.json: path1 is preferred; parquet: left_output_image, right_output_image, vote_type
    folder       NAME.txt with NAME.chosen.* and NAME.rejected.* beside it, in any subfolder
    jsonl        our own rows, whatever the file's form (`data.sources.own_rows`, `data.rows`)
    latent-cache  the latents that the paper's code caches: parquet, and an index in CSV

What a row of a public set means is in `layouts.py`; what the Hugging Face hub has is read by `hub.py`.

Nothing is dropped: what cannot be a comparison is a `Reject` with its reason, and a picture that is not there
costs the comparisons that need it and no others. Files of any size are read as a stream.
"""

import ast
import csv
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dina_lrm.data.comparisons import Check, Comparison, Row, Votes, share, votes_of
from dina_lrm.data.pairs import Reject, StoredLatent
from dina_lrm.data.row import BadRow, checked_row
from dina_lrm.data.rows import FORMS, PATTERNS, count_rows, is_rows_file
from dina_lrm.data.sources.imagerewarddb import count_part, part_files, read_part
from dina_lrm.data.sources.layouts import SOURCES, Source
from dina_lrm.data.sources.own_rows import own_row, read_file
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import file_fault, not_a_file

__all__ = [
    "LOCAL",
    "Comparison",
    "read_source",
    "source_files",
    "source_length",
    "source_split",
]


LOCAL = ("jsonl", "folder", "latent-cache")
"""Sources of one's own: they have no splits."""


def read_source(
    name: str, root: str | Path, *, split: str | None = None, check_images: Check = "exists"
) -> Iterator[Comparison | Reject]:
    """Comparisons of a data set, row by row, with a `Reject` for each row that cannot be one.

    Args:
        name: one of `data.sources.layouts.SOURCES` or `LOCAL`.
        root: folder that holds the data set's files as published; for jsonl, also the file itself.
        split: None: the default of the source, see `data.sources.layouts.SOURCES`.
        check_images: "none" leaves images alone, so that counts can be had without them.

    Raises:
        InvalidInputError: no such source or split, or none of its files are there.
    """
    root = Path(root)
    if name == "folder":
        yield from _folder(root, check_images, split)
        return
    read_row = {"jsonl": own_row, "latent-cache": _cached_row}.get(name)
    if read_row is None:
        read_row = source_split(name, split)[0].read_row
    files = source_files(name, root, split=split)
    base = root if root.is_dir() else root.parent
    kept = _cache_index(root) if name == "latent-cache" else None
    for file in files:
        relative = _text(file.relative_to(base))
        if _is_part(name, file):
            yield from read_part(file, name=relative, root=base, check=check_images)
            continue
        for item in read_file(file, read_row, name=relative, root=base, check=check_images):
            if kept is not None and (file.name, item.row) not in kept:
                yield Reject(row=item.row, reason="not in the index of the cache", file=relative)
            else:
                yield item


def source_files(name: str, root: str | Path, *, split: str | None = None) -> list[Path]:
    """The files that `read_source` reads rows from, in its order; none are pictures alone.

    Raises:
        InvalidInputError: no such source or split, or none of its files are there.
    """
    root, kind = Path(root), "pairs" if name == "folder" else name
    if name in LOCAL and split is not None:
        raise InvalidInputError(f"{name} has no splits; got {split!r}")
    match name:
        case "folder":
            patterns: tuple[str, ...] = ("**/*.txt",)
        case "jsonl":
            if not root.is_dir():
                if file_fault(root) is not None:
                    raise InvalidInputError(f"no preference rows: {not_a_file(root)}")
                if not is_rows_file(root):
                    raise InvalidInputError(f"rows are {FORMS}: not {root}")
                return [root]
            patterns = PATTERNS
        case "latent-cache":
            patterns = ("**/part_rank*.parquet",)
        case _:
            source, split = source_split(name, split)
            patterns = source.splits[split]
    if not root.is_dir():
        raise InvalidInputError(f"no folder of {kind}: {not_a_file(root)}")
    files = [file for pattern in patterns for file in sorted(root.glob(pattern)) if not file.is_dir()]
    if not files:
        raise InvalidInputError(f"no {', '.join(patterns)} in {root}: is this the folder of {kind}?")
    return part_files(files)


def source_length(name: str, root: str | Path, *, split: str | None = None) -> int:
    """How many comparisons and rejects `read_source` gives, for a progress bar.

    Exact, but for parquet, which may hold pictures and is not read through: a row of a list counts as one.
    """
    files = source_files(name, root, split=split)
    if name == "folder":
        return len(files)
    if any(_is_part(name, file) for file in files):
        return sum(count_part(file) if _is_part(name, file) else count_rows(file) for file in files)
    if any(file.suffix.lower() == ".parquet" for file in files):
        return sum(count_rows(file) for file in files)
    return sum(1 for _ in read_source(name, root, split=split, check_images="none"))


def source_split(name: str, split: str | None) -> tuple[Source, str]:
    """The layout of a public data set, and the split that is meant.

    Raises:
        InvalidInputError: no such source or split.
    """
    if name not in SOURCES:
        known = ", ".join((*LOCAL, *SOURCES))
        raise InvalidInputError(f"unknown source {name!r}; known: {known}")
    source = SOURCES[name]
    split = source.default_split if split is None else split
    if split not in source.splits:
        raise InvalidInputError(f"{name} has no split {split!r}; it has {', '.join(source.splits)}")
    return source, split


def _is_part(name: str, file: Path) -> bool:
    """Whether a file is a part of ImageRewardDB, and no table."""
    return name == "imagerewarddb" and file.suffix != ".parquet"


def _text(path: Path) -> str:
    """Its name; half of a character, as a name that is no UTF-8 gives, is written as an escape."""
    return str(path).encode(errors="backslashreplace").decode()


# --- layouts of our own ------------------------------------------------------------------------------------


def _cached_row(row: Row) -> Iterator[Comparison | Reject]:
    """A row of the latent cache: latent1 is the chosen side, both in float32, shifted and scaled.

    `detailed_results` is a dict written as text, with votes_chosen, votes_rejected and confidence. Source:
    the cache that the paper's code trains on.
    """
    values = row.values
    try:
        details = ast.literal_eval(values.get("detailed_results") or "{}")
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise BadRow(f"detailed_results: not a dict written as text ({error})") from error
    if not isinstance(details, Mapping):
        raise BadRow(f"detailed_results: {type(details).__name__}, not a dict")
    sides = []
    for side in ("latent1", "latent2"):
        content = values.get(side)
        if not isinstance(content, bytes):
            raise BadRow(f"no latent: {side} is {type(content).__name__}")
        sides.append(StoredLatent(content, name=str(values.get(side.replace("latent", "image") + "_path"))))
        if row.check != "none":
            try:
                sides[-1].array()
            except InvalidInputError as error:
                raise BadRow(f"{error} in {side}") from error
    yield row.compare(
        row.prompt(),
        *sides,
        confidence=share(details.get("confidence"), "confidence"),
        generators=(row.text("model1"), row.text("model2")),
        source="latent-cache",
        votes=_votes(details.get("votes_chosen"), details.get("votes_rejected")),
    )


def _cache_index(root: Path) -> set[tuple[str, int]] | None:
    """Rows that the index lists, by file name and position in the file; None where there is no index."""
    import pyarrow.parquet as parquet

    listed: set[tuple[str, int]] = set()
    starts: dict[str, list[int]] = {}
    files = {file.name: file for file in root.glob("**/part_rank*.parquet")}
    indices = sorted(root.glob("**/*.csv"))
    for index in indices:
        with index.open(newline="", encoding="utf-8") as lines:
            for entry in csv.DictReader(lines):
                try:
                    name = Path(entry["parquet_path"]).name
                    group, position = int(entry["row_group"]), int(entry["row_index"])
                except (KeyError, TypeError, ValueError) as error:
                    raise InvalidInputError(
                        f"{index} is not an index of the latent cache: {error}"
                    ) from error
                if name not in files:
                    raise InvalidInputError(f"{index} names {name}, which is not in {root}")
                if name not in starts:
                    metadata = parquet.read_metadata(files[name])
                    sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
                    starts[name] = [0, *itertools.accumulate(sizes)]
                if not 0 <= group < len(starts[name]) - 1:
                    raise InvalidInputError(f"{index} names row group {group} of {name}, which has fewer")
                listed.add((name, starts[name][group] + position))
    return listed if indices else None


def _folder(root: Path, check: Check, split: str | None) -> Iterator[Comparison | Reject]:
    """NAME.txt holds the prompt; NAME.chosen.png and NAME.rejected.png, of any format, lie beside it."""
    beside: dict[Path, dict[str, list[Path]]] = {}
    for index, file in enumerate(source_files("folder", root, split=split)):
        if file.parent not in beside:
            named = beside[file.parent] = {}
            for place in file.parent.iterdir():
                named.setdefault(place.stem, []).append(place)
        name = _text(file.relative_to(root))
        try:
            fault = file_fault(file)
            prompt = None if fault is not None else file.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            prompt, fault = None, f"cannot be read ({error})"
        if prompt is None:
            yield Reject(row=index, reason=f"unreadable prompt: {_text(Path(file.name))} {fault}", file=name)
            continue
        values: dict[str, Any] = {"prompt": prompt}
        for side in ("chosen", "rejected"):
            places = beside[file.parent].get(f"{file.stem}.{side}", [])
            values[side] = str(places[0].relative_to(root)) if len(places) == 1 else None
        checked = checked_row(values)
        if isinstance(checked, BadRow):
            yield Reject(row=index, reason=str(checked), file=name)
        else:
            yield from Row(checked, index, None, name, root, check).read(_folder_row)


def _folder_row(row: Row) -> Iterator[Comparison | Reject]:
    stem = Path(row.file).stem
    sides = [row.image(row.values.get(side), f"{stem}.{side}.*") for side in ("chosen", "rejected")]
    yield row.compare(row.prompt(), *sides)


def _votes(chosen: Any, rejected: Any) -> Votes | None:
    """None where the layout states none."""
    stated = [None if votes == "null" else votes for votes in (chosen, rejected)]
    return None if None in stated else votes_of(*stated)
