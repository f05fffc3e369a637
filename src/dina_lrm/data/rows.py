"""Rows of a file as a stream, whatever its form: JSON lines, a JSON list, CSV, parquet.

Text is UTF-8, with or without a byte order mark, and may be compressed (.gz). A row at a time is held, and a
row has a largest size, so that neither a file of any length nor a hostile one fills the memory. What cannot
be a row is told in its place as a `BadRow`, and the rest goes on; so nothing that a file holds can end a run.
"""

import codecs
import csv
import gzip
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dina_lrm.data.row import BadRow, FileRow, Twice, Values, checked_row, shown
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import file_fault, not_a_file

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

__all__ = [
    "FORMS",
    "MAX_ROW_BYTES",
    "PATTERNS",
    "count_rows",
    "is_rows_file",
    "open_parquet",
    "repeated_key",
    "rows_of_file",
    "rows_of_list",
]

FORMS = ".jsonl, .json (a list), .csv or .parquet; the first three also with .gz"
"""What `rows_of_file` reads."""
PATTERNS = ("*.jsonl", "*.json", "*.csv", "*.jsonl.gz", "*.json.gz", "*.csv.gz", "*.parquet")
"""Names of such files in a folder."""
MAX_ROW_BYTES = 16 << 20
"""Bytes of one row of text; pictures are files beside it, or lie in parquet."""
CSV_JSON = ("votes_chosen", "votes_rejected", "width", "height", "images", "ranks")
"""Columns of CSV whose cells are numbers, or lists written as JSON; all others are text."""

_CHUNK = 1 << 16
_SPACE = re.compile(r"[ \t\n\r]*")
_UTF_8: Any = {"encoding": "utf-8", "errors": "surrogateescape"}
"""So that a byte that is none is told with the row that it is in, and the rest goes on."""
_UTF_16_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


def rows_of_file(file: Path) -> Iterator[FileRow]:
    """Rows in order; one that is none is told in its place, and so is a file that breaks off.

    Cells of CSV are text, but for the columns of `CSV_JSON`; empty ones are absent.

    Raises:
        InvalidInputError: no such file, another form or another encoding; CSV without a usable header.
    """
    if file_fault(file) is not None:
        raise InvalidInputError(f"no rows: {not_a_file(file)}")
    form, _ = _form(file)
    read = {"jsonl": _lines, "json": _list, "csv": _csv, "parquet": _parquet}.get(form)
    if read is None:
        raise InvalidInputError(f"rows are {FORMS}: not {file}")
    for index, (line, values) in enumerate(read(file)):
        yield FileRow(index, line, values if isinstance(values, BadRow) else checked_row(values))


def rows_of_list(stream: Any, name: Path) -> Iterator[FileRow]:
    """The same for a JSON list in a stream of bytes, such as a member of an archive.

    Args:
        stream: with `peek`; `name` is what an error calls it.

    Raises:
        InvalidInputError: UTF-16 or UTF-32.
    """
    for index, values in enumerate(_listed(_unmarked(stream, name))):
        yield FileRow(index, None, values if isinstance(values, BadRow) else checked_row(values))


def is_rows_file(file: Path) -> bool:
    """Whether its name ends as one of `FORMS`."""
    return _form(file)[0] in ("jsonl", "json", "csv", "parquet")


def count_rows(file: Path) -> int:
    """How many `rows_of_file` gives, without decoding pictures that lie in the table."""
    if _form(file)[0] == "parquet":
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            return parquet.read_metadata(file).num_rows
        except (pyarrow.ArrowException, OSError):
            return 1  # the one BadRow that says so
    return sum(1 for _ in rows_of_file(file))


def _form(file: Path) -> tuple[str, bool]:
    """The name's ending without .gz, and whether that follows."""
    name, compressed = file.name.lower(), file.suffix.lower() == ".gz"
    form = Path(name.removesuffix(".gz")).suffix.removeprefix(".")
    return ("" if compressed and form == "parquet" else form), compressed


# --- text --------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    twice = Twice(values)
    twice.key = repeated_key(pairs)
    return twice


def repeated_key(pairs: list[tuple[str, Any]]) -> str:
    """The first key that stands twice in an object of JSON, of which there has to be one."""
    keys = [key for key, _ in pairs]
    return next(key for key in keys if keys.count(key) > 1)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 400 else math.inf  # Python refuses to read one of 4,300 digits


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _open(file: Path) -> Any:
    """Its text as a stream of bytes, without a byte order mark.

    Raises:
        InvalidInputError: UTF-16 or UTF-32.
    """
    stream: Any = gzip.open(file) if _form(file)[1] else file.open("rb")
    try:
        return _unmarked(stream, file)
    except BaseException:
        stream.close()
        raise


def _unmarked(stream: Any, name: Path) -> Any:
    start = stream.peek(4)[:4]
    if start.startswith(_UTF_16_32):
        raise InvalidInputError(f"{name} is UTF-16 or UTF-32: save it as UTF-8")
    if start.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    return stream


_BROKEN = (OSError, EOFError, zlib.error, zipfile.BadZipFile)
"""What reading a damaged file raises."""


def _text_lines(file: Path) -> Iterator[tuple[int, str | BadRow]]:
    """Lines with their numbers from 1, empty ones too; one that is too long is told."""
    number = 0
    try:
        with _open(file) as stream:
            while line := stream.readline(MAX_ROW_BYTES + 1):
                number += 1
                if len(line) > MAX_ROW_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(_CHUNK)
                    yield number, BadRow(f"too long: a line of more than {MAX_ROW_BYTES >> 20} MB")
                    continue
                yield number, line.decode(**_UTF_8)
    except _BROKEN as error:
        yield number + 1, BadRow(f"damaged file: {error}")


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _text_lines(file):
        if isinstance(line, BadRow) or line.strip():
            yield number, line if isinstance(line, BadRow) else _decoded(line)


def _decoded(text: str) -> Any:
    try:
        value, end = _JSON.raw_decode(text, _space(text, 0))
        if _space(text, end) < len(text):
            return BadRow(f"not JSON: something follows at column {end + 1}")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg} at column {error.pos + 1}")
    except RecursionError:
        return BadRow("not JSON that a row may be: nested too deeply")
    return value


def _space(text: str, at: int) -> int:
    """Where the next character that is no white space stands."""
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _list(file: Path) -> Iterator[tuple[None, Any]]:
    try:
        with _open(file) as stream:
            for value in _listed(stream):
                yield None, value
    except _BROKEN as error:
        yield None, BadRow(f"damaged file: {error}")


def _listed(stream: Any) -> Iterator[Any]:
    """The items of a JSON list; a stream that breaks off is told."""
    try:
        with io.TextIOWrapper(stream, newline="", **_UTF_8) as text:
            yield from _items(text)
    except _BROKEN as error:
        yield BadRow(f"damaged file: {error}")


def _items(text: io.TextIOBase) -> Iterator[Any]:
    """Items of a JSON list, one at a time. Not by ijson, which writes "?" for half of a character and keeps
    the last of two equal keys, both unseen."""
    buffer, at = "", 0

    def more() -> bool:
        nonlocal buffer, at
        new = text.read(max(_CHUNK, len(buffer) - at))  # twice as much for an item that does not end
        buffer, at = buffer[at:] + new, 0
        return bool(new)

    def sign() -> str:
        """The next character that is no white space; nothing at the end."""
        nonlocal at
        while (at := _space(buffer, at)) == len(buffer) and more():
            pass
        return buffer[at : at + 1]

    if sign() != "[":
        yield BadRow("not a JSON list: [row, row, ...] is expected")
        return
    at += 1
    if sign() == "]":
        at += 1
    else:
        while True:
            sign()
            try:
                value, end = _JSON.raw_decode(buffer, at)
                if end == len(buffer) and more():
                    continue  # a number may go on
            except (json.JSONDecodeError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError) and len(buffer) - at < MAX_ROW_BYTES and more():
                    continue
                why = "nested too deeply" if isinstance(error, RecursionError) else error.msg
                yield BadRow(f"not JSON: the list breaks off or is damaged ({why}); its rest is not read")
                return
            yield value
            at = end
            mark = sign()
            at += 1
            if mark == "]":
                break
            if mark != ",":
                yield BadRow("not JSON: the list breaks off or is damaged (no comma); its rest is not read")
                return
    if sign():
        yield BadRow("not JSON: something follows the list")


def _csv(file: Path) -> Iterator[tuple[int, Any]]:
    lines = _CsvLines(file)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        begin, lines.fault = lines.number + 1, None
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            until = f" to {lines.number}" if lines.number > begin else ""
            lines.fault = lines.fault or BadRow(f"not CSV: {error}, lines {begin}{until}")
            cells = [""]
        if header is None:
            if lines.fault is not None:
                raise InvalidInputError(f"the header of {file}: {lines.fault}")
            if any(cell.strip() for cell in cells):
                header = _header(file, cells)
        elif lines.fault is not None:
            yield begin, lines.fault
        elif any(cells):
            yield begin, _csv_row(header, cells)
    if header is None and lines.fault is not None:
        raise InvalidInputError(f"the header of {file}: {lines.fault}")


class _CsvLines:
    """What `csv.reader` takes, with what was wrong with the lines it took last."""

    def __init__(self, file: Path) -> None:
        self.lines, self.number = _text_lines(file), 0
        self.fault: BadRow | None = None

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        self.number, line = next(self.lines)
        if isinstance(line, BadRow):
            self.fault = line
            return "\n"
        return line


def _header(file: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        raise InvalidInputError(f"{file}: columns are separated by commas; its header is {shown(names[0])}")
    for name in names:
        if not name or names.count(name) > 1:
            fault = f"column {name!r} stands twice" if name else "a column has no name"
            raise InvalidInputError(f"the header of {file}: {fault}: {shown(names)}")
    checked = checked_row(dict.fromkeys(names))
    if isinstance(checked, BadRow):
        raise InvalidInputError(f"the header of {file}: {checked}")
    return names


def _csv_row(header: list[str], cells: list[str]) -> Values | BadRow:
    if len(cells) > len(header):
        return BadRow(f"not CSV: {len(cells)} cells under a header of {len(header)}; quote text with commas")
    given = {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}
    for name in CSV_JSON:
        if name in given:
            value = _decoded(given[name])
            given[name] = given[name] if isinstance(value, BadRow) else value
    return given


# --- parquet -----------------------------------------------------------------------------------------------


def open_parquet(file: Path) -> "ParquetFile":
    """For going through a table that may hold pictures: by default Arrow keeps what was read until the end.

    Raises:
        pyarrow.ArrowException: the file is no parquet.
    """
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)


def _parquet(file: Path) -> Iterator[tuple[None, Any]]:
    import pyarrow

    try:
        table = open_parquet(file)
        for batch in table.iter_batches(batch_size=64):
            try:
                yield from ((None, values) for values in batch.to_pylist())
            except (ValueError, OverflowError, pyarrow.ArrowException):  # found while the batch is converted
                yield from ((None, _converted(batch, index)) for index in range(batch.num_rows))
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        yield None, BadRow(f"unreadable parquet: {error}")


def _converted(batch: Any, index: int) -> Values | BadRow:
    import pyarrow

    try:
        return batch.slice(index, 1).to_pylist()[0]
    except (ValueError, OverflowError, pyarrow.ArrowException) as error:
        return BadRow(f"text: a cell cannot be converted ({error})")
