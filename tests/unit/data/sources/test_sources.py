"""Published sets in their original layouts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dina_lrm.cli import main as cli
from dina_lrm.data.comparisons import Check
from dina_lrm.data.inspection import inspect
from dina_lrm.data.sources.layouts import SOURCES
from dina_lrm.data.sources.own_rows import read_pairs
from dina_lrm.data.sources.registry import read_source
from dina_lrm.errors import InvalidInputError
from tests.unit.data.layouts import shard, write_source
from tests.unit.data.sources.pictures import SIDES, dump, encoded, read, rows_file, table, write


def test_hpdv3(tmp_path: Path) -> None:
    write(tmp_path, [f"images/{name}.jpg" for name in "abcdef"])
    row = {
        "prompt": "a lighthouse",
        "path1": "images/a.jpg",
        "path2": "images/b.jpg",
        "model1": "flux",
        "model2": "infinity",
    }
    dump(
        tmp_path / "train.json",
        [
            row | {"choice_dist": [12, 7], "confidence": 0.99},
            row | {"choice_dist": [3, 16], "confidence": "null"},  # the larger count is path1's all the same
            row | {"choice_dist": None, "confidence": None, "model1": "midjourney", "model2": "null"},
            row | {"path2": "images/missing.jpg"},
            row | {"prompt": " "},
            row | {"choice_dist": [1, 2, 3]},
            "not a row",
        ],
    )  # fmt: skip
    comparisons, rejects = read("hpdv3", tmp_path, "train")
    votes = [(c.pair.votes_chosen, c.pair.votes_rejected, c.confidence) for c in comparisons]
    assert votes == [(12, 7, 0.99), (16, 3, None), (None, None, None)]
    assert all(c.pair.chosen == tmp_path / "images/a.jpg" for c in comparisons)
    assert comparisons[0].generators == ("flux", "infinity")
    assert comparisons[2].generators == ("midjourney", None)
    assert [c.row for c in comparisons] == [0, 1, 2]
    assert [(r.row, r.reason.split(":")[0]) for r in rejects] == [
        (3, "missing file"),
        (4, "no prompt"),
        (5, "votes"),
        (6, "not a JSON object"),
    ]


def test_hpdv3_plus(tmp_path: Path) -> None:
    write(tmp_path, ["x/a.png", "x/b.png"])
    for name in ("aes", "tf"):
        dump(tmp_path / f"test/test_{name}.json", [{"prompt": "p", "path1": "x/a.png", "path2": "x/b.png"}])
    comparisons, rejects = read("hpdv3++", tmp_path)
    assert [c.pair.source for c in comparisons] == ["hpdv3++ aes", "hpdv3++ tf"]
    assert not rejects


def test_hpdv2(tmp_path: Path) -> None:
    write(tmp_path, ["train/a.jpg", "train/b.jpg", "test/c.jpg", "test/d.jpg", "test/e.jpg"])
    dump(
        tmp_path / "train.json",
        [
            {"prompt": "p", "file_path": ["a.jpg", "b.jpg"], "human_preference": preference}
            for preference in ([1, 0], [0, 1])
        ],
    )
    dump(
        tmp_path / "test.json",
        [{"prompt": "p", "image_path": ["c.jpg", "d.jpg", "e.jpg"], "rank": [2, 1, 2]}],
    )
    train, _ = read("hpdv2", tmp_path, "train")
    assert [(c.pair.chosen, c.chosen_was_first) for c in train] == [
        (tmp_path / "train/a.jpg", True),
        (tmp_path / "train/b.jpg", False),
    ]
    test, _ = read("hpdv2", tmp_path, "test")
    assert [(Path(str(c.pair.chosen)).name, Path(str(c.pair.rejected)).name, c.pair.tie) for c in test] == [
        ("d.jpg", "c.jpg", False),
        ("c.jpg", "e.jpg", True),
        ("d.jpg", "e.jpg", False),
    ]


def test_genai_bench(tmp_path: Path) -> None:
    cell = {"bytes": encoded(1), "path": "left.png"}
    rows = [
        {"prompt": "p", "left_image": cell, "right_image": {"bytes": encoded(2), "path": None},
         "left_model": "l", "right_model": "r", "vote_type": vote}
        for vote in ("leftvote", "rightvote", "tievote", "bothbad_vote", "nobody")
    ]  # fmt: skip
    table(tmp_path / "image_generation" / "test_v1-00000-of-00001.parquet", rows)
    comparisons, rejects = read("genai-bench", tmp_path, check="decode")
    assert [(c.pair.tie, c.chosen_was_first, c.generators) for c in comparisons] == [
        (False, True, ("l", "r")),
        (False, False, ("r", "l")),
        (True, True, ("l", "r")),
        (True, True, ("l", "r")),
    ]
    assert comparisons[1].pair.chosen == encoded(2)
    assert [r.reason.split(":")[0] for r in rejects] == ["votes"]


def test_pickapic(tmp_path: Path) -> None:
    def row(labels: tuple[float, float], **other: Any) -> dict[str, Any]:
        sides = {"image_0_uid": "u0", "image_1_uid": "u1", "model_0": "a", "model_1": "b"}
        cells = {"jpg_0": encoded(1, "JPEG"), "jpg_1": encoded(2, "JPEG")}
        return (
            {"caption": "p", "label_0": labels[0], "label_1": labels[1], "has_label": True}
            | sides
            | cells
            | other
        )

    rows = [row((1, 0)), row((0, 1)), row((0.5, 0.5)), row((1, 0), has_label=False), row((1, 1))]
    table(tmp_path / "data" / "test_unique-00000-of-00001.parquet", rows)
    comparisons, rejects = read("pickapic", tmp_path, check="decode")
    assert [(c.pair.tie, c.chosen_was_first, c.generators) for c in comparisons] == [
        (False, True, ("a", "b")),
        (False, False, ("b", "a")),
        (True, True, ("a", "b")),
    ]
    assert [r.reason.split(":")[0] for r in rejects] == ["no label", "votes"]
    bare = [{name: value for name, value in one.items() if not name.startswith("jpg")} for one in rows]
    table(tmp_path / "bare" / "test_unique-00000-of-00001.parquet", bare)
    assert len(read("pickapic", tmp_path / "bare", check="none")[0]) == 3, "the edition without images"
    assert len(read("pickapic", tmp_path / "bare")[0]) == 0


def test_a_table_of_pictures_is_not_held(tmp_path: Path) -> None:
    """24 row groups of 2 MB: what Arrow holds while they are read is a few of them."""
    import pyarrow
    import pyarrow.parquet as parquet

    rng = np.random.default_rng(0)
    content = [rng.bytes(250_000) for _ in range(8)]
    rows = [
        {"caption": "p", "jpg_0": content[i % 8], "jpg_1": b"x", "label_0": 1, "label_1": 0}
        for i in range(192)
    ]
    file = tmp_path / "test_unique-00000.parquet"
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, file, row_group_size=8, compression="none", use_dictionary=False)
    del table
    before = pyarrow.total_allocated_bytes()
    held = [pyarrow.total_allocated_bytes() - before for _ in read_source("pickapic", tmp_path)]
    assert len(held) == 192
    assert file.stat().st_size > 47e6
    assert max(held) < 36e6, "64 rows are 16 MB, and the next are read before these are let go"


def test_our_own_rows(tmp_path: Path) -> None:
    write(tmp_path, ["a.png", "b.png", "c.png"])
    file = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": "p", "chosen": "a.png", "rejected": "b.png", "votes_chosen": 3, "votes_rejected": 1},
        {"prompt": "q", "images": ["a.png", "b.png", "c.png"], "ranks": [1, 1, 2]},
        {"prompt": "r", "chosen": "a.png"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    comparisons, rejects = read("jsonl", file)
    assert [c.pair.tie for c in comparisons] == [False, True, False, False]
    assert [r.row for r in rejects] == [2, 3]


def test_imagerewarddb(tmp_path: Path) -> None:
    cells = [{"bytes": encoded(seed), "path": None} for seed in (1, 2, 3)]
    table(
        tmp_path / "8k_pair" / "test-00000-of-00001.parquet",
        [{"prompt_id": "0", "prompt": "p", "img_better": cells[0], "img_worse": cells[1]}],
    )
    table(
        tmp_path / "8k_group" / "test-00000-of-00001.parquet",
        [{"prompt_id": "0", "prompt": "p", "image": cells, "rank": [2, 1, 2]}],
    )
    table(tmp_path / "8k" / "test-00000-of-00001.parquet", [{"prompt": "p", "image": cells[0], "rank": 1}])
    pairs, _ = read("imagerewarddb", tmp_path / "8k_pair", check="decode")
    assert (pairs[0].pair.chosen, pairs[0].pair.rejected) == (encoded(1), encoded(2))
    group, _ = read("imagerewarddb", tmp_path / "8k_group", check="decode")
    assert [(c.pair.chosen, c.pair.tie) for c in group] == [
        (encoded(2), False),
        (encoded(1), True),
        (encoded(2), False),
    ]
    nothing, rejects = read("imagerewarddb", tmp_path / "8k")
    assert not nothing
    assert "_pair or _group" in rejects[0].reason


def test_a_folder_of_pairs(tmp_path: Path) -> None:
    write(tmp_path, ["x/1.chosen.png", "x/1.rejected.jpg", "2.chosen.png", "3.chosen.png", "3.rejected.png"])
    for name, prompt in (("x/1", "a tree\n"), ("2", "no other side"), ("3", " ")):
        (tmp_path / f"{name}.txt").write_text(prompt)
    comparisons, rejects = read("folder", tmp_path, check="decode")
    assert [c.pair.prompt for c in comparisons] == ["a tree"]
    assert comparisons[0].pair.rejected == tmp_path / "x/1.rejected.jpg"
    assert [r.reason for r in rejects] == ["no image: 2.rejected.* is missing", "no prompt: prompt = ''"]
    with pytest.raises(InvalidInputError, match="no folder of pairs"):
        list(read_source("folder", tmp_path / "none"))


@pytest.mark.parametrize("check", ["none", "exists", "decode"])
@pytest.mark.parametrize(
    "name",
    "hpdv3 hpdv3++ hpdv2 hpdv2-train imagereward genai-bench pickapic imagerewarddb imagerewarddb-group "
    "rapidata open-image-preferences editreward folder jsonl".split(),
)
def test_a_relative_root_is_the_same(
    name: str, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = name.replace("-train", " train").replace("-group", " group")
    split, num_comparisons = write_source(written, tmp_path / "set")
    name = written.partition(" ")[0]
    monkeypatch.chdir(tmp_path)
    absolute, rejects = read(name, tmp_path / "set", split, check)
    assert (len(absolute), rejects) == (num_comparisons, [])
    relative, rejects = read(name, Path("set"), split, check)
    assert (len(relative), rejects) == (num_comparisons, [])
    for ours, theirs in zip(relative, absolute, strict=True):
        for one, other in (
            (ours.pair.chosen, theirs.pair.chosen),
            (ours.pair.rejected, theirs.pair.rejected),
        ):
            assert (one.resolve() if isinstance(one, Path) else one) == other
    assert inspect(relative).missing_images == 0
    assert shard(relative, tmp_path / "shard.parquet", root=Path("set")) == []
    from_inside, _ = read(name, Path("."), split, check) if monkeypatch.chdir("set") is None else ([], [])
    assert len(from_inside) == num_comparisons


def test_votes_are_read_in_one_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4:2 is a win, 1:5 a win of the other side, 3:3 a tie; in every reader."""
    write(tmp_path, ["a.png", "b.png"])
    votes = [(4, 2), (1, 5), (3, 3)]
    rows = [
        {"prompt": "p", **SIDES, "votes_chosen": chosen, "votes_rejected": rejected}
        for chosen, rejected in votes
    ]
    file = rows_file(tmp_path, rows)
    found, _ = read("jsonl", file)
    assert [Path(str(c.pair.chosen)).name for c in found] == ["a.png", "b.png", "a.png"]
    assert [(c.pair.tie, round(c.pair.target, 3)) for c in found] == [
        (False, 0.667),
        (False, 0.833),
        (True, 0.5),
    ]
    own = read_pairs(file, ties="half")
    assert own.pairs == [c.pair for c in found]
    assert [reject.reason for reject in read_pairs(file).rejects] == ["tie: nobody won"]
    assert cli.main(["inspect", "jsonl", "--root", str(file), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["strict_pairs"], counts["ties"], counts["total_votes"]) == (2, 1, 18)
    assert [reject.reason for reject in shard(found, tmp_path / "shard.parquet")] == ["tie: nobody won"]


def test_even_votes_of_hpdv3_are_a_tie(tmp_path: Path) -> None:
    write(tmp_path, ["a.png", "b.png"])
    row = {"prompt": "p", "path1": "a.png", "path2": "b.png", "choice_dist": [6, 6]}
    dump(tmp_path / "test.json", [row, row | {"choice_dist": [5, 7]}])
    found, _ = read("hpdv3", tmp_path)
    assert [(c.pair.tie, c.pair.votes_chosen) for c in found] == [(True, 6), (False, 7)]
    assert all(Path(str(c.pair.chosen)).name == "a.png" for c in found)


def test_every_source_says_where_its_files_are() -> None:
    for source in SOURCES.values():
        assert source.default_split in source.splits
        assert all(source.splits.values())


@pytest.mark.parametrize("source", ["jsonl", "folder"])
def test_own_pictures_have_no_splits(tmp_path: Path, source: str) -> None:
    write(tmp_path, ["a.png", "b.png"])
    (tmp_path / "0.txt").write_text("a cat")
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(InvalidInputError, match=f"{source} has no splits; got 'banana'"):
        list(read_source(source, tmp_path, split="banana"))
