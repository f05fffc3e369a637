"""`dina-lrm inspect` and `dina-lrm audit` of sources."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dina_lrm.cli import main as cli
from dina_lrm.data.inspection import audit, inspect
from dina_lrm.data.sources.registry import read_source
from dina_lrm.errors import InvalidInputError
from tests.unit.data.layouts import write_source
from tests.unit.data.sources.pictures import SIDES, dump, picture, rows_file, write


def imagereward_like(root: Path) -> None:
    """466 prompts with the public number of pairs: 6,399 strict and 831 tied, 7,230 in all.

    317 lists of 4 pictures (6 pairs each), one of 6 (15), one of 7 (21) and 147 of 9 (36) have
    1,902 + 15 + 21 + 5,292 = 7,230 pairs. 365 of the lists tie two pairs (1, 1, 2, 2, 3 ..) and 101 tie one
    (1, 1, 2, 3 ..): 730 + 101 = 831 ties.
    """
    items = []
    for index, size in enumerate([4] * 317 + [6, 7] + [9] * 147):
        ranking = [1, 1, 2, 2, *range(3, size - 1)] if index < 365 else [1, 1, *range(2, size)]
        files = [f"rm_images/{index}_{i}.webp" for i in range(size)]
        items.append(
            {"id": f"{index:06}", "prompt": f"prompt {index}", "generations": files, "ranking": ranking}
        )
    dump(root / "test.json", items)


def test_inspect_counts_imagereward_without_its_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imagereward_like(tmp_path)
    assert cli.main(["inspect", "imagereward", "--root", str(tmp_path), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["rows"], counts["prompts"]) == (466, 466)
    assert (counts["strict_pairs"], counts["ties"]) == (6399, 831)
    assert counts["missing_images"] == counts["images"] > 2000
    assert counts["rejects"] == {}
    assert cli.main(["inspect", "imagereward", "--root", str(tmp_path), "--no-images"]) == 0
    output = capsys.readouterr().out
    assert "6,399" in output
    assert "missing images" not in output


def test_inspect_sees_repetitions_votes_and_sizes(tmp_path: Path) -> None:
    write(tmp_path, ["a.png", "b.png", "c.png"])
    picture(3, (32, 32)).save(tmp_path / "c.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    row = {"prompt": "p", "path1": "a.png", "path2": "b.png"}
    dump(
        tmp_path / "test.json",
        [
            row | {"choice_dist": [5, 0], "confidence": 0.99},
            row | {"path1": "b.png", "path2": "a.png", "choice_dist": [3, 2], "confidence": 0.5},
            row | {"prompt": "q", "path2": "c.png"},
            row | {"prompt": "r", "path1": "broken.png", "path2": "gone.png"},
            row | {"prompt": None},
        ],
    )
    found = inspect(read_source("hpdv3", tmp_path, check_images="none"))
    assert (found.rows, found.prompts, found.strict_pairs, found.ties) == (5, 3, 4, 0)
    assert dict(found.rejects) == {"no prompt": 1}
    assert (found.pairs_with_votes, found.total_votes, found.unanimous) == (2, 10, 1)
    assert (found.pairs_with_confidence, found.confident) == (2, 1)
    assert found.repeated_pairs == 1, "the same two pictures for the same prompt, sides swapped"
    assert (found.images, found.shared_images) == (5, 1), "a.png stands under p and q"
    assert (found.missing_images, found.unreadable_images) == (1, 1)
    assert dict(found.resolutions) == {"24x16": 2, "32x32": 1}


def test_audit_finds_what_two_sets_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [f"train/{i}.png" for i in range(4)])
    (tmp_path / "test").mkdir()
    (tmp_path / "test/same.png").write_bytes((tmp_path / "train/0.png").read_bytes())
    picture(1, (48, 32)).save(tmp_path / "test/resized.jpg", quality=90)  # train/1.png at twice the size
    for i in (7, 8, 9, 10):
        picture(i).save(tmp_path / f"test/{i}.png")
    dump(
        tmp_path / "train.json",
        [
            {"prompt": "A red circle!", "file_path": ["0.png", "1.png"], "human_preference": [1, 0]},
            {"prompt": "a tree", "file_path": ["2.png", "3.png"], "human_preference": [0, 1]},
        ],
    )
    dump(
        tmp_path / "test.json",
        [
            {"prompt": "a red  circle", "image_path": ["7.png", "8.png"], "rank": [1, 2]},
            {"prompt": "new", "image_path": ["same.png", "9.png"], "rank": [1, 2]},
            {"prompt": "newer", "image_path": ["resized.jpg", "10.png"], "rank": [2, 1]},
            {"prompt": "newest", "image_path": ["9.png", "10.png"], "rank": [1, 2]},
        ],
    )
    found = audit(read_source("hpdv2", tmp_path, split="test"), read_source("hpdv2", tmp_path, split="train"))
    assert (found.prompts, found.shared_prompts) == (4, 1)
    assert (found.shared_files, found.shared_pictures) == (1, 2)
    assert (found.pairs, found.tainted_pairs) == (4, 3)
    kinds = {(one.kind, Path(one.tested).name) for one in found.overlaps}
    assert kinds == {
        ("prompt", "a red  circle"),
        ("file", "same.png"),
        ("picture", "same.png"),
        ("picture", "resized.jpg"),
    }
    share, low, high = found.position_bias or (0, 0, 0)
    assert (share, found.positioned_pairs) == (0.75, 4)
    assert 0 < low < share < high < 1

    listing = tmp_path / "out" / "overlaps.jsonl"
    assert cli.main(["audit", "hpdv2", "--root", str(tmp_path), "--output", str(listing), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["tainted_pairs"] == 3
    assert len(listing.read_text().splitlines()) == 4
    assert cli.main(["audit", "hpdv2", "--root", str(tmp_path), "--output", str(listing)]) == cli.EXIT_USAGE
    assert "exists: choose another --output" in capsys.readouterr().err
    assert cli.main(["audit", "hpdv2", "--root", str(tmp_path), "--no-images"]) == 0
    output = capsys.readouterr().out
    assert "prompts shared" in output
    assert "perceptual" not in output


def test_audit_of_a_layout_without_positions(tmp_path: Path) -> None:
    write(tmp_path, ["a.png", "b.png"])
    row = {"prompt": "p", "path1": "a.png", "path2": "b.png"}
    dump(tmp_path / "test.json", [row])
    dump(tmp_path / "train.json", [row | {"prompt": "q", "path1": "missing.png"}])
    streams = [
        read_source("hpdv3", tmp_path, split=split, check_images="none") for split in ("test", "train")
    ]
    found = audit(*streams)
    assert found.position_bias is None
    assert (found.shared_files, found.unreadable_images) == (1, 1)
    with pytest.raises(InvalidInputError, match="no comparisons to audit"):
        audit([], [])


def test_an_audit_needs_another_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a train split, or with rows of one's own, the tested set would be compared with itself."""
    for name in ("imagereward", "jsonl"):
        write_source(name, tmp_path / name)
    images, rows = str(tmp_path / "imagereward"), str(tmp_path / "jsonl" / "rows.jsonl")
    for name, root in (("imagereward", images), ("jsonl", rows)):
        assert cli.main(["audit", name, "--root", root]) == 2
        assert "--against SOURCE --against-root DIR" in capsys.readouterr().err
    assert cli.main(["audit", "genai-bench", "--root", images]) == 2
    assert "genai-bench has no split train: give --against-split test_v1|test" in capsys.readouterr().err
    # What has one split only needs no word about it.
    command = [
        "audit",
        "jsonl",
        "--root",
        rows,
        "--against",
        "imagereward",
        "--against-root",
        images,
        "--json",
    ]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["shared_prompts"] == 1


def test_inspect_says_that_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "jsonl", "--root", str(rows_file(tmp_path, []))]) == 0
    assert "nothing to compare in jsonl: no rows" in capsys.readouterr().err
    assert cli.main(["inspect", "jsonl", "--root", str(rows_file(tmp_path, ["no row"]))]) == 0
    assert "nothing to compare in jsonl: 1 rows, all of them rejected" in capsys.readouterr().err


def test_inspect_lists_every_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, ["a.png", "b.png"])
    pair = {"prompt": "p", **SIDES}
    bad: list[Any] = [
        "no row",
        "[]",
        {"prompt": ""},
        {"prompt": "p"},
        pair | {"source": 3},
        pair | {"votes_chosen": "x"},
        pair | {"votes_chosen": 0, "votes_rejected": 0},
        pair | {"chosen": 3},
        pair | {"rejected": "a.png"},
        '{"prompt": "\\ud800"}',
    ]
    assert cli.main(["inspect", "jsonl", "--root", str(rows_file(tmp_path, bad))]) == 0
    assert capsys.readouterr().out.count("rejected: ") == 10


def test_inspect_names_the_first_of_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
    (tmp_path / "rows.csv").write_text(
        "Prompt,prompt,chosen,rejected\nx,p,a.png,b.png\nx,,a.png,cut.png\nx,p,cut.png,a.png\nx,p,c.png,a.png\n"
    )
    assert cli.main(["inspect", "jsonl", "--root", str(tmp_path / "rows.csv")]) == 0
    told = capsys.readouterr().err
    assert f"missing images, the first: rows.csv, line 2: {tmp_path / 'b.png'}" in told
    assert "unreadable images, the first: rows.csv, line 4: " in told
    assert (
        "rejected: no prompt, the first: rows.csv, line 3: no prompt: prompt is missing; the row has" in told
    )
    assert "'Prompt'" in told
