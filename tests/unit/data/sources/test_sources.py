"""Public data sets in their published layout: a row becomes comparisons or a reject; the counts add up."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dina_lrm.cli import main as cli
from dina_lrm.data.comparisons import Check, Comparison
from dina_lrm.data.inspection import audit, inspect
from dina_lrm.data.pairs import Reject
from dina_lrm.data.sources.layouts import SOURCES
from dina_lrm.data.sources.own_rows import read_pairs
from dina_lrm.data.sources.registry import read_source
from dina_lrm.errors import InvalidInputError
from dina_lrm.serving.labelling.items import read_items
from tests.unit.data.layouts import shard, write_source


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Smooth, so that a perceptual hash means something."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def encoded(seed: int, form: str = "PNG", size: tuple[int, int] = (24, 16)) -> bytes:
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, form)
    return buffer.getvalue()


def write(root: Path, names: list[str]) -> None:
    for seed, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(file)


def dump(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def table(file: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def read(
    name: str, root: Path, split: str | None = None, check: Check = "exists"
) -> tuple[list[Comparison], list[Reject]]:
    items = list(read_source(name, root, split=split, check_images=check))
    return [i for i in items if isinstance(i, Comparison)], [i for i in items if isinstance(i, Reject)]


# --- layouts


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


# --- what goes wrong


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


SIDES = {"chosen": "a.png", "rejected": "b.png"}


def rows_file(root: Path, rows: list[Any]) -> Path:
    file = root / "rows.jsonl"
    file.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


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


# --- inspect


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


# --- audit


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


def test_every_source_says_where_its_files_are() -> None:
    for source in SOURCES.values():
        assert source.default_split in source.splits
        assert all(source.splits.values())


# --- what `inspect` and `prepare` say of files that are not as they should be


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


@pytest.mark.parametrize("source", ["jsonl", "folder"])
def test_own_pictures_have_no_splits(tmp_path: Path, source: str) -> None:
    write(tmp_path, ["a.png", "b.png"])
    (tmp_path / "0.txt").write_text("a cat")
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(InvalidInputError, match=f"{source} has no splits; got 'banana'"):
        list(read_source(source, tmp_path, split="banana"))
