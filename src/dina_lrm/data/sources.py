"""Public preference data from local files in its original layout, as one stream of comparisons.

    hpdv3        train.json, test.json, all.json: path1 is preferred, choice_dist are the votes
    hpdv3++      train/train_{aes,tf}.json, test/test_{aes,tf}.json: path1 is preferred
    hpdv2        train.json: human_preference of file_path; test.json: rank of image_path, lower is better
    imagereward  test.json: ranking of generations, 1 is best, ties allowed
    genai-bench  parquet: left_image, right_image, vote_type
    pickapic     parquet: jpg_0, jpg_1, label_0, label_1
    imagerewarddb  parquet of the configs *_pair (img_better, img_worse) and *_group (lists with ranks)
    folder       NAME.txt with NAME.chosen.* and NAME.rejected.* beside it, in any subfolder
    jsonl        our own rows, .jsonl or .parquet (`data.pairs`)
    latent-cache  the latents that the paper's code caches: parquet, and an index in CSV

The parquet sets can also be streamed from the Hugging Face hub, through `datasets` (`read_hub`).

Nothing is dropped: what cannot be a comparison is a `Reject` with its reason. Ties are comparisons on which
nobody won; which side they name `chosen` means nothing. Files of any size are read as a stream.

Source: the layouts are those of the data sets' own readers; each reader's docstring says whose.
"""

import ast
import csv
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dina_lrm.data.pairs import (
    Check,
    ImageSource,
    PreferencePair,
    Reject,
    StoredLatent,
    checked_votes,
    image_cell,
    number,
    pairs_of_row,
)
from dina_lrm.data.rows import BadRow, count_rows, rows_of_file
from dina_lrm.errors import InvalidInputError

__all__ = [
    "SOURCES",
    "Comparison",
    "Source",
    "read_hub",
    "read_source",
    "source_files",
    "source_length",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two pictures for one prompt, and what raters said."""

    pair: PreferencePair
    tie: bool = False
    """Nobody won. `pair` names the sides in stored order then."""
    confidence: float | None = None
    """That the preference is right, in [0, 1], as the data set states it."""
    generators: tuple[str | None, str | None] = (None, None)
    """What drew the chosen and the rejected picture."""
    chosen_was_first: bool | None = None
    """Whether the chosen side stood first (left, 0) before raters; None where the layout does not keep it."""
    row: int
    """Position of the row in the file, from 0."""
    file: str
    """The file it comes from, relative to the root."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One data set's layout."""

    name: str
    splits: dict[str, tuple[str, ...]]
    """Files of each split, relative to the root; glob patterns allowed."""
    default_split: str
    read_row: Callable[["_Row"], Iterator[Comparison]]
    hub: tuple[str, str | None] | None = None
    """Repository and config on the Hugging Face hub, where it is published as a table."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row and where it came from."""

    values: Mapping[str, Any]
    index: int
    file: str
    root: Path
    check: Check

    def image(self, cell: Any, field: str, *folders: str) -> ImageSource:
        """The picture in a cell: bytes, or a path under the root, looked for in `folders` too."""
        if isinstance(cell, str) and folders:
            places = [self.root / folder / cell for folder in ("", *folders)]
            cell = str(next((place for place in places if place.is_file()), places[1]))
        return image_cell(cell, field, self.root, self.check)

    def prompt(self, field: str = "prompt") -> str:
        value = self.values.get(field)
        if not isinstance(value, str) or not value.strip():
            raise BadRow(f"no prompt: {field} = {value!r}")
        return value

    def compare(self, prompt: str, chosen: ImageSource, rejected: ImageSource, **about: Any) -> Comparison:
        names = ("votes_chosen", "votes_rejected", "source", "width", "height")
        votes = {name: about.pop(name) for name in names if name in about}
        pair = PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, **votes)
        return Comparison(pair=pair, row=self.index, file=self.file, **about)


def read_source(
    name: str, root: str | Path, *, split: str | None = None, check_images: Check = "exists"
) -> Iterator[Comparison | Reject]:
    """Comparisons of a data set, row by row, with a `Reject` for each row that cannot be one.

    Args:
        name: one of `SOURCES`, "folder", "latent-cache" or "jsonl".
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
    read_row = {"jsonl": _own_row, "latent-cache": _cached_row}.get(name)
    if read_row is None:
        read_row = _source(name, split)[0].read_row
    files = source_files(name, root, split=split)
    base = root if root.is_dir() else root.parent
    kept = _cache_index(root) if name == "latent-cache" else None
    for file in files:
        relative = str(file.relative_to(base))
        for index, values in enumerate(rows_of_file(file)):
            if kept is not None and (file.name, index) not in kept:
                values = BadRow("not in the index of the cache")
            if isinstance(values, BadRow):
                yield Reject(row=index, reason=str(values), file=relative)
                continue
            yield from _comparisons(read_row, _Row(values, index, relative, base, check_images))


def source_files(name: str, root: str | Path, *, split: str | None = None) -> list[Path]:
    """The files that `read_source` reads rows from, in its order; none are pictures.

    Raises:
        InvalidInputError: no such source or split, or none of its files are there.
    """
    root = Path(root)
    match name:
        case "folder":
            patterns: tuple[str, ...] = ("**/*.txt",)
        case "jsonl":
            if root.suffix in (".jsonl", ".parquet"):
                if not root.is_file():
                    raise InvalidInputError(f"no file of preference rows at {root}")
                return [root]
            patterns = ("*.jsonl", "*.parquet")
        case "latent-cache":
            patterns = ("**/part_rank*.parquet",)
        case _:
            source, split = _source(name, split)
            patterns = source.splits[split]
    files = [file for pattern in patterns for file in sorted(root.glob(pattern))]
    if not files:
        raise InvalidInputError(f"no {', '.join(patterns)} in {root}: is this the folder of {name}?")
    return files


def source_length(name: str, root: str | Path, *, split: str | None = None) -> int:
    """How many comparisons and rejects `read_source` gives, for a progress bar.

    Exact, but for parquet, which may hold pictures and is not read through: a row of a list counts as one.
    """
    files = source_files(name, root, split=split)
    if name == "folder":
        return len(files)
    if any(file.suffix == ".parquet" for file in files):
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

    own = name in ("jsonl", "folder", "latent-cache")
    source, split = (None, split) if own else _source(name, split)
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
        row = _Row(values, index, f"{repository}/{split}", Path(), check_images)
        yield from _comparisons(source.read_row, row)


def _source(name: str, split: str | None) -> tuple["Source", str]:
    if name not in SOURCES:
        known = ", ".join(("jsonl", "folder", "latent-cache", *SOURCES))
        raise InvalidInputError(f"unknown source {name!r}; known: {known}")
    source = SOURCES[name]
    split = source.default_split if split is None else split
    if split not in source.splits:
        raise InvalidInputError(f"{name} has no split {split!r}; it has {', '.join(source.splits)}")
    return source, split


def _comparisons(
    read_row: Callable[["_Row"], Iterator[Comparison]], row: "_Row"
) -> Iterator[Comparison | Reject]:
    try:
        yield from read_row(row)
    except BadRow as bad:
        prompt = row.values.get("prompt") or row.values.get("caption")
        prompt = prompt if isinstance(prompt, str) else None
        yield Reject(row=row.index, reason=str(bad), prompt=prompt, file=row.file)


# --- layouts of our own ------------------------------------------------------------------------------------


def _own_row(row: _Row) -> Iterator[Comparison]:
    """Our own rows: chosen and rejected, or images and ranks (`data.pairs`)."""
    for pair, tie in pairs_of_row(row.values, row.root, row.check):
        yield Comparison(pair=pair, tie=tie is not None, row=row.index, file=row.file)


def _cached_row(row: _Row) -> Iterator[Comparison]:
    """A row of the latent cache: latent1 is the chosen side, both in float32, shifted and scaled.

    `detailed_results` is a dict written as text, with votes_chosen, votes_rejected and confidence. Source:
    the cache that the paper's code trains on.
    """
    values = row.values
    try:
        details = ast.literal_eval(values.get("detailed_results") or "{}")
    except (ValueError, SyntaxError) as error:
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
    confidence = _stated(details.get("confidence"))
    yield row.compare(
        row.prompt(),
        *sides,
        confidence=None if confidence is None else number(confidence, "confidence"),
        generators=(_stated(values.get("model1")), _stated(values.get("model2"))),
        source="latent-cache",
        **_votes(details.get("votes_chosen"), details.get("votes_rejected")),
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
    if not root.is_dir():
        raise InvalidInputError(f"no folder of pairs at {root}")
    beside: dict[Path, dict[str, list[Path]]] = {}
    for index, file in enumerate(sorted(root.rglob("*.txt"))):
        if file.parent not in beside:
            named = beside[file.parent] = {}
            for place in file.parent.iterdir():
                named.setdefault(place.stem, []).append(place)
        try:
            prompt = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            yield Reject(row=index, reason=f"unreadable prompt: {file.name} ({error})", file=file.name)
            continue
        values: dict[str, Any] = {"prompt": prompt}
        for side in ("chosen", "rejected"):
            places = beside[file.parent].get(f"{file.stem}.{side}", [])
            values[side] = str(places[0].relative_to(root)) if len(places) == 1 else None
        row = _Row(values, index, str(file.relative_to(root)), root, check)
        try:
            images = [row.image(values[side], f"{file.stem}.{side}.*") for side in ("chosen", "rejected")]
            yield row.compare(row.prompt(), *images)
        except BadRow as bad:
            yield Reject(row=index, reason=str(bad), prompt=prompt or None, file=row.file)


# --- layouts -----------------------------------------------------------------------------------------------


def _hpdv3(row: _Row) -> Iterator[Comparison]:
    """path1 is always the preferred image, so a reader that keeps the sides teaches position, not preference.

    choice_dist and confidence are null (or the string "null") for Midjourney and HPDv2 rows, and absent in
    test.json. Source: MizzenAI/HPDv3.
    """
    values = row.values
    votes = _stated(values.get("choice_dist"))
    given: dict[str, Any] = {}
    if votes is not None:
        if not isinstance(votes, Sequence) or len(votes) != 2:
            raise BadRow(f"votes: choice_dist = {votes!r} is not a pair of numbers")
        given = _votes(*sorted((number(vote, "choice_dist") for vote in votes), reverse=True))
    confidence = _stated(values.get("confidence"))
    yield row.compare(
        row.prompt(),
        row.image(values.get("path1"), "path1"),
        row.image(values.get("path2"), "path2"),
        confidence=None if confidence is None else number(confidence, "confidence"),
        generators=(_stated(values.get("model1")), _stated(values.get("model2"))),
        source="hpdv3",
        **given,
    )


def _hpdv3_plus(row: _Row) -> Iterator[Comparison]:
    """path1 is preferred. Source: Junjun2333/HPDv3-PlusPlus."""
    values = row.values
    subset = Path(row.file).stem.rpartition("_")[2]
    yield row.compare(
        row.prompt(),
        row.image(values.get("path1"), "path1"),
        row.image(values.get("path2"), "path2"),
        source=f"hpdv3++ {subset}",
    )


def _hpdv2(row: _Row) -> Iterator[Comparison]:
    """train.json: of two files, human_preference 1 is the better one. test.json: lists with ranks, lower is
    better. Source: tgxs002/HPSv2, `HPDDataset` and `RankingDataset`."""
    values, prompt = row.values, row.prompt()
    if "human_preference" in values:
        files, votes = _lists(values, "file_path", "human_preference")
        numbers = [number(vote, "human_preference") for vote in votes]
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
    files, ranks = _lists(values, "image_path", "rank")
    images = [row.image(file, "image_path", "test", "HPD/test") for file in files]
    yield from _ranked(row, prompt, images, [number(rank, "rank") for rank in ranks], "hpdv2")


def _imagereward(row: _Row) -> Iterator[Comparison]:
    """466 prompts with 4 to 9 pictures and their ranking, 1 is best, ties allowed: 6,399 strict pairs and 831
    tied ones. Source: zai-org/ImageReward, data/test.json."""
    files, ranks = _lists(row.values, "generations", "ranking")
    images = [row.image(file, "generations", "images", "test_images") for file in files]
    yield from _ranked(row, row.prompt(), images, [number(rank, "ranking") for rank in ranks], "imagereward")


def _imagerewarddb(row: _Row) -> Iterator[Comparison]:
    """Configs *_pair, whose ties were dropped, and *_group. Source: zai-org/ImageRewardDB."""
    values, prompt = row.values, row.prompt()
    if "img_better" in values:
        sides = [row.image(values.get(name), name) for name in ("img_better", "img_worse")]
        yield row.compare(prompt, *sides, source="imagerewarddb")
    elif isinstance(values.get("image"), Sequence):
        cells, ranks = _lists(values, "image", "rank")
        images = [row.image(cell, "image") for cell in cells]
        yield from _ranked(row, prompt, images, [number(rank, "rank") for rank in ranks], "imagerewarddb")
    else:
        raise BadRow("one picture a row: use a config that ends in _pair or _group")


def _genai_bench(row: _Row) -> Iterator[Comparison]:
    """Battles with four outcomes; "tievote" and "bothbad_vote" are ties. Source: TIGER-Lab/GenAI-Bench,
    config image_generation; its own code scores split test_v1, others split test."""
    values, vote = row.values, row.values.get("vote_type")
    if vote not in ("leftvote", "rightvote", "tievote", "bothbad_vote"):
        raise BadRow(f"votes: vote_type = {vote!r} is none of leftvote, rightvote, tievote, bothbad_vote")
    left, right = (row.image(values.get(f"{side}_image"), f"{side}_image") for side in ("left", "right"))
    models = values.get("left_model"), values.get("right_model")
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


def _pickapic(row: _Row) -> Iterator[Comparison]:
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
    models = values.get("model_0"), values.get("model_1")
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


def _votes(chosen: Any, rejected: Any) -> dict[str, float]:
    """Fields of the row type; none where the layout states none."""
    if _stated(chosen) is None or _stated(rejected) is None:
        return {}
    votes = checked_votes(chosen, rejected)
    return {"votes_chosen": votes[0], "votes_rejected": votes[1]}


def _ranked(
    row: _Row, prompt: str, images: Sequence[ImageSource], ranks: Sequence[float], source: str
) -> Iterator[Comparison]:
    """Every two pictures of a ranked list: lower rank is better, equal ranks are a tie."""
    if len(images) < 2:
        raise BadRow(f"images: needs at least 2, has {len(images)}")
    for i, j in itertools.combinations(range(len(images)), 2):
        first = ranks[i] <= ranks[j]
        better, worse = (i, j) if first else (j, i)
        yield row.compare(
            prompt,
            images[better],
            images[worse],
            tie=ranks[i] == ranks[j],
            chosen_was_first=first,
            source=source,
        )


def _lists(values: Mapping[str, Any], images: str, ranks: str) -> tuple[Sequence[Any], Sequence[Any]]:
    pair = values.get(images), values.get(ranks)
    if not all(isinstance(column, Sequence) and not isinstance(column, str) for column in pair):
        raise BadRow(f"{images} and {ranks}: need to be two lists")
    files, numbers = pair[0] or (), pair[1] or ()
    if len(files) != len(numbers):
        raise BadRow(f"{images} and {ranks}: {len(files)} and {len(numbers)} entries")
    return files, numbers


def _stated(value: Any) -> Any:
    """None also for the string "null", which some of HPDv3's rows hold."""
    return None if value in (None, "null") else value


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
