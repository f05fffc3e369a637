"""Public preference data from local files in its original layout, as one stream of comparisons.

    hpdv3        train.json, test.json, all.json: path1 is preferred, choice_dist are the votes
    hpdv3++      train/train_{aes,tf}.json, test/test_{aes,tf}.json: path1 is preferred
    hpdv2        train.json: human_preference of file_path; test.json: rank of image_path, lower is better
    imagereward  test.json: ranking of generations, 1 is best, ties allowed
    genai-bench  parquet: left_image, right_image, vote_type
    pickapic     parquet: jpg_0, jpg_1, label_0, label_1
    imagerewarddb  parquet of the configs *_pair (img_better, img_worse) and *_group (lists with ranks)
    folder       NAME.txt with NAME.chosen.* and NAME.rejected.* beside it, in any subfolder
    jsonl        our own rows, whatever the file's form (`data.own_rows`, `data.rows`)
    latent-cache  the latents that the paper's code caches: parquet, and an index in CSV

The parquet sets can also be streamed from the Hugging Face hub, through `datasets` (`read_hub`).

Nothing is dropped: what cannot be a comparison is a `Reject` with its reason, and a picture that is not there
costs the comparisons that need it and no others. Files of any size are read as a stream.

Source: the layouts are those of the data sets' own readers; each reader's docstring says whose.
"""

import ast
import csv
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dina_lrm.data.comparisons import Check, Comparison, ReadRow, Row, Votes, number, share, votes_of
from dina_lrm.data.own_rows import own_row, read_file
from dina_lrm.data.pairs import Reject, StoredLatent
from dina_lrm.data.rows import FORMS, PATTERNS, BadRow, checked_row, count_rows, is_rows_file, shown
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import file_fault, not_a_file

__all__ = [
    "LOCAL",
    "SOURCES",
    "Comparison",
    "Source",
    "read_hub",
    "read_source",
    "source_files",
    "source_length",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One data set's layout."""

    name: str
    splits: dict[str, tuple[str, ...]]
    """Files of each split, relative to the root; glob patterns allowed."""
    default_split: str
    read_row: ReadRow
    hub: tuple[str, str | None] | None = None
    """Repository and config on the Hugging Face hub, where it is published as a table."""


def read_source(
    name: str, root: str | Path, *, split: str | None = None, check_images: Check = "exists"
) -> Iterator[Comparison | Reject]:
    """Comparisons of a data set, row by row, with a `Reject` for each row that cannot be one.

    Args:
        name: one of `SOURCES` or `LOCAL`.
        root: folder that holds the data set's files as published; for jsonl, also the file itself.
        split: see `SOURCES[name].splits`; None: its default.
        check_images: "none" leaves images alone, so that counts can be had without them.

    Raises:
        InvalidInputError: no such source or split, or none of its files are there.
    """
    root = Path(root)
    if name == "folder":
        yield from _folder(root, check_images)
        return
    read_row = {"jsonl": own_row, "latent-cache": _cached_row}.get(name)
    if read_row is None:
        read_row = _source(name, split)[0].read_row
    files = source_files(name, root, split=split)
    base = root if root.is_dir() else root.parent
    kept = _cache_index(root) if name == "latent-cache" else None
    for file in files:
        relative = _text(file.relative_to(base))
        for item in read_file(file, read_row, name=relative, root=base, check=check_images):
            if kept is not None and (file.name, item.row) not in kept:
                yield Reject(row=item.row, reason="not in the index of the cache", file=relative)
            else:
                yield item


def source_files(name: str, root: str | Path, *, split: str | None = None) -> list[Path]:
    """The files that `read_source` reads rows from, in its order; none are pictures.

    Raises:
        InvalidInputError: no such source or split, or none of its files are there.
    """
    root, kind = Path(root), "pairs" if name == "folder" else name
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
            source, split = _source(name, split)
            patterns = source.splits[split]
    if not root.is_dir():
        raise InvalidInputError(f"no folder of {kind}: {not_a_file(root)}")
    files = [file for pattern in patterns for file in sorted(root.glob(pattern)) if not file.is_dir()]
    if not files:
        raise InvalidInputError(f"no {', '.join(patterns)} in {root}: is this the folder of {kind}?")
    return files


def source_length(name: str, root: str | Path, *, split: str | None = None) -> int:
    """How many comparisons and rejects `read_source` gives, for a progress bar.

    Exact, but for parquet, which may hold pictures and is not read through: a row of a list counts as one.
    """
    files = source_files(name, root, split=split)
    if name == "folder":
        return len(files)
    if any(file.suffix.lower() == ".parquet" for file in files):
        return sum(count_rows(file) for file in files)
    return sum(1 for _ in read_source(name, root, split=split, check_images="none"))


def read_hub(
    name: str, *, split: str | None = None, dataset: str | None = None, check_images: Check = "exists"
) -> Iterator[Comparison | Reject]:
    """The same for a parquet set, streamed from the hub: nothing is downloaded whole.

    Args:
        name: a source with a hub id: genai-bench, pickapic or imagerewarddb.
        dataset: another repository of the same layout, or a local folder of its files.
        split: as of the data set; None: the source's default.

    Raises:
        InvalidInputError: no such source or split, or the source is not published as parquet.
    """
    import datasets

    source, split = (None, split) if name in LOCAL else _source(name, split)
    if source is None or source.hub is None or split is None:
        raise InvalidInputError(
            f"{name} is not published as a table that can be streamed: it needs the folder of its files"
        )
    repository, config = source.hub
    if dataset is not None and Path(dataset).is_dir():
        files = [
            str(file) for pattern in source.splits[split] for file in sorted(Path(dataset).glob(pattern))
        ]
        stream: Any = datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=True)
    else:
        own = config if dataset is None else None
        stream = datasets.load_dataset(dataset or repository, own, split=split, streaming=True)
    for column, feature in (stream.features or {}).items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(column, datasets.Image(decode=False))
    for index, values in enumerate(stream):
        file, checked = f"{repository}/{split}", checked_row(values)
        if isinstance(checked, BadRow):
            yield Reject(row=index, reason=str(checked), file=file)
        else:
            yield from Row(checked, index, None, file, Path(), check_images).read(source.read_row)


def _source(name: str, split: str | None) -> tuple["Source", str]:
    if name not in SOURCES:
        known = ", ".join((*LOCAL, *SOURCES))
        raise InvalidInputError(f"unknown source {name!r}; known: {known}")
    source = SOURCES[name]
    split = source.default_split if split is None else split
    if split not in source.splits:
        raise InvalidInputError(f"{name} has no split {split!r}; it has {', '.join(source.splits)}")
    return source, split


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


def _folder(root: Path, check: Check) -> Iterator[Comparison | Reject]:
    """NAME.txt holds the prompt; NAME.chosen.png and NAME.rejected.png, of any format, lie beside it."""
    beside: dict[Path, dict[str, list[Path]]] = {}
    for index, file in enumerate(source_files("folder", root)):
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


# --- layouts -----------------------------------------------------------------------------------------------


def _hpdv3(row: Row) -> Iterator[Comparison | Reject]:
    """path1 is always the preferred image, so a reader that keeps the sides teaches position, not preference.

    choice_dist and confidence are null (or the string "null") for Midjourney and HPDv2 rows, and absent in
    test.json. Source: MizzenAI/HPDv3.
    """
    values = row.values
    dist = values.get("choice_dist")
    votes = None
    if dist not in (None, "null"):
        if not isinstance(dist, list) or len(dist) != 2:
            raise BadRow(f"votes: choice_dist = {shown(dist)} is not a pair of numbers")
        votes = _votes(*sorted((number(vote, "choice_dist") for vote in dist), reverse=True))
    yield row.compare(
        row.prompt(),
        row.image(values.get("path1"), "path1"),
        row.image(values.get("path2"), "path2"),
        confidence=share(values.get("confidence"), "confidence"),
        generators=(row.text("model1"), row.text("model2")),
        source="hpdv3",
        votes=votes,
    )


def _hpdv3_plus(row: Row) -> Iterator[Comparison | Reject]:
    """path1 is preferred. Source: Junjun2333/HPDv3-PlusPlus."""
    values = row.values
    subset = Path(row.file).stem.rpartition("_")[2]
    yield row.compare(
        row.prompt(),
        row.image(values.get("path1"), "path1"),
        row.image(values.get("path2"), "path2"),
        source=f"hpdv3++ {subset}",
    )


def _hpdv2(row: Row) -> Iterator[Comparison | Reject]:
    """train.json: of two files, human_preference 1 is the better one. test.json: lists with ranks, lower is
    better. Source: tgxs002/HPSv2, `HPDDataset` and `RankingDataset`."""
    values, prompt = row.values, row.prompt()
    if "human_preference" in values:
        files, numbers = row.lists("file_path", "human_preference")
        if len(files) != 2:
            raise BadRow(f"file_path: needs 2 files, has {len(files)}")
        images = [row.image(file, "file_path", "train", "HPD/train") for file in files]
        first = numbers[0] >= numbers[1]
        yield row.compare(
            prompt,
            images[0 if first else 1],
            images[1 if first else 0],
            tie=numbers[0] == numbers[1],
            chosen_was_first=first,
            source="hpdv2",
        )
        return
    files, ranks = row.lists("image_path", "rank")
    images = [row.image(file, "image_path", "test", "HPD/test") for file in files]
    yield from row.ranked(prompt, images, ranks, source="hpdv2")


def _imagereward(row: Row) -> Iterator[Comparison | Reject]:
    """466 prompts with 4 to 9 pictures and their ranking, 1 is best, ties allowed: 6,399 strict pairs and 831
    tied ones. Source: zai-org/ImageReward, data/test.json."""
    files, ranks = row.lists("generations", "ranking")
    images = [row.image(file, "generations", "images", "test_images") for file in files]
    yield from row.ranked(row.prompt(), images, ranks, source="imagereward")


def _imagerewarddb(row: Row) -> Iterator[Comparison | Reject]:
    """Configs *_pair, whose ties were dropped, and *_group. Source: zai-org/ImageRewardDB."""
    values, prompt = row.values, row.prompt()
    if "img_better" in values:
        sides = [row.image(values.get(name), name) for name in ("img_better", "img_worse")]
        yield row.compare(prompt, *sides, source="imagerewarddb")
    elif isinstance(values.get("image"), list):
        cells, ranks = row.lists("image", "rank")
        images = [row.image(cell, "image") for cell in cells]
        yield from row.ranked(prompt, images, ranks, source="imagerewarddb")
    else:
        raise BadRow("one picture a row: use a config that ends in _pair or _group")


def _genai_bench(row: Row) -> Iterator[Comparison | Reject]:
    """Battles with four outcomes; "tievote" and "bothbad_vote" are ties. Source: TIGER-Lab/GenAI-Bench,
    config image_generation; its own code scores split test_v1, others split test."""
    values, vote = row.values, row.values.get("vote_type")
    if vote not in ("leftvote", "rightvote", "tievote", "bothbad_vote"):
        raise BadRow(
            f"votes: vote_type = {shown(vote)} is none of leftvote, rightvote, tievote, bothbad_vote"
        )
    left, right = (row.image(values.get(f"{side}_image"), f"{side}_image") for side in ("left", "right"))
    models = row.text("left_model"), row.text("right_model")
    swap = vote == "rightvote"
    yield row.compare(
        row.prompt(),
        right if swap else left,
        left if swap else right,
        tie=vote in ("tievote", "bothbad_vote"),
        generators=models[::-1] if swap else models,
        chosen_was_first=not swap,
        source="genai-bench",
    )


def _pickapic(row: Row) -> Iterator[Comparison | Reject]:
    """label_0 and label_1 are 1 and 0, 0 and 1, or 0.5 each for a tie; rows without a label are rejected.
    Source: yuvalkirstain/pickapic_v1 and _v2; in the `_no_images` editions jpg_0 and jpg_1 are absent."""
    values = row.values
    if values.get("has_label") is False:
        raise BadRow("no label: has_label is false")
    labels = [number(values.get(f"label_{side}"), f"label_{side}") for side in (0, 1)]
    if sorted(labels) not in ([0.0, 1.0], [0.5, 0.5]):
        raise BadRow(f"votes: labels {labels[0]:g} and {labels[1]:g} are not 1 and 0, or 0.5 each")
    cells = [
        values.get(f"jpg_{side}")
        if values.get(f"jpg_{side}") is not None or row.check != "none"
        else values.get(f"image_{side}_uid")
        for side in (0, 1)
    ]
    images = [row.image(cell, f"jpg_{side}") for side, cell in enumerate(cells)]
    models = row.text("model_0"), row.text("model_1")
    first = labels[0] >= labels[1]
    yield row.compare(
        row.prompt("caption"),
        images[0 if first else 1],
        images[1 if first else 0],
        tie=labels[0] == labels[1],
        generators=models if first else models[::-1],
        chosen_was_first=first,
        source="pickapic",
    )


def _votes(chosen: Any, rejected: Any) -> Votes | None:
    """None where the layout states none."""
    stated = [None if votes == "null" else votes for votes in (chosen, rejected)]
    return None if None in stated else votes_of(*stated)


LOCAL = ("jsonl", "folder", "latent-cache")
"""Sources of one's own: they have no splits."""

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="hpdv3",
            splits={"train": ("train.json",), "test": ("test.json",), "all": ("all.json",)},
            default_split="test",
            read_row=_hpdv3,
        ),
        Source(
            name="hpdv3++",
            splits={
                "train": ("train/train_aes.json", "train/train_tf.json"),
                "test": ("test/test_aes.json", "test/test_tf.json"),
            },
            default_split="test",
            read_row=_hpdv3_plus,
        ),
        Source(
            name="hpdv2",
            splits={"train": ("train.json",), "test": ("test.json",)},
            default_split="test",
            read_row=_hpdv2,
        ),
        Source(
            name="imagereward",
            splits={"test": ("test.json", "data/test.json")},
            default_split="test",
            read_row=_imagereward,
        ),
        Source(
            name="genai-bench",
            splits={
                "test_v1": ("**/image_generation/test_v1*.parquet", "test_v1*.parquet"),
                "test": ("**/image_generation/test-*.parquet", "test-*.parquet"),
            },
            default_split="test_v1",
            read_row=_genai_bench,
            hub=("TIGER-Lab/GenAI-Bench", "image_generation"),
        ),
        Source(
            name="pickapic",
            splits={
                split: (f"**/{split}-*.parquet",)
                for split in ("train", "validation", "validation_unique", "test", "test_unique")
            },
            default_split="test_unique",
            read_row=_pickapic,
            hub=("yuvalkirstain/pickapic_v2", None),
        ),
        Source(
            name="imagerewarddb",
            splits={split: (f"**/{split}-*.parquet",) for split in ("train", "validation", "test")},
            default_split="test",
            read_row=_imagerewarddb,
            hub=("zai-org/ImageRewardDB", "8k_pair"),
        ),
    )
}
