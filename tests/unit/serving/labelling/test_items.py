"""Rows and folders become pairs; what gives none is told; sides do not give away what a row says of them."""

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from dina_lrm.errors import InvalidInputError
from dina_lrm.serving.labelling.items import Items, read_items
from tests.rows import write_json_lines
from tests.unit.serving.labelling.conftest import write_picture


def names_of(items: Items) -> list[set[str]]:
    return [{Path(str(items.pictures[side])).name for side in (pair.a, pair.b)} for pair in items.pairs]


def test_every_layout_of_rows(tmp_path: Path) -> None:
    for name in "abc":
        write_picture(tmp_path / f"{name}.png", ord(name))
    rows = [
        {"prompt": "three", "images": ["a.png", "b.png", "c.png"], "source": "mine"},
        {"prompt": "sides", "image_a": "a.png", "image_b": "b.png"},
        {"prompt": "voted", "chosen": "c.png", "rejected": "a.png"},
    ]
    items = read_items(write_json_lines(tmp_path / "items.jsonl", rows))
    assert [pair.prompt for pair in items.pairs] == ["three"] * 3 + ["sides", "voted"]
    assert {frozenset(names) for names in names_of(items)[:3]} == {
        frozenset({"a.png", "b.png"}),
        frozenset({"a.png", "c.png"}),
        frozenset({"b.png", "c.png"}),
    }
    assert names_of(items)[3:] == [{"a.png", "b.png"}, {"a.png", "c.png"}]
    assert [pair.source for pair in items.pairs] == ["mine"] * 3 + [None] * 2
    assert len(items.pictures) == 3
    assert all(pair.a < pair.b for pair in items.pairs)


def test_the_chosen_side_is_a_about_half_of_the_time(tmp_path: Path) -> None:
    rows = []
    for number in range(60):
        sides = {side: f"{number}-{side}.png" for side in ("chosen", "rejected")}
        for side in sides.values():
            (tmp_path / side).write_bytes(side.encode())
        rows.append({"prompt": "p", **sides})
    items = read_items(write_json_lines(tmp_path / "items.jsonl", rows))
    first = [str(items.pictures[pair.a]).endswith("chosen.png") for pair in items.pairs]
    assert 18 <= sum(first) <= 42  # a fair coin leaves this range once in 1,000


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": " ", "images": ["a.png", "b.png"]}, "no prompt"),
        ({"images": ["a.png", "b.png"]}, "no prompt"),
        ({"prompt": "p", "images": ["a.png"]}, "images: at least 2 pictures"),
        ({"prompt": "p", "images": ["a.png", "a.png"]}, "all different"),
        ({"prompt": "p", "images": "a.png"}, "a list is expected"),
        ({"prompt": "p", "images": ["a.png", "absent.png"]}, "missing file: images[1] = absent.png"),
        ({"prompt": "p", "image_a": "a.png"}, "no image: image_b is missing"),
        ({"prompt": "p", "image_a": "a.png", "chosen": "b.png"}, "has image_a and chosen"),
        ({"prompt": "p"}, "has none of them"),
    ],
)
def test_bad_rows_are_told(tmp_path: Path, row: dict, reason: str) -> None:
    for name in "ab":
        write_picture(tmp_path / f"{name}.png", ord(name))
    rows = [row, {"prompt": "p", "images": ["a.png", "b.png"]}]
    items = read_items(write_json_lines(tmp_path / "items.jsonl", rows))
    assert len(items.pairs) == 1
    assert [reject.row for reject in items.rejects] == [0]
    assert reason in items.rejects[0].reason


def test_a_missing_picture_costs_its_own_pairs(tmp_path: Path) -> None:
    for name in "abc":
        write_picture(tmp_path / f"{name}.png", ord(name))
    (tmp_path / "folder.png").mkdir()
    images = ["a.png", "absent.png", "b.png", "folder.png", "c.png"]
    items = read_items(write_json_lines(tmp_path / "items.jsonl", [{"prompt": "p", "images": images}]))
    assert sorted("".join(sorted(name[0] for name in two)) for two in names_of(items)) == ["ab", "ac", "bc"]
    assert [(reject.row, reject.prompt, reject.reason) for reject in items.rejects] == [
        (0, "p", "missing file: images[1] = absent.png"),
        (0, "p", "no file: images[3] = folder.png is a folder"),
    ]


def test_a_pair_that_stands_twice_is_asked_once(tmp_path: Path) -> None:
    for name in "ab":
        write_picture(tmp_path / f"{name}.png", ord(name))
    rows = [{"prompt": "p", "images": order} for order in (["a.png", "b.png"], ["b.png", "a.png"])]
    assert len(read_items(write_json_lines(tmp_path / "items.jsonl", rows)).pairs) == 1


def test_a_folder(tmp_path: Path) -> None:
    inner = tmp_path / "deep"
    inner.mkdir()
    for name in ("one.1.png", "one.2.JPG", "one.3.webp"):
        write_picture(tmp_path / name, len(name))
    for name in ("two.chosen.png", "two.rejected.png"):
        write_picture(inner / name, len(name))
    (tmp_path / "one.txt").write_text("first\n")
    (inner / "two.txt").write_text("second")
    (tmp_path / "three.txt").write_text("nothing beside it")
    (tmp_path / "one.notes.json").write_text("{}")
    items = read_items(tmp_path)
    assert sorted(pair.prompt for pair in items.pairs) == ["first"] * 3 + ["second"]
    assert [(reject.file, reject.prompt) for reject in items.rejects] == [("three.txt", "nothing beside it")]


def test_pictures_in_a_table(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.png" for name in "ab"]
    cells = [
        {"bytes": file.read_bytes(), "path": None} for file in files if write_picture(file, ord(file.stem))
    ]
    parquet.write_table(pyarrow.table({"prompt": ["p"], "images": [cells]}), tmp_path / "items.parquet")
    items = read_items(tmp_path / "items.parquet")
    assert {bytes(cell["bytes"]) for cell in cells} == set(items.pictures)


def test_the_fingerprint_follows_prompts_order_and_pictures(tmp_path: Path) -> None:
    for name in "abc":
        write_picture(tmp_path / f"{name}.png", ord(name))
    rows = [{"prompt": "p", "images": ["a.png", "b.png"]}, {"prompt": "q", "images": ["a.png", "c.png"]}]
    path = tmp_path / "items.jsonl"
    first = read_items(write_json_lines(path, rows)).fingerprint
    assert (
        read_items(write_json_lines(path, [dict(reversed(row.items())) for row in rows])).fingerprint == first
    )
    changed = [
        read_items(write_json_lines(path, other)).fingerprint
        for other in (rows[::-1], rows[:1], [rows[0] | {"prompt": "other"}, rows[1]])
    ]
    write_picture(tmp_path / "c.png", 7, size=(80, 64))
    changed.append(read_items(write_json_lines(path, rows)).fingerprint)
    assert len({first, *changed}) == 5


def test_moving_the_folder_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in "ab":
        write_picture(tmp_path / "old" / f"{name}.png", ord(name))
    rows = [{"prompt": "p", "images": ["a.png", "b.png"]}]
    before = read_items(write_json_lines(tmp_path / "old" / "items.jsonl", rows)).fingerprint
    (tmp_path / "old").rename(tmp_path / "new")
    assert read_items(tmp_path / "new" / "items.jsonl").fingerprint == before


@pytest.mark.parametrize("content", [None, "", '{"prompt": "p"}\n', "no json\n"])
def test_nothing_to_label_is_one_clear_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "items.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidInputError, match=r"items\.jsonl"):
        read_items(path)


def test_another_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "items.xlsx"
    path.write_text("prompt,images\n")
    with pytest.raises(InvalidInputError, match=r"rows are \.jsonl.*not .*items\.xlsx"):
        read_items(path)


def test_numbers_of_pictures_say_nothing_about_rows(tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        names = [f"{number}-{side}.png" for side in ("first", "second")]
        for name in names:
            (tmp_path / name).write_bytes(name.encode())
        rows.append({"prompt": str(number), "images": names})
    items = read_items(write_json_lines(tmp_path / "items.jsonl", rows))
    order = [int(Path(str(picture)).name.split("-")[0]) for picture in items.pictures]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.35  # 3 standard errors of 80 numbers
