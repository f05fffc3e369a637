"""What of a source cannot be used: a reject with the thing that is wrong, or an error."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dina_lrm.cli import main as cli
from dina_lrm.data.sources.own_rows import read_pairs
from dina_lrm.data.sources.registry import read_source
from dina_lrm.errors import InvalidInputError
from dina_lrm.serving.labelling.items import read_items
from tests.unit.data.layouts import shard, write_source
from tests.unit.data.sources.pictures import SIDES, read, rows_file, write


def test_a_list_that_breaks_off_is_told(tmp_path: Path) -> None:
    write(tmp_path, ["a.png", "b.png"])
    rows = [{"prompt": "p", "path1": "a.png", "path2": "b.png"}] * 3
    whole = json.dumps(rows)
    (tmp_path / "test.json").write_text(whole[: len(whole) - 20])
    comparisons, rejects = read("hpdv3", tmp_path)
    assert len(comparisons) == 2
    assert len(rejects) == 1
    assert "breaks off" in rejects[0].reason


@pytest.mark.parametrize("content", ['{"prompt": "p"}', "", "prompt,path1,path2"])
def test_a_file_that_is_no_list_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "test.json").write_text(content)
    comparisons, rejects = read("hpdv3", tmp_path)
    assert not comparisons
    assert [(reject.reason, reject.file) for reject in rejects] == [
        ("not a JSON list: [row, row, ...] is expected", "test.json")
    ]


def test_unknown_names_and_folders(tmp_path: Path) -> None:
    for name, split, message in (
        ("hpdv4", None, "unknown source 'hpdv4'; known: jsonl, folder, latent-cache, hpdv3"),
        ("hpdv3", "validation", "hpdv3 has no split 'validation'; it has train, test, all"),
        ("hpdv3", None, "is this the folder of hpdv3"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            list(read_source(name, tmp_path, split=split))
    with pytest.raises(InvalidInputError, match="no preference rows: nothing at"):
        list(read_source("jsonl", tmp_path / "none.jsonl"))


@pytest.mark.parametrize("name", ["imagereward", "hpdv2", "jsonl"])
def test_a_missing_picture_costs_its_own_comparisons(name: str, tmp_path: Path) -> None:
    """One of four is missing: three of six comparisons stay, as where pictures are looked at later."""
    write_source("imagereward" if name == "jsonl" else name, tmp_path)
    root = tmp_path
    if name == "jsonl":
        cells = [f"images/{letter}.png" for letter in "abcd"]
        root = rows_file(tmp_path, [{"prompt": "p", "images": cells, "ranks": [1, 2, 3, 4]}])
    next(tmp_path.rglob("b.png")).unlink()
    found, rejects = read(name, root)
    assert (len(found), len(rejects)) == (3, 3)
    assert {reject.reason.split(":")[0] for reject in rejects} == {"missing file"}
    later, none = read(name, root, check="none")
    assert (len(later), none) == (6, [])
    told = shard(later, tmp_path / "shard.parquet")
    assert [reject.reason.split(":")[0] for reject in told] == ["missing file"] * 3


def test_equal_sides_are_a_reject(tmp_path: Path) -> None:
    write(tmp_path, ["a.png", "b.png", "x/c.png"])
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    others = ["a.png", "./a.png", "x/../a.png", str(tmp_path / "a.png"), "copy.png", "link.png", "b.png"]
    file = rows_file(tmp_path, [{"prompt": "p", "chosen": "a.png", "rejected": other} for other in others])
    found, rejects = read("jsonl", file)
    assert [c.row for c in found] == [6]
    assert {reject.reason for reject in rejects} == {"same picture: on both sides, a.png"}
    assert len(read("jsonl", file, check="none")[1]) == 4  # by their paths alone
    ranked = rows_file(tmp_path, [{"prompt": "p", "images": ["a.png", "a.png", "b.png"], "ranks": [1, 2, 3]}])
    assert [len(part) for part in read("jsonl", ranked)] == [2, 1]


@pytest.mark.parametrize("text", ["\\ud83d", "a\\u0000b", "x\\udc80"])
@pytest.mark.parametrize("field", ["prompt", "chosen", "source"])
def test_text_that_is_none_is_a_reject_of_every_reader(
    tmp_path: Path, field: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, ["a.png", "b.png"])
    good = json.dumps({"prompt": "p", **SIDES})
    bad = json.dumps({"prompt": "p", **SIDES, field: "TEXT"}).replace("TEXT", text)
    file, rejects_file = rows_file(tmp_path, [good, bad, good]), tmp_path / "rejects.jsonl"
    for rejects in (
        read("jsonl", file)[1],
        read("jsonl", file, check="none")[1],
        read_pairs(file, rejects_file=rejects_file).rejects,
        read_items(file).rejects,
    ):
        ((row, line, reason),) = [(reject.row, reject.line, reject.reason) for reject in rejects]
        assert (row, line) == (1, 2)
        assert reason.startswith(f"text: {field} has ")
    assert json.loads(rejects_file.read_text())["line"] == 2
    assert cli.main(["inspect", "jsonl", "--root", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rejects"] == {"text": 1}


@pytest.mark.parametrize("value", [3, True, ["p"], {"p": 1}, None, "", " \n"])
def test_a_prompt_that_is_no_text_is_a_reject(tmp_path: Path, value: Any) -> None:
    write(tmp_path, ["a.png", "b.png"])
    ((_, (reject,)),) = [read("jsonl", rows_file(tmp_path, [{"prompt": value, **SIDES}]))]
    assert reject.reason.startswith("no prompt: prompt = ")


def test_numbers_that_no_row_has(tmp_path: Path) -> None:
    write(tmp_path, ["a.png", "b.png"])
    rows = [
        json.dumps({"prompt": "p", **SIDES, "votes_rejected": 1, "votes_chosen": "N"}).replace('"N"', votes)
        for votes in ("NaN", "1e999", "1e308", "9" * 400, "9" * 5000, "-1", "true", '"3"', "[3]", "null")
    ]
    found, rejects = read("jsonl", rows_file(tmp_path, rows))
    assert found == []
    assert {reject.reason.split(":")[0] for reject in rejects} == {"not a number", "votes"}


def test_a_prompt_that_is_no_file_does_not_block(tmp_path: Path) -> None:
    write(tmp_path, ["one.chosen.png", "one.rejected.png"])
    os.mkfifo(tmp_path / "one.txt")
    assert [reject.reason for reject in read("folder", tmp_path)[1]] == [
        "unreadable prompt: one.txt is a FIFO"
    ]
    with pytest.raises(InvalidInputError, match="is a FIFO"):
        read_items(tmp_path)


def test_rejects_say_the_line_of_the_file(tmp_path: Path) -> None:
    write(tmp_path, ["a.png", "b.png"])
    file = rows_file(tmp_path, ["", {"prompt": "p", **SIDES}, "", "no row", {"prompt": "", **SIDES}])
    assert [(reject.row, reject.line) for reject in read("jsonl", file)[1]] == [(1, 4), (2, 5)]
    found, _ = read("jsonl", file)
    assert found[0].line == 2
