"""Public preference data: the files of each set, what a row of them means, and where the hub has it.

Source: the layouts are those of the data sets' own readers; each reader's docstring says whose.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dina_lrm.data.comparisons import Comparison, ReadRow, Row, Votes, number, share, votes_of
from dina_lrm.data.pairs import Reject
from dina_lrm.data.row import BadRow, shown

__all__ = ["SOURCES", "Hub", "Source"]


@dataclass(frozen=True, slots=True)
class Hub:
    """Where a data set lies on the Hugging Face hub."""

    repository: str
    config: str | None = None
    by: Literal["splits", "patterns", "archives"] = "splits"
    """How it is read: streamed by its own splits, or by the source's patterns of files where its splits are
    others; archives cannot be streamed and are downloaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One data set's layout."""

    name: str
    splits: dict[str, tuple[str, ...]]
    """Files of each split, relative to the root; glob patterns allowed."""
    default_split: str
    read_row: ReadRow
    """Reader of one row, for files that hold rows; archives are read by `data.sources.imagerewarddb`."""
    hub: Hub | None = None
    """None where it is not published in a form that can be read from there."""


def _hpdv3(row: Row) -> Iterator[Comparison | Reject]:
    """path1 is always the preferred image, so a reader that keeps the sides teaches position, not preference.

    choice_dist and confidence are null (or the string "null") for Midjourney and HPDv2 rows, and absent in
    test.json. Source: MizzenAI/HPDv3.
    """
    values = row.values
    yield row.compare(
        row.prompt(),
        row.image(values.get("path1"), "path1"),
        row.image(values.get("path2"), "path2"),
        confidence=share(values.get("confidence"), "confidence"),
        generators=(row.text("model1"), row.text("model2")),
        source="hpdv3",
        votes=_majority_first(values.get("choice_dist")),
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
    yield _battle(row, "prompt", "{}_image", ("tievote", "bothbad_vote"), "genai-bench")


def _battle(row: Row, prompt: str, image: str, ties: Sequence[str], source: str) -> Comparison | Reject:
    """A left and a right picture and a vote_type: leftvote, rightvote or one of `ties`.

    Args:
        prompt, image: names of columns, {} for the side.
    """
    vote, allowed = row.values.get("vote_type"), ("leftvote", "rightvote", *ties)
    if vote not in allowed:
        raise BadRow(f"votes: vote_type = {shown(vote)} is none of {', '.join(allowed)}")
    fields = [image.format(side) for side in ("left", "right")]
    left, right = (row.image(row.values.get(field), field) for field in fields)
    models = row.text("left_model"), row.text("right_model")
    swap = vote == "rightvote"
    return row.compare(
        row.prompt(prompt),
        right if swap else left,
        left if swap else right,
        tie=vote in ties,
        generators=(models[1], models[0]) if swap else models,
        chosen_was_first=not swap,
        source=source,
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
        generators=models if first else (models[1], models[0]),
        chosen_was_first=first,
        source="pickapic",
    )


def _rapidata(row: Row) -> Iterator[Comparison | Reject]:
    """Votes of many raters for either picture; the target is their share.

    The first sets count them (votes_image1, votes_image2). Later ones state what they come to with each
    rater weighted by reliability, for several questions; read is the one for preference. Source:
    Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3 and its like.
    """
    values = row.values
    fields = [f"votes_image{side}" for side in (1, 2)]
    if all(values.get(field) is None for field in fields):
        fields = [f"weighted_results_image{side}_preference" for side in (1, 2)]
    if any(values.get(field) is None for field in fields):
        raise BadRow(f"no votes: {' and '.join(fields)} are not both there")
    yield row.compare(
        row.prompt(),
        row.image(values.get("image1"), "image1"),
        row.image(values.get("image2"), "image2"),
        votes=votes_of(*(values[field] for field in fields)),
        generators=(row.text("model1"), row.text("model2")),
        chosen_was_first=True,
        source="rapidata",
    )


def _open_image_preferences(row: Row) -> Iterator[Comparison | Reject]:
    """The set for training: chosen and rejected. Source:
    data-is-better-together/open-image-preferences-v1-binarized."""
    sides = [row.image(row.values.get(side), side) for side in ("chosen", "rejected")]
    yield row.compare(row.prompt(), *sides, source="open-image-preferences")


def _editreward(row: Row) -> Iterator[Comparison | Reject]:
    """Two edits of one picture by an instruction, which is the prompt; the picture before is not read.

    train.json of its code: path1 is preferred, unless tie_case, or equal overall scores where that is not
    stated. On the hub: left and right output, vote_type. Source: TIGER-Lab/EditReward-Data.
    """
    values = row.values
    if "vote_type" in values:
        yield _battle(row, "instruction", "{}_output_image", ("tie", "tievote", "bothbad_vote"), "editreward")
        return
    tie = values.get("tie_case")
    if tie not in (None, True, False):
        raise BadRow(f"not true or false: tie_case = {shown(tie)}")
    if tie is None:
        scores = [values.get(f"model{side}_overall_score") for side in (1, 2)]
        tie = None not in scores and scores[0] == scores[1]
    yield row.compare(
        row.prompt(),
        row.image(values.get("path1"), "path1", "images"),
        row.image(values.get("path2"), "path2", "images"),
        tie=tie,
        votes=_majority_first(values.get("choice_dist")),
        confidence=share(values.get("confidence"), "confidence"),
        generators=(row.text("model1"), row.text("model2")),
        source="editreward",
    )


def _majority_first(dist: Any) -> Votes | None:
    """choice_dist, whose larger number is that of the preferred side; null, or the string, is none."""
    if dist in (None, "null"):
        return None
    if not isinstance(dist, list) or len(dist) != 2:
        raise BadRow(f"votes: choice_dist = {shown(dist)} is not a pair of numbers")
    return votes_of(*sorted((number(vote, "choice_dist") for vote in dist), reverse=True))


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
            hub=Hub("TIGER-Lab/GenAI-Bench", config="image_generation"),
        ),
        Source(
            name="pickapic",
            splits={
                split: (f"**/{split}-*.parquet",)
                for split in ("train", "validation", "validation_unique", "test", "test_unique")
            },
            default_split="test_unique",
            read_row=_pickapic,
            hub=Hub("yuvalkirstain/pickapic_v2"),
        ),
        Source(
            name="imagerewarddb",
            splits={
                split: (
                    f"images/{split}/{split}_*.zip",
                    f"images/{split}/{split}_*/{split}_*.json",
                    f"**/{split}-*.parquet",
                )
                for split in ("train", "validation", "test")
            },
            default_split="test",
            read_row=_imagerewarddb,
            hub=Hub("zai-org/ImageRewardDB", by="archives"),
        ),
        Source(
            name="rapidata",
            splits={"train": ("**/train*.parquet",)},
            default_split="train",
            read_row=_rapidata,
            hub=Hub("Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3", by="patterns"),
        ),
        Source(
            name="open-image-preferences",
            splits={"train": ("**/train-*.parquet",)},
            default_split="train",
            read_row=_open_image_preferences,
            hub=Hub("data-is-better-together/open-image-preferences-v1-binarized"),
        ),
        Source(
            name="editreward",
            splits={"train": ("train.json", "**/train-*.parquet"), "test": ("test.json",)},
            default_split="train",
            read_row=_editreward,
            hub=Hub("TIGER-Lab/EditReward-Data"),
        ),
    )
}
