"""Rows of a file as a stream, whatever its form: JSON lines, a JSON list, parquet."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dina_lrm.errors import InvalidInputError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

__all__ = ["BadRow", "count_rows", "open_parquet", "rows_of_file"]

SUFFIXES = (".jsonl", ".json", ".parquet")


class BadRow(Exception):
    """Raised by readers of rows for a row that becomes a reject."""


def rows_of_file(file: Path) -> Iterator[Mapping[str, Any] | BadRow]:
    """Rows in order; one that is none is told in its place, and so is a file that breaks off.

    Raises:
        InvalidInputError: the file's name ends otherwise.
    """
    match file.suffix:
        case ".parquet":
            yield from _parquet(file)
        case ".jsonl":
            yield from _lines(file)
        case ".json":
            yield from _list(file)
        case suffix:
            raise InvalidInputError(
                f"rows are {', '.join(SUFFIXES)}, not {suffix or 'without suffix'}: {file}"
            )


def count_rows(file: Path) -> int:
    """How many `rows_of_file` gives, without decoding pictures that lie in the table."""
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            return parquet.read_metadata(file).num_rows
        except (pyarrow.ArrowInvalid, OSError):
            return 1  # the one BadRow that says so
    return sum(1 for _ in rows_of_file(file))


def open_parquet(file: Path) -> "ParquetFile":
    """For going through a table that may hold pictures: by default Arrow keeps what was read until the end.

    Raises:
        pyarrow.ArrowInvalid: the file is no parquet.
    """
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)


def _parquet(file: Path) -> Iterator[Mapping[str, Any] | BadRow]:
    import pyarrow

    try:
        for batch in open_parquet(file).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        yield BadRow(f"unreadable parquet: {error}")


def _lines(file: Path) -> Iterator[Mapping[str, Any] | BadRow]:
    with file.open("rb") as lines:
        for line in filter(bytes.strip, lines):
            try:
                yield _mapping(json.loads(line))
            except ValueError as error:
                yield BadRow(f"not JSON: {error}")


def _list(file: Path) -> Iterator[Mapping[str, Any] | BadRow]:
    import ijson

    with file.open("rb") as stream:
        if not stream.read(64).lstrip().startswith(b"["):
            yield BadRow("not JSON: a list of rows is expected, as in the published file")
            return
        stream.seek(0)
        try:
            for item in ijson.items(stream, "item", use_float=True):
                yield _mapping(item)
        except ijson.JSONError as error:
            yield BadRow(f"not JSON: the list breaks off or is damaged ({error})")


def _mapping(value: Any) -> Mapping[str, Any] | BadRow:
    return value if isinstance(value, Mapping) else BadRow(f"not a JSON object: {type(value).__name__}")
