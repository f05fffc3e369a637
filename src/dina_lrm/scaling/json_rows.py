"""Rows of JSON lines, and of files that are read as such."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet

from dina_lrm.data.row import BadRow, shown
from dina_lrm.data.rows import repeated_key, rows_of_file
from dina_lrm.scaling.parquet_rows import picture_name
from dina_lrm.scaling.plan import Part, Plan, chunks, open_file
from dina_lrm.scaling.rows import Row, parse_row
from dina_lrm.scaling.settings import Task

__all__ = ["converted_lines", "json_rows", "json_schema", "scan_lines", "text_of"]


def scan_lines(
    lines: Iterable[bytes], every: int, digest: Any, kinds: dict[str, set[str]], task: Task
) -> tuple[int, list[int]]:
    """How many rows there are, and where the parts begin; notes the kinds of values in each column."""
    rows, offset = 0, 0
    starts: list[int] = []
    for line in lines:
        digest.update(line)
        if line.strip():
            if rows % every == 0:
                starts.append(offset)
            rows += 1
            record = _parse(line)
            for name, value in record.items() if isinstance(record, dict) else ():
                kinds.setdefault(text_of(name), set()).add(_kind(value))
        offset += len(line)
    return rows, starts


def converted_lines(path: str) -> Iterator[bytes]:
    """The rows of a file that has no lines to begin at, one a line. A string stands for a row that is none,
    and says why."""
    for row in rows_of_file(Path(path)):
        yield json.dumps(str(row.values) if isinstance(row.values, BadRow) else row.values).encode() + b"\n"


def _parse(line: bytes) -> Any:
    """The value in a line, or the error that says why there is none."""
    text = line.decode("utf-8", errors="replace")
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return ValueError(f"{error}: {shown(text.strip())}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"the key {shown(repeated_key(pairs))} stands twice")
    return values


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "bool"
        case int() if -(2**63) <= value < 2**63:
            return "int"
        case float():
            return "float"
        case str():
            return "str"
    return "other"


def json_schema(kinds: dict[str, set[str]], task: Task) -> pyarrow.Schema:
    """A column whose values are all booleans, all integers of 64 bits, all numbers or all strings has that
    type; any other is JSON text."""
    types = {
        ("bool",): pyarrow.bool_(),
        ("int",): pyarrow.int64(),
        ("float",): pyarrow.float64(),
        ("float", "int"): pyarrow.float64(),
        ("str",): pyarrow.string(),
    }
    fields = {name: types.get(tuple(sorted(found - {"null"}))) for name, found in kinds.items()}
    fields |= dict.fromkeys(task.columns, pyarrow.string())
    # Strings and JSON text are both stored as strings; the field's metadata tells them apart.
    return pyarrow.schema(
        pyarrow.field(name, kind or pyarrow.string(), metadata=None if kind else {"json": "1"})
        for name, kind in fields.items()
    )


def json_rows(
    fs: fsspec.AbstractFileSystem, part: Part, plan: Plan, chunk: int
) -> Iterator[tuple[pyarrow.Table, list[Row]]]:
    index = part.first_row
    with open_file(fs, part.path) as lines:
        lines.seek(part.start)
        mine = islice((line for line in lines if line.strip()), part.rows)
        for some in chunks(mine, chunk):
            records = [_parse(line) for line in some]
            rows = [_json_row(index + number, record, plan) for number, record in enumerate(records)]
            cells = [
                {text_of(name): value for name, value in record.items()} if isinstance(record, dict) else {}
                for record in records
            ]
            columns = [_column(field, cells, plan.task) for field in plan.schema]
            yield pyarrow.table(columns, schema=plan.schema), rows
            index += len(rows)


def _json_row(index: int, record: Any, plan: Plan) -> Row:
    if isinstance(record, Exception):
        return Row(index=index, error=f"not JSON: {record}")
    if plan.kind == "converted" and isinstance(record, str):
        return Row(index=index, error=record)
    return parse_row(index, record, plan.task)


def _column(field: pyarrow.Field, cells: list[dict[str, Any]], task: Task) -> pyarrow.Array:
    values = [record.get(field.name) for record in cells]
    if field.name in task.columns:
        return pyarrow.array([_cell(value) for value in values], field.type)
    if field.metadata:
        values = [None if value is None else json.dumps(value) for value in values]
    elif pyarrow.types.is_string(field.type):
        values = [None if value is None else text_of(value) for value in values]
    elif pyarrow.types.is_floating(field.type):
        values = [None if value is None else float(value) for value in values]
    return pyarrow.array(values, field.type)


def _cell(value: Any) -> str | None:
    """A prompt or the name of a picture; what is neither is kept as JSON text."""
    name = picture_name(value)
    if name is None and value is not None:
        name = json.dumps(value)
    return None if name is None else text_of(name)


def text_of(value: str) -> str:
    """Half of a surrogate pair, which JSON allows and UTF-8 does not, is written as an escape."""
    return value.encode("utf-8", "backslashreplace").decode()
