"""Files of rows in every form: the same rows, their lines, and a fault told in its place."""

import csv
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from dina_lrm.data.row import BadRow
from dina_lrm.data.rows import MAX_ROW_BYTES, count_rows, rows_of_file
from dina_lrm.errors import InvalidInputError

ROWS: list[dict[str, Any]] = [
    {
        "prompt": "a cat, sitting",
        "chosen": "a.png",
        "rejected": "b.png",
        "votes_chosen": 3,
        "votes_rejected": 1,
    },
    {"prompt": 'she said "no"\nand left', "images": ["a.png", "b.png"], "ranks": [1, 2.5]},
    {"prompt": "007", "chosen": "ä.png", "rejected": "b.png", "source": "12"},
]


def write(file: Path, rows: list[dict[str, Any]] = ROWS, *, mark: bytes = b"") -> Path:
    name = file.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        columns = dict.fromkeys(column for row in rows for column in row)
        filled = [{column: row.get(column) for column in columns} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(filled), file)
        return file
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif name.endswith(".json"):
        text = json.dumps(rows, ensure_ascii=False, indent=1)
    else:
        plain = file.with_name("plain.csv")
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with plain.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, columns)
            writer.writeheader()
            for row in rows:
                writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
        text = plain.read_bytes().decode()
    content = mark + text.encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def told(file: Path) -> list[tuple[int | None, str]]:
    """Line and reason of every row that is none."""
    found = list(rows_of_file(file))
    assert [one.index for one in found] == list(range(len(found)))
    return [(one.line, str(one.values)) for one in found if isinstance(one.values, BadRow)]


@pytest.mark.parametrize(
    "name",
    ["r.jsonl", "r.json", "r.csv", "r.parquet", "r.jsonl.gz", "r.json.gz", "r.csv.gz", "R.CSV", "r.JSONL"],
)
def test_every_form_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    if name == "R.CSV":
        file = write(tmp_path / "r.csv").rename(tmp_path / name)
    else:
        file = write(tmp_path / name.replace("JSONL", "jsonl")).rename(tmp_path / name)
    found = list(rows_of_file(file))
    assert [one.index for one in found] == [0, 1, 2]
    assert [
        {key: value for key, value in dict(one.values).items() if value is not None} for one in found
    ] == ROWS
    assert count_rows(file) == 3
    lines = {"jsonl": [1, 2, 3], "csv": [2, 3, 5]}  # the second row of CSV takes two lines
    form = name.lower().removesuffix(".gz").rpartition(".")[2]
    assert [one.line for one in found] == lines.get(form, [None] * 3)


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.csv.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    found = list(rows_of_file(write(tmp_path / name, mark=b"\xef\xbb\xbf")))
    assert [one.values["prompt"] for one in found] == [row["prompt"] for row in ROWS]  # type: ignore[index]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_another_encoding_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    content = write(tmp_path / name.removesuffix(".gz")).read_bytes().decode().encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(InvalidInputError, match=r"UTF-16 .*UTF-8"):
        list(rows_of_file(tmp_path / name))


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_latin_1_costs_the_rows_that_have_it(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name)
    file.write_bytes(file.read_bytes().decode().encode("latin-1"))
    ((_, reason),) = told(file)
    assert reason == "text: chosen has a byte that is not UTF-8 (0xe4; save the file as UTF-8) at position 0"


@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            '{"prompt": "a cat \\ud83d"}',
            "text: prompt has half of a character (a cut-off emoji?)",
        ),
        ('{"prompt": "p", "images": ["a", "b\\udfff"]}', "text: images[1] has half of a character"),
        ('{"prompt": "p", "chosen": {"path": "\\ud800"}}', "text: chosen.path has half of a character"),
        ('{"prompt": "p", "x\\ud800": 1}', "text: a name of a field has half of a character"),
        ('{"prompt": "p", "rejected": "a\\u0000.png"}', "text: rejected has a NUL character at position 1"),
        ('{"prompt": "p", "prompt": "q"}', "not JSON: the key 'prompt' stands twice"),
        ('{"prompt": "p", "x": {"y": 1, "y": 2}}', "not JSON: the key 'y' stands twice"),
        ("[1, 2]", "not a JSON object: list"),
        ("null", "not a JSON object: NoneType"),
        ('"' + "x" * 100_000 + '"', "not a JSON object: str"),
    ],
)
def test_a_row_that_is_none_is_told_in_its_place(tmp_path: Path, name: str, row: str, reason: str) -> None:
    good = '{"prompt": "p"}'
    text = f"{good}\n\n{row}\n{good}\n" if name == "r.jsonl" else f"[{good},\n {row},{good}]"
    (tmp_path / name).write_text(text)
    ((line, found),) = told(tmp_path / name)
    assert found.startswith(reason)
    assert line == (3 if name == "r.jsonl" else None)
    assert count_rows(tmp_path / name) == 3


@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
def test_what_no_row_has_does_not_end_the_reading(tmp_path: Path, name: str) -> None:
    """Objects and lists a million deep, a number of 5,000 digits, NaN and infinity."""
    rows = [
        '{"votes": ' + "9" * 5000 + "}",
        '{"votes": NaN, "more": -Infinity, "least": 1e999}',
        '{"prompt": "p"}',
    ]
    deep = '{"a":' * 1_000_000 + "1" + "}" * 1_000_000
    lists = "[" * 1_000_000 + "]" * 1_000_000
    for hostile in (deep, lists):
        text = "\n".join([*rows, hostile]) if name == "r.jsonl" else f"[{','.join([*rows, hostile])}]"
        (tmp_path / name).write_text(text)
        ((_, reason),) = told(tmp_path / name)
        assert "nested too deeply" in reason
        assert count_rows(tmp_path / name) == 4


def test_a_line_of_any_length_is_not_held(tmp_path: Path) -> None:
    """100 MB in one line, in one cell, in one string of a list, and all of it from 100 kB of gzip."""
    good = b'{"prompt": "p"}'
    huge = b'{"prompt": "' + b"x" * 100_000_000 + b'"}'
    files = {
        "r.jsonl": good + b"\n" + huge + b"\n" + good,
        "r.json": b"[" + good + b"," + huge + b"," + good + b"]",
        "r.csv": b'prompt\np\n"' + b"x" * 100_000_000 + b'"\np\n',
    }
    reasons = {
        "r.jsonl": (2, "too long"),
        "r.json": (None, "not JSON: the list breaks off"),
        "r.csv": (3, "too long"),
    }
    for name, content in files.items():
        file = tmp_path / f"{name}.gz"
        file.write_bytes(gzip.compress(content, compresslevel=1))
        del content
        tracemalloc.start()
        ((line, reason),) = told(file)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (line, reason[: len(reasons[name][1])]) == reasons[name]
        assert held < 8 * MAX_ROW_BYTES


@pytest.mark.parametrize("name", ["r.jsonl.gz", "r.json.gz", "r.csv.gz"])
def test_a_damaged_archive_is_told(tmp_path: Path, name: str) -> None:
    whole = write(tmp_path / name, ROWS * 2000).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (fault,) = told(tmp_path / name)
    assert fault[1].startswith("damaged file")
    assert count_rows(tmp_path / name) > 100
    (tmp_path / name).write_bytes(b"no gzip at all")
    if name == "r.csv.gz":
        with pytest.raises(InvalidInputError, match=r"the header of .*r\.csv\.gz: damaged file: Not a"):
            told(tmp_path / name)
    else:
        assert [reason.split(":")[0] for _, reason in told(tmp_path / name)] == ["damaged file"]


def test_faults_of_csv(tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    lines = [
        "prompt,chosen,rejected,votes_chosen",
        "p,a.png,b.png,3",
        "p,a.png",
        "",
        "p,a,cat,b,c",
        '"p"x,a,b,1',
    ]
    lines += [",,,", "p,a,b,1e999", 'p,a,b,"3"', 'open,"quote,b,1', "p,a,b,1"]
    file.write_text("\n".join(lines))
    found = list(rows_of_file(file))
    shown = {one.line: one.values if isinstance(one.values, dict) else str(one.values) for one in found}
    assert list(shown) == [2, 3, 5, 6, 8, 9, 10]
    assert shown[2] == {"prompt": "p", "chosen": "a.png", "rejected": "b.png", "votes_chosen": 3}
    assert shown[3] == {"prompt": "p", "chosen": "a.png"}
    assert shown[5] == "not CSV: 5 cells under a header of 4; quote text with commas"
    assert shown[6].startswith("not CSV: ',' expected after '\"'")
    assert shown[10] == "not CSV: unexpected end of data, lines 10 to 11"


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ("prompt;chosen;rejected", "columns are separated by commas; its header is 'prompt;chosen;rejected'"),
        ("prompt,chosen,chosen", "column 'chosen' stands twice"),
        ("prompt,,chosen", "a column has no name"),
        ("pr\xf6mpt,chosen", "has a byte that is not UTF-8"),
    ],
)
def test_headers_of_csv(tmp_path: Path, header: str, fault: str) -> None:
    (tmp_path / "r.csv").write_bytes(header.encode("latin-1") + b"\na,b,c\n")
    with pytest.raises(InvalidInputError, match=fault):
        list(rows_of_file(tmp_path / "r.csv"))


def test_text_of_parquet_that_is_none(tmp_path: Path) -> None:
    column = pyarrow.array([b"p", b"\xff\xfe", b"q"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "r.parquet")
    ((_, reason),) = told(tmp_path / "r.parquet")
    assert reason.startswith("text: a cell cannot be converted")
    assert count_rows(tmp_path / "r.parquet") == 3


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    write(tmp_path / "votes.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/zero")
    for name, told in (
        ("pipe.jsonl", r"pipe\.jsonl is a FIFO"),
        ("folder.jsonl", r"folder\.jsonl is a folder"),
        ("device.jsonl", r"device\.jsonl is a device"),
        ("vote.jsonl", r"nothing at .*vote\.jsonl; did you mean votes\.jsonl, "),
        ("none/rows.jsonl", r"nothing at .*rows\.jsonl; .* holds device\.jsonl, folder\.jsonl"),
        ("x" * 300 + ".jsonl", "cannot be read"),
    ):
        with pytest.raises(InvalidInputError, match=told):
            list(rows_of_file(tmp_path / name))


@pytest.mark.parametrize("name", ["r.txt", "r.parquet.gz", "r.gz", "r", "r.jsonl.zip"])
def test_another_form_is_told_what_there_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(InvalidInputError, match=r"\.jsonl, \.json .*\.csv .*\.parquet"):
        list(rows_of_file(tmp_path / name))


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.json"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[]" if name == "r.json" else "")
    assert list(rows_of_file(tmp_path / name)) == []
