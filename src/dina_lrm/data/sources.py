"""Public preference data from local files in its original layout, as one stream of comparisons.

    hpdv3        train.json, test.json, all.json: path1 is preferred, choice_dist are the votes
    hpdv3++      train/train_{aes,tf}.json, test/test_{aes,tf}.json: path1 is preferred
    hpdv2        train.json: human_preference of file_path; test.json: rank of image_path, lower is better
    imagereward  test.json: ranking of generations, 1 is best, ties allowed
    genai-bench  parquet: left_image, right_image, vote_type
    pickapic     parquet: jpg_0, jpg_1, label_0, label_1
    imagerewarddb  parquet of the configs *_pair (img_better, img_worse) and *_group (lists with ranks)
    folder       NAME.txt with NAME.chosen.* and NAME.rejected.* beside it, in any subfolder
    rows         our own .jsonl or .parquet rows (`data.pairs`)

The parquet sets can also be streamed from the Hugging Face hub, through `datasets` (`read_hub`).

Nothing is dropped: what cannot be a comparison is a `Reject` with its reason. Ties are comparisons on which
nobody won; which side they name `chosen` means nothing. Files of any size are read as a stream.

Source: the layouts are those of the data sets' own readers; each reader's docstring says whose.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dina_lrm.data.pairs import (
    BadRow,
    Check,
    ImageSource,
    PreferencePair,
    Reject,
    image_cell,
    number,
    pairs_of_row,
)
from dina_lrm.errors import InvalidInputError

__all__ = ["SOURCES", "Comparison", "Source", "read_hub", "read_source"]


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
        name: one of `SOURCES`, or "rows" with `root` the file of rows itself.
        root: folder that holds the data set's files as published.
        split: see `SOURCES[name].splits`; None: its default.
        check_images: "none" leaves images alone, so that counts can be had without them.

    Raises:
        InvalidInputError: no such source or split, or none of its files are there.
    """
    root = Path(root)
    if name == "rows":
        yield from _own_rows(root, check_images)
        return
    if name == "folder":
        yield from _folder(root, check_images)
        return
    source, split = _source(name, split)
    files = [file for pattern in source.splits[split] for file in sorted(root.glob(pattern))]
    if not files:
        wanted = ", ".join(source.splits[split])
        raise InvalidInputError(f"no {wanted} in {root}: is this the folder of {name}?")
    for file in files:
        relative = str(file.relative_to(root))
        for index, values in enumerate(_rows(file)):
            if isinstance(values, BadRow):
                yield Reject(row=index, reason=f"{values} ({relative})")
                continue
            yield from _comparisons(source, _Row(values, index, relative, root, check_images))


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

    source, split = (None, split) if name in ("rows", "folder") else _source(name, split)
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
        yield from _comparisons(source, _Row(values, index, f"{repository}/{split}", Path(), check_images))


def _source(name: str, split: str | None) -> tuple["Source", str]:
    if name not in SOURCES:
        raise InvalidInputError(f"unknown source {name!r}; known: rows, folder, {', '.join(SOURCES)}")
    source = SOURCES[name]
    split = source.default_split if split is None else split
    if split not in source.splits:
        raise InvalidInputError(f"{name} has no split {split!r}; it has {', '.join(source.splits)}")
    return source, split


def _comparisons(source: "Source", row: "_Row") -> Iterator[Comparison | Reject]:
    try:
        yield from source.read_row(row)
    except BadRow as bad:
        prompt = row.values.get("prompt") or row.values.get("caption")
        prompt = prompt if isinstance(prompt, str) else None
        yield Reject(row=row.index, reason=str(bad), prompt=prompt)


# --- files -------------------------------------------------------------------------------------------------


def _rows(file: Path) -> Iterator[Mapping[str, Any] | BadRow]:
    """Rows of a JSON list, JSON lines or parquet; a row that is none is told, a file that breaks off too."""
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=64):
                yield from batch.to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            yield BadRow(f"unreadable parquet: {error}")
        return
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            for line in filter(bytes.strip, lines):
                try:
                    yield _mapping(json.loads(line))
                except ValueError as error:
                    yield BadRow(f"not JSON: {error}")
        return
    import ijson

    with file.open("rb") as stream:
        if not stream.read(64).lstrip().startswith(b"["):
            yield BadRow("not JSON: a list of rows is expected, as in the published file")
            return
        stream.seek(0)
        try:
            for item in ijson.items(stream, "item", use_float=True):
                yield _mapping(item)
        except ijson.JSONError as error:
            yield BadRow(f"not JSON: the list breaks off or is damaged ({error})")


def _mapping(value: Any) -> Mapping[str, Any] | BadRow:
    return value if isinstance(value, Mapping) else BadRow(f"not a JSON object: {type(value).__name__}")


def _own_rows(file: Path, check: Check) -> Iterator[Comparison | Reject]:
    if not file.is_file():
        raise InvalidInputError(f"no file of preference rows at {file}")
    for index, values in enumerate(_rows(file)):
        if isinstance(values, BadRow):
            yield Reject(row=index, reason=str(values))
            continue
        try:
            for pair, tie in pairs_of_row(values, file.parent, check):
                yield Comparison(pair=pair, tie=tie is not None, row=index, file=file.name)
        except BadRow as bad:
            prompt = values.get("prompt")
            yield Reject(row=index, reason=str(bad), prompt=prompt if isinstance(prompt, str) else None)


def _folder(root: Path, check: Check) -> Iterator[Comparison | Reject]:
    """NAME.txt holds the prompt; NAME.chosen.png and NAME.rejected.png, of any format, lie beside it."""
    if not root.is_dir():
        raise InvalidInputError(f"no folder of pairs at {root}")
    for index, file in enumerate(sorted(root.rglob("*.txt"))):
        try:
            prompt = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            yield Reject(row=index, reason=f"unreadable prompt: {file.name} ({error})")
            continue
        values: dict[str, Any] = {"prompt": prompt}
        for side in ("chosen", "rejected"):
            stem = f"{file.stem}.{side}"
            places = [place for place in file.parent.iterdir() if place.stem == stem]
            values[side] = str(places[0].relative_to(root)) if len(places) == 1 else None
        row = _Row(values, index, str(file.relative_to(root)), root, check)
        try:
            images = [row.image(values[side], f"{file.stem}.{side}.*") for side in ("chosen", "rejected")]
            yield row.compare(row.prompt(), *images)
        except BadRow as bad:
            yield Reject(row=index, reason=str(bad), prompt=prompt or None)


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
        counts = sorted((number(vote, "choice_dist") for vote in votes), reverse=True)
        if counts[1] < 0 or counts[0] == 0:
            raise BadRow(f"votes: choice_dist = {votes!r} must be at least 0 and not both 0")
        given = {"votes_chosen": counts[0], "votes_rejected": counts[1]}
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
