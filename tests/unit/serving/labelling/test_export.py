"""Votes become rows whose numbers add up, and which the other commands take as they are."""

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from dina_lrm.cli.main import main
from dina_lrm.data.sources.own_rows import read_pairs
from dina_lrm.errors import InvalidInputError
from dina_lrm.serving.labelling.export import Exported, export_single_votes, export_votes
from dina_lrm.serving.labelling.items import Items, read_items
from dina_lrm.serving.labelling.store import VoteStore
from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import change_attribute, sample_caption, sample_scene
from tests.rows import write_json_lines
from tests.unit.serving.labelling.conftest import make_vote, write_picture

CHOICES = {"a": "left", "b": "right", "tie": "tie", "skip": "skip"}


def give(store: VoteStore, answers: list[str]) -> None:
    """One string a pair: the answers of raters 0, 1, ... to it."""
    number = 0
    for pair, each in enumerate(answers):
        for rater, answer in enumerate(each.split()):
            store.record(make_vote(number, f"rater {rater}", pair, CHOICES[answer]))
            number += 1


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_by_hand(store: VoteStore, items: Items, tmp_path: Path) -> None:
    """Pair 0: 2 against 1. Pair 1: one vote and one tie, 1.5 against 0.5. Pair 2: even, and pair 3 by ties.
    Pair 4: skips alone. Pair 5: nobody came that far."""
    give(store, ["a b b", "b tie", "a b skip", "tie", "skip skip"])
    output = tmp_path / "rows" / "rows.jsonl"
    exported = export_votes(store.path, output)
    assert exported == Exported(rows=4, pairs=6, raters=3, preferences=6, ties=2, skips=3, even=2)
    rows = rows_of(output)
    assert [(row["votes_chosen"], row["votes_rejected"]) for row in rows] == [
        (2, 1),
        (1.5, 0.5),
        (1, 1),
        (0.5, 0.5),
    ]
    for index, row in enumerate(rows):
        pair = items.pairs[index]
        a, b = (str(items.pictures[side]) for side in (pair.a, pair.b))
        named = [str((output.parent / row[side]).resolve()) for side in ("chosen", "rejected")]
        assert named == ([b, a] if index < 2 else [a, b])
        assert row["prompt"] == pair.prompt
        assert row["source"] == "label"
    votes = sum(row["votes_chosen"] + row["votes_rejected"] for row in rows)
    assert votes == exported.preferences + exported.ties


def test_rows_are_read_as_they_are_written(store: VoteStore, tmp_path: Path) -> None:
    give(store, ["a b b", "b tie", "a b"])
    for name in ("rows.jsonl", "rows.parquet"):
        export_votes(store.path, tmp_path / name)
        read = read_pairs(tmp_path / name, ties="half")
        assert read.rejects == []
        assert [pair.tie for pair in read.pairs] == [False, False, True]
        assert len(read_pairs(tmp_path / name).rejects) == 1
        assert [pair.target for pair in read.pairs] == pytest.approx([2 / 3, 0.75, 0.5])


def test_the_source_of_a_row_is_kept(tmp_path: Path) -> None:
    names = [write_picture(tmp_path / f"{name}.png", ord(name)) for name in "ab"]
    rows = [{"prompt": "p", "images": names, "source": "flux"}]
    store = VoteStore(tmp_path / "votes.sqlite")
    store.bind(read_items(write_json_lines(tmp_path / "items.jsonl", rows)))
    give(store, ["a"])
    store.close()
    export_votes(store.path, tmp_path / "rows.jsonl")
    assert rows_of(tmp_path / "rows.jsonl")[0]["source"] == "flux"


def test_pictures_in_a_table_go_into_a_table(tmp_path: Path) -> None:
    files = [tmp_path / write_picture(tmp_path / f"{name}.png", ord(name)) for name in "ab"]
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    parquet.write_table(pyarrow.table({"prompt": ["p"], "images": [cells]}), tmp_path / "items.parquet")
    for file in files:
        file.unlink()
    items = read_items(tmp_path / "items.parquet")
    store = VoteStore(tmp_path / "votes.sqlite")
    store.bind(items)
    give(store, ["b"])
    store.close()
    with pytest.raises(InvalidInputError, match=r"write rows\.parquet"):
        export_votes(store.path, tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()
    export_votes(store.path, tmp_path / "rows.parquet")
    (pair,) = read_pairs(tmp_path / "rows.parquet").pairs
    assert (pair.chosen, pair.rejected) == (
        items.pictures[items.pairs[0].b],
        items.pictures[items.pairs[0].a],
    )


def test_moved_items_are_named(store: VoteStore, items: Items, tmp_path: Path) -> None:
    give(store, ["a"])
    new = tmp_path / "new"
    new.mkdir()
    for file in [items.path, *items.pictures]:
        Path(str(file)).rename(new / Path(str(file)).name)
    with pytest.raises(InvalidInputError, match=r"no items to label: nothing at .*items\.jsonl"):
        export_votes(store.path, tmp_path / "rows.jsonl")
    export_votes(store.path, tmp_path / "rows.jsonl", new / "items.jsonl")
    assert rows_of(tmp_path / "rows.jsonl")[0]["chosen"].startswith("new/")


def test_changed_items_are_refused(store: VoteStore, items: Items, tmp_path: Path) -> None:
    give(store, ["a"])
    items.path.write_text("".join(items.path.read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(InvalidInputError, match="votes on other items"):
        export_votes(store.path, tmp_path / "rows.jsonl")


@pytest.mark.parametrize(("answers", "message"), [([], "holds no votes"), (["skip"], "skipped: 1")])
def test_no_votes_are_no_rows(store: VoteStore, tmp_path: Path, answers: list[str], message: str) -> None:
    give(store, answers)
    with pytest.raises(InvalidInputError, match=message):
        export_votes(store.path, tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_an_empty_file_stays_empty(tmp_path: Path) -> None:
    (tmp_path / "votes.sqlite").touch()
    with pytest.raises(InvalidInputError, match=r"votes\.sqlite is empty"):
        export_votes(tmp_path / "votes.sqlite", tmp_path / "rows.jsonl")
    assert (tmp_path / "votes.sqlite").read_bytes() == b""


def test_what_is_read_is_not_written_over(store: VoteStore, items: Items) -> None:
    give(store, ["a"])
    before = items.path.read_bytes()
    for export in (export_votes, export_single_votes):
        with pytest.raises(InvalidInputError, match="is what is read"):
            export(store.path, items.path)
    assert items.path.read_bytes() == before


def test_absent_votes_and_other_suffixes(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"absent\.sqlite"):
        export_votes(tmp_path / "absent.sqlite", tmp_path / "rows.jsonl")
    assert not (tmp_path / "absent.sqlite").exists()
    with pytest.raises(InvalidInputError, match=r"rows\.csv"):
        export_votes(tmp_path / "absent.sqlite", tmp_path / "rows.csv")


@pytest.mark.long
def test_labels_to_a_trained_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scenes, votes for what the caption asks for, rows, and the commands that take them."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        spec = sample_caption(rng, num_objects=1)
        names = [f"{number}-right.png", f"{number}-wrong.png"]
        for name, scene in zip(names, (spec, change_attribute(rng, spec)), strict=True):
            render(sample_scene(rng, scene)).save(tmp_path / name)
        rows.append({"prompt": spec.caption, "images": names})
    items = read_items(write_json_lines(tmp_path / "items.jsonl", rows))
    store = VoteStore(tmp_path / "votes.sqlite")
    store.bind(items)
    right = ["a" if "right" in str(items.pictures[pair.a]) else "b" for pair in items.pairs]
    give(store, [f"{side} {side if index % 4 else 'tie'}" for index, side in enumerate(right)])
    store.close()

    rows_file, latents, run = tmp_path / "rows.jsonl", tmp_path / "latents", tmp_path / "run"
    assert main(["label", "export", str(store.path), "--output", str(rows_file), "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert (exported["rows"], exported["preferences"], exported["ties"]) == (24, 42, 6)
    assert all("right" in row["chosen"] and "wrong" in row["rejected"] for row in rows_of(rows_file))

    assert main(["inspect", "jsonl", "--root", str(rows_file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["strict_pairs"], found["total_votes"]) == (24, 24, 48)
    assert (found["missing_images"], found["rejects"]) == (0, {})

    prepare = ["prepare", "jsonl", "--root", str(rows_file), "--output", str(latents), "--processes", "1"]
    assert main([*prepare, "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_pairs"] == 24

    train = ["train", "shapes-quick", "--data.train", str(latents), "--data.validation", str(latents)]
    train += ["--output", str(run), "--num-steps", "4", "--batch-size", "8", "--validation.every", "4"]
    train += ["--model.num-blocks", "2", "--model.image-taps", "2", "--model.text-taps", "1"]
    assert main([*train, "--model.lora-rank", "2", "--cpu", "--json"]) == 0
    assert (run / "reward_head.safetensors").is_file()


# --- vote by vote ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["votes.jsonl", "votes.parquet"])
def test_single_votes(store: VoteStore, items: Items, tmp_path: Path, name: str) -> None:
    """A row for each, with the pictures where the rater saw them; what was taken back is in none."""
    store.record(make_vote(0, "ada", 2, "left", "b", seconds=1.5))
    store.record(make_vote(1, "bob", 0, "skip"))
    store.record(make_vote(2, "ada", 1, "tie"))
    store.record(make_vote(3, "bob", 2, "right", "a"))
    store.undo("ada", f"{2:032x}")
    output = tmp_path / "out" / name
    assert export_single_votes(store.path, output) == 3
    if output.suffix == ".jsonl":
        rows = rows_of(output)
    else:
        rows = [
            row | {side: row[side]["path"] for side in ("left", "right")}
            for row in parquet.read_table(output).to_pylist()
        ]
    told = [(row["rater"], row["pair"], row["choice"], row["seconds"]) for row in rows]
    assert told == [("ada", 2, "left", 1.5), ("bob", 0, "skip", 1.0), ("bob", 2, "right", 1.0)]
    a, b = (str(items.pictures[side]) for side in (items.pairs[2].a, items.pairs[2].b))
    sides = [[str((output.parent / row[side]).resolve()) for side in ("left", "right")] for row in rows]
    assert sides[0] == [b, a]
    assert sides[2] == [a, b]
    assert [row["vote"] for row in rows] == [f"{number:032x}" for number in (0, 1, 3)]
    assert [row["prompt"] for row in rows] == [items.pairs[pair].prompt for pair in (2, 0, 2)]
    times = [datetime.fromisoformat(row["given_at"]) for row in rows]
    assert times == sorted(times)
    assert all(time.utcoffset() == timedelta(0) for time in times)


def test_single_votes_by_command(
    store: VoteStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "votes.jsonl"
    command = ["label", "export", str(store.path), "--votes", "--output", str(output), "--json"]
    assert main(command) == 2
    assert "holds no votes" in capsys.readouterr().err
    give(store, ["a b", "skip"])
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(output), "votes": 3}
    assert len(rows_of(output)) == 3
