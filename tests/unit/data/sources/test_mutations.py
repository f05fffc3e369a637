"""Files that were damaged at random: no exception but our own, and nothing that is in them is lost.

Every mutation follows from its number, so a failure can be repeated with it.
"""

import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.inspection import inspect
from dina_lrm.data.pairs import Reject, load_image, write_rejects
from dina_lrm.data.rows import rows_of_file
from dina_lrm.data.sources.own_rows import read_pairs
from dina_lrm.data.sources.registry import read_source, source_length
from dina_lrm.errors import InvalidInputError
from dina_lrm.serving.labelling.items import read_items
from tests.unit.data.layouts import encoded, shard, write_pictures

# Damaged pictures make Pillow warn; who looks at them is told what is wrong by name.
pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = [
    "",
    " ",
    "p",
    "\ud83d",
    "a\0b",
    "é",
    "😀",
    "x" * 5000,
    "null",
    "../a.png",
    "/dev/zero",
    "a.png",
    "\u202e",
]
NUMBERS = [0, -1, 3, 2.5, 1e308, 1e999, float("nan"), 10**400, 10**4000, True, None]
CELLS: list[Any] = [
    [],
    {},
    [1, 2],
    ["a.png", "b.png"],
    ["a.png", None],
    [["a.png"]],
    {"path": "a.png"},
    {"bytes": "x"},
]
KEYS = [
    "prompt",
    "chosen",
    "rejected",
    "images",
    "ranks",
    "votes_chosen",
    "votes_rejected",
    "source",
    "width",
    "x",
]
BYTES = [
    b"\x00",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\xbd",
    b"\r",
    b"\n",
    b"\n\n",
    b'"',
    b"{",
    b"}",
    b"[",
    b",",
    b"\\",
    b"\xef\xbb\xbf",
]


def some_rows(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Pairs, pairs with votes and ranked lists."""
    rows: list[dict[str, Any]] = []
    for index in range(6):
        names = [f"{letter}.png" for letter in rng.permutation(list("abcd"))]
        row: dict[str, Any] = {"prompt": f"prompt {index % 4}"}
        if index % 3 == 2:
            rows.append(row | {"images": names, "ranks": rng.integers(1, 5, 4).tolist()})
        else:
            votes = dict(zip(("votes_chosen", "votes_rejected"), rng.integers(0, 4, 2).tolist(), strict=True))
            rows.append(row | {"chosen": names[0], "rejected": names[1]} | (votes if index % 3 else {}))
    return rows


def mutated_rows(seed: int) -> tuple[str, bytes]:
    """A form, and the content of a file of it."""
    rng = np.random.default_rng(seed)
    rows = some_rows(rng)
    for _ in range(int(rng.integers(0, 4))):
        row = rows[int(rng.integers(len(rows)))]
        key = str(rng.choice(KEYS))
        values = TEXTS + NUMBERS + CELLS
        match int(rng.integers(4)):
            case 0:
                row.pop(key, None)
            case 1:
                row[str(rng.choice(KEYS))] = row.get(key)
            case _:
                row[key] = values[int(rng.integers(len(values)))]
    form = str(rng.choice(["jsonl", "json", "csv"]))
    text = written(rows, form)
    if rng.random() < 0.2:
        text = text.replace('"prompt":', '"prompt": "q", "prompt":', 1)
    content = bytearray(text.encode(errors="surrogatepass"))
    for _ in range(int(rng.integers(0, 4))):
        place = int(rng.integers(len(content) + 1))
        match int(rng.integers(4)):
            case 0:
                content[place:place] = BYTES[int(rng.integers(len(BYTES)))]
            case 1:
                del content[place : place + int(rng.integers(1, 30))]
            case 2:
                content[place : place + 1] = bytes([int(rng.integers(256))])
            case _:
                del content[place:]
                content = content or bytearray(b"\n")
    return form, bytes(content)


def written(rows: list[dict[str, Any]], form: str) -> str:
    lines = [
        json.dumps(row) if index % 2 else json.dumps(row, ensure_ascii=False)
        for index, row in enumerate(rows)
    ]
    if form == "jsonl":
        return "\n".join(lines) + "\n"
    if form == "json":
        return "[" + ",\n".join(lines) + "]"
    cells = [",".join(KEYS)]
    for row in rows:
        texts = [value if isinstance(value, str) else json.dumps(value) for value in map(row.get, KEYS)]
        cells.append(
            ",".join('"' + ("" if text == "null" else text.replace('"', '""')) + '"' for text in texts)
        )
    return "\n".join(cells) + "\n"


def check_rows(folder: Path, seed: int) -> str:
    """Every reader over one file; returns what came of it."""
    form, content = mutated_rows(seed)
    file = folder / f"rows.{form}"
    file.write_bytes(content)
    try:
        found = list(rows_of_file(file))
    except InvalidInputError as error:  # an encoding, a header
        for read in (read_pairs, read_items, lambda file: list(read_source("jsonl", file))):
            with pytest.raises(InvalidInputError):
                read(file)
        return str(error).rpartition(":")[2][:20]
    if form == "jsonl":
        assert len(found) == sum(1 for line in content.split(b"\n") if line.strip()), "a line is a row"
        assert [one.line for one in found] == [
            number for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()
        ]
    indices = {one.index for one in found}
    items = {
        check: list(read_source("jsonl", file, check_images=check)) for check in ("none", "exists", "decode")
    }
    by_row: dict[int, int] = {}
    for check, some in items.items():
        assert {item.row for item in some} == indices, f"rows are lost with {check}"
        counts = Counter(item.row for item in some)
        for one in found:
            ranked = one.values.get("images") if isinstance(one.values, dict) else None
            pairs = len(ranked) * (len(ranked) - 1) // 2 if isinstance(ranked, list) else 1
            assert counts[one.index] in (1, pairs), f"row {one.index} with {check}"
        assert not by_row or counts == by_row, "what is looked at changes no count"
        by_row = counts
    assert source_length("jsonl", file) == len(items["none"])
    counts = inspect(items["none"])
    assert counts.rows == len(found)
    assert counts.strict_pairs + counts.ties + counts.rejects.total() == len(items["none"])
    own = read_pairs(file, ties="half", rejects_file=folder / "rejects.jsonl")
    assert own.num_rows == len(found)
    assert len(own.pairs) + len(own.rejects) == len(items["decode"])
    assert own.pairs == [item.pair for item in items["decode"] if isinstance(item, Comparison)]
    strict = read_pairs(file)
    assert len(strict.pairs) == len(own.pairs) - sum(pair.tie for pair in own.pairs)
    assert all(0.5 <= pair.target <= 1 and pair.tie == (pair.target == 0.5) for pair in own.pairs)
    if own.rejects:
        listed = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
        assert len(listed) == len(own.rejects)
    told = message(read_items, file)
    assert told is None or told.startswith(f"no pair to label in {file}")
    if seed % 10 == 0:
        rejects = shard(items["none"], folder / "shard.parquet", root=folder)
        assert [reject.row for reject in rejects] == sorted(reject.row for reject in rejects)
        assert Counter(reject.row for reject in rejects) <= by_row
    return "rejects" if own.rejects else "whole"


def mutated_picture(seed: int) -> tuple[str, bytes]:
    rng = np.random.default_rng(seed)
    form = str(rng.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "AVIF"]))
    size = tuple(int(side) for side in rng.integers(1, 70, 2))
    mode = str(rng.choice(["RGB", "L", "P", "RGBA", "1", "CMYK", "I;16", "F"]))
    buffer = io.BytesIO()
    try:
        Image.open(io.BytesIO(encoded(seed, (size[0], size[1])))).convert(mode).save(buffer, form)
    except (OSError, ValueError, KeyError):  # a mode that the form does not have
        buffer = io.BytesIO(encoded(seed, (size[0], size[1])))
    content = bytearray(buffer.getvalue())
    for _ in range(int(rng.integers(0, 4))):
        place = (
            int(rng.integers(len(content) + 1))
            if rng.random() < 0.5
            else int(rng.integers(min(64, len(content) + 1)))
        )
        match int(rng.integers(5)):
            case 0:
                del content[place:]
            case 1:
                content[place : place + 1] = bytes([int(rng.integers(256))])
            case 2:
                content[place : place + 4] = rng.bytes(4)
            case 3:
                content[place:place] = rng.bytes(int(rng.integers(1, 40)))
            case _:
                content = bytearray(rng.bytes(int(rng.integers(0, 200))))
    return str(rng.choice([".png", ".jpg", ".webp", ".txt", "", ".PNG", ".gif"])), bytes(content)


def check_pictures(folder: Path, seed: int) -> str:
    """Three pairs: with a good picture, with another damaged one, and with its own copy."""
    names = []
    for offset in range(2):
        suffix, content = mutated_picture(2 * seed + offset)
        names.append(f"damaged{offset}{suffix}")
        (folder / names[-1]).write_bytes(content)
    (folder / "copy").write_bytes((folder / names[0]).read_bytes())
    rows = [{"prompt": "p", "chosen": names[0], "rejected": other} for other in ("a.png", names[1], "copy")]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = message(load_image, folder / names[0])
    readable = told is None
    assert readable or names[0] in str(told)
    items = list(read_source("jsonl", file, check_images="none"))
    assert len(items) == 3
    counts = inspect(items)
    assert counts.missing_images == 0
    assert (counts.unreadable_images or 0) + counts.resolutions.total() == counts.images
    own = read_pairs(file)
    assert len(own.pairs) + len(own.rejects) == 3
    assert all(pair.chosen.name == names[0] for pair in own.pairs if isinstance(pair.chosen, Path))
    assert any(pair.rejected == folder / "a.png" for pair in own.pairs) == readable
    assert 2 in {reject.row for reject in own.rejects}, "its own copy"
    rejects = shard(items, folder / "shard.parquet", root=folder)
    assert len({reject.row for reject in rejects}) == len(rejects) <= 3
    for reject in rejects:
        assert reject.reason.split(":")[0] in (
            "unreadable image",
            "size",
            "same picture",
            "latent is not finite",
        ), reject
    for name in (*names, "copy"):
        (folder / name).unlink()
    return "readable" if readable else "unreadable"


def message(read: Any, file: Path) -> str | None:
    """Of our own error, where there is one."""
    try:
        read(file)
    except InvalidInputError as error:
        return str(error)
    return None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


def run(check: Any, folder: Path, seeds: range) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        try:
            counts[check(folder, seed)] += 1
        except Exception as error:
            raise AssertionError(f"mutation {seed}: {type(error).__name__}: {error}") from error
    print(f"{check.__name__}: {dict(counts)}")
    return counts


@pytest.mark.parametrize(
    "seeds", [range(100), pytest.param(range(100, 1100), marks=pytest.mark.slow)], ids=["100", "1000"]
)
def test_mutated_rows(folder: Path, seeds: range) -> None:
    counts = run(check_rows, folder, seeds)
    assert counts["rejects"] > len(seeds) // 4
    assert counts["whole"] > len(seeds) // 20


@pytest.mark.parametrize(
    "seeds", [range(100), pytest.param(range(100, 1100), marks=pytest.mark.slow)], ids=["100", "1000"]
)
def test_mutated_pictures(folder: Path, seeds: range) -> None:
    counts = run(check_pictures, folder, seeds)
    assert min(counts["readable"], counts["unreadable"]) > len(seeds) // 5


def test_names_that_are_no_utf_8(folder: Path) -> None:
    """Of pictures and prompts in a folder, as an old archive leaves them."""
    name = os.fsdecode(b"\xff\xfe")
    (folder / f"{name}.txt").write_text("p")
    for side, letter in (("chosen", "a"), ("rejected", "b")):
        (folder / f"{letter}.png").rename(folder / f"{name}.{side}.png")
    items = list(read_source("folder", folder))
    (reject,) = items
    assert isinstance(reject, Reject)
    assert reject.reason.startswith("text: chosen has a byte that is not UTF-8")
    write_rejects([reject], folder / "rejects.jsonl")
    assert json.loads((folder / "rejects.jsonl").read_text())["file"] == "\\udcff\\udcfe.txt"
    assert inspect(items).rejects == {"text": 1}
