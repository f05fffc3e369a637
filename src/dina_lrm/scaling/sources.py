"""A dataset as parts: fixed ranges of its rows, each of which a worker can read alone.

Rows are numbered through all files, the files in the order of their names. A part lies in one file. What the
plan reads also makes the fingerprint: all of a .jsonl, the footer of a .parquet, the headers of a .tar.
"""

import hashlib
import json
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow
import pyarrow.fs
import pyarrow.parquet
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem

from dina_lrm.errors import InvalidInputError
from dina_lrm.scaling.rows import Row, parse_row

__all__ = ["Part", "Plan", "SourceFile", "filesystem", "make_plan", "open_file", "read_part"]

Kind = Literal["parquet", "jsonl", "tar"]
SUFFIXES: dict[str, Kind] = {".parquet": "parquet", ".jsonl": "jsonl", ".tar": "tar"}
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
"""In a tar shard."""
RESULTS = ("row", "score", "standard_error", "error")
"""Columns that are added, so that the input may not have them."""
_TAR_SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in ("key", "prompt", "image", "json")])


@dataclass(frozen=True)
class SourceFile:
    """One file of the input."""

    path: str
    """On the input's filesystem."""
    rows: int
    bytes: int
    sha256: str
    """Of what the plan read."""


@dataclass(frozen=True)
class Part:
    """Some rows of one file."""

    index: int
    path: str
    first_row: int
    """Number of its first row in the whole input."""
    rows: int
    start: int
    """Where it begins in its file: a row of a .parquet, a byte of the others."""

    @property
    def name(self) -> str:
        """Of the file with its scores."""
        return f"part-{self.index:06d}.parquet"


@dataclass(frozen=True)
class Plan:
    """An input, cut into parts."""

    url: str
    kind: Kind
    files: tuple[SourceFile, ...]
    parts: tuple[Part, ...]
    schema: pyarrow.Schema
    """Of the input's columns as they are written out: pictures that lie in the table are left out."""

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


# --- files -------------------------------------------------------------------------------------------------


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL, and the path on it; without a scheme a path is local.

    s3:// is pyarrow's (credentials, region and AWS_ENDPOINT_URL from the environment, or as a query:
    s3://bucket/folder?region=...); every other scheme is fsspec's.

    Raises:
        InvalidInputError: no such scheme, or its library is not installed.
    """
    try:
        if url.startswith("s3://"):
            s3, path = pyarrow.fs.FileSystem.from_uri(url)
            return ArrowFSWrapper(s3), path
        fs, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InvalidInputError(f"cannot read from {url!r}: {error}") from error
    return fs, str(path)


def open_file(name: str, fs: fsspec.AbstractFileSystem, folder: str) -> Path | bytes:
    """A picture's file from what a row calls it: a URL, an absolute path, or a path beside the row's file.

    Raises:
        InvalidInputError: there is none. Other trouble, of the network say, is an OSError.
    """
    path = posixpath.join(folder, name)
    if "://" in name:
        fs, path = filesystem(name)
    if isinstance(fs, LocalFileSystem):
        return Path(path)
    try:
        with _open(fs, path) as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InvalidInputError(f"missing file: {name}") from error


def _open(fs: fsspec.AbstractFileSystem, path: str) -> Any:
    return fs.open(path, "rb")


def _find(url: str) -> tuple[fsspec.AbstractFileSystem, Kind, list[str]]:
    """The input's files, in order."""
    fs, path = filesystem(url)
    if fs.isfile(path):
        found = [path]
    elif fs.isdir(path):
        listed = (str(name) for name in fs.ls(path, detail=False))
        found = sorted(name for name in listed if posixpath.splitext(name)[1] in SUFFIXES)
    else:
        found = sorted(str(name) for name in fs.glob(path)) if any(c in path for c in "*?[") else []
    if not found:
        raise InvalidInputError(f"no {', '.join(SUFFIXES)} at {url!r}")
    kinds = {posixpath.splitext(name)[1] for name in found}
    if len(kinds) > 1 or not kinds <= SUFFIXES.keys():
        raise InvalidInputError(
            f"input files are all {' or all '.join(SUFFIXES)}; {url!r} has {sorted(kinds)}"
        )
    return fs, SUFFIXES[kinds.pop()], found


# --- the plan ----------------------------------------------------------------------------------------------


def make_plan(url: str, rows_per_part: int) -> Plan:
    """Cut an input into parts.

    Args:
        url: a file, a folder of files of one kind, or a pattern such as shards/*.tar; a path or a URL.

    Raises:
        InvalidInputError: no rows, files that are damaged or do not fit together, columns that are missing
            or whose names are those of the results.
    """
    fs, kind, paths = _find(url)
    files: list[SourceFile] = []
    parts: list[Part] = []
    schemas: list[pyarrow.Schema] = []
    kinds_of_values: dict[str, set[str]] = {}
    first_row = 0
    for path in paths:
        digest = hashlib.sha256()
        match kind:
            case "parquet":
                rows, schema = _scan_parquet(fs, path, digest)
                schemas.append(schema)
                starts = list(range(0, rows, rows_per_part))
            case "jsonl":
                rows, starts = _scan_lines(fs, path, rows_per_part, digest, kinds_of_values)
            case "tar":
                rows, starts = _scan_tar(fs, path, rows_per_part, digest)
        files.append(SourceFile(path, rows, fs.size(path) or 0, digest.hexdigest()))
        for number, start in enumerate(starts):
            begin = number * rows_per_part
            count = min(rows_per_part, rows - begin)
            parts.append(Part(len(parts), path, first_row + begin, count, start))
        first_row += rows
    if not parts:
        raise InvalidInputError(f"{url!r} holds no rows")
    schema = _TAR_SCHEMA
    if kind == "parquet":
        schema = _common_schema(schemas, paths)
    elif kind == "jsonl":
        schema = _json_schema(kinds_of_values)
    if taken := [name for name in RESULTS if name in schema.names]:
        raise InvalidInputError(f"{url!r} has a column {taken[0]!r}, the name of a result: rename it")
    return Plan(url, kind, tuple(files), tuple(parts), schema)


def read_part(plan: Plan, part: Part, chunk: int) -> Iterator[tuple[pyarrow.Table, list[Row]]]:
    """A part's rows, some at a time: the columns to write out, and what is to be scored.

    Raises:
        InvalidInputError: the file has changed since it was planned, or is damaged.
    """
    fs, _ = filesystem(plan.url)
    reader = {"parquet": _parquet_rows, "jsonl": _json_rows, "tar": _tar_rows}[plan.kind]
    count = 0
    try:
        for table, rows in reader(fs, part, plan.schema, chunk):
            count += len(rows)
            yield table, rows
    except (pyarrow.ArrowInvalid, tarfile.TarError) as error:
        raise InvalidInputError(f"{part.path!r} is damaged near its row {part.start}: {error}") from error
    if count != part.rows:
        raise InvalidInputError(f"{part.path!r} has changed since this run began")


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


# --- parquet -----------------------------------------------------------------------------------------------


def _open_parquet(fs: fsspec.AbstractFileSystem, path: str) -> pyarrow.parquet.ParquetFile:
    source = path if isinstance(fs, LocalFileSystem) else _open(fs, path)
    # By default Arrow keeps what was read of a table, which may hold pictures, until the end.
    return pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)


def _scan_parquet(fs: fsspec.AbstractFileSystem, path: str, digest: Any) -> tuple[int, pyarrow.Schema]:
    try:
        with _open_parquet(fs, path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInputError(f"{path!r} is not a Parquet file: {error}") from error
    if missing := sorted({"prompt", "image"} - set(schema.names)):
        raise InvalidInputError(f"{path!r} has no column {', '.join(missing)}; it has {schema.names}")
    size = metadata.serialized_size
    digest.update(fs.tail(path, size + 8))
    place = schema.get_field_index("image")
    schema = schema.remove_metadata()
    if not _is_string(schema.field(place).type):
        schema = schema.set(place, pyarrow.field("image", pyarrow.string()))
    return metadata.num_rows, schema


def _common_schema(schemas: list[pyarrow.Schema], paths: list[str]) -> pyarrow.Schema:
    for path, schema in zip(paths, schemas, strict=True):
        if not schema.equals(schemas[0]):
            odd = sorted({str(field) for field in schema} ^ {str(field) for field in schemas[0]})
            raise InvalidInputError(
                f"{path!r} and {paths[0]!r} have different columns: {odd or 'their order'}"
            )
    return schemas[0]


def _parquet_rows(
    fs: fsspec.AbstractFileSystem, part: Part, schema: pyarrow.Schema, chunk: int
) -> Iterator[tuple[pyarrow.Table, list[Row]]]:
    with _open_parquet(fs, part.path) as file:
        groups: list[int] = []
        skip = end = 0
        for group in range(file.metadata.num_row_groups):
            begin, end = end, end + file.metadata.row_group(group).num_rows
            if end > part.start and begin < part.start + part.rows:
                skip = part.start - begin if not groups else skip
                groups.append(group)
        index, left = part.first_row, part.rows
        for batch in file.iter_batches(batch_size=chunk, row_groups=groups):
            if skip >= len(batch):
                skip -= len(batch)
                continue
            table = pyarrow.Table.from_batches([batch.slice(skip, left)])
            cells = table.select(["prompt", "image"]).to_pylist()
            rows = [parse_row(index + number, cell) for number, cell in enumerate(cells)]
            place = table.schema.get_field_index("image")
            if not _is_string(table.schema.field(place).type):
                names = [_picture_name(cell["image"]) for cell in cells]
                table = table.set_column(place, "image", pyarrow.array(names, pyarrow.string()))
            yield table.cast(schema), rows
            skip, index, left = 0, index + len(rows), left - len(rows)
            if not left:
                return


def _is_string(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _picture_name(cell: Any) -> str | None:
    """What a picture in a table is called, if it has a name."""
    path = cell.get("path") if isinstance(cell, dict) else cell
    return path if isinstance(path, str) else None


# --- JSON lines --------------------------------------------------------------------------------------------


def _scan_lines(
    fs: fsspec.AbstractFileSystem, path: str, every: int, digest: Any, kinds: dict[str, set[str]]
) -> tuple[int, list[int]]:
    rows, offset = 0, 0
    starts: list[int] = []
    with _open(fs, path) as lines:
        for line in lines:
            digest.update(line)
            if line.strip():
                if rows % every == 0:
                    starts.append(offset)
                rows += 1
                record = _parse(line)
                for name, value in record.items() if isinstance(record, dict) else ():
                    kinds.setdefault(_text(name), set()).add(_kind(value))
            offset += len(line)
    return rows, starts


def _parse(line: bytes) -> Any:
    """The value in a line, or the error that says why there is none."""
    try:
        return json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        return error


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


def _json_schema(kinds: dict[str, set[str]]) -> pyarrow.Schema:
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
    fields |= {"prompt": pyarrow.string(), "image": pyarrow.string()}
    # Strings and JSON text are both stored as strings; the field's metadata tells them apart.
    return pyarrow.schema(
        [
            pyarrow.field(name, pyarrow.string(), metadata={"json": "1"})
            if kind is None
            else pyarrow.field(name, kind)
            for name, kind in fields.items()
        ]
    )


def _json_rows(
    fs: fsspec.AbstractFileSystem, part: Part, schema: pyarrow.Schema, chunk: int
) -> Iterator[tuple[pyarrow.Table, list[Row]]]:
    index = part.first_row
    with _open(fs, part.path) as lines:
        lines.seek(part.start)
        mine = islice((line for line in lines if line.strip()), part.rows)
        for some in _chunks(mine, chunk):
            records = [_parse(line) for line in some]
            rows = [
                Row(index=index + number, error=f"not JSON: {record}")
                if isinstance(record, Exception)
                else parse_row(index + number, record)
                for number, record in enumerate(records)
            ]
            cells = [
                {_text(name): value for name, value in record.items()} if isinstance(record, dict) else {}
                for record in records
            ]
            columns = [_column(field, cells, rows) for field in schema]
            yield pyarrow.table(columns, schema=schema), rows
            index += len(rows)


def _column(field: pyarrow.Field, cells: list[dict[str, Any]], rows: list[Row]) -> pyarrow.Array:
    if field.name == "prompt":
        return pyarrow.array([row.prompt for row in rows], field.type)
    if field.name == "image":
        names = [row.image if isinstance(row.image, str) else None for row in rows]
        return pyarrow.array(names, field.type)
    values = [record.get(field.name) for record in cells]
    if field.metadata:
        values = [None if value is None else json.dumps(value) for value in values]
    elif pyarrow.types.is_string(field.type):
        values = [None if value is None else _text(value) for value in values]
    elif pyarrow.types.is_floating(field.type):
        values = [None if value is None else float(value) for value in values]
    return pyarrow.array(values, field.type)


def _text(value: str) -> str:
    """Half of a surrogate pair, which JSON allows and UTF-8 does not, is written as an escape."""
    return value.encode("utf-8", "backslashreplace").decode()


# --- tar shards --------------------------------------------------------------------------------------------


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Neighbours with one name up to the first dot, as WebDataset groups them."""
    key, members = "", list[tarfile.TarInfo]()
    for member in tar:
        folder, base = posixpath.split(member.name)
        if not member.isfile() or base.startswith("."):
            continue
        own = posixpath.join(folder, base.partition(".")[0])
        if members and own != key:
            yield key, members
            members = []
        key = own
        members.append(member)
    if members:
        yield key, members


def _scan_tar(fs: fsspec.AbstractFileSystem, path: str, every: int, digest: Any) -> tuple[int, list[int]]:
    rows, end = 0, 0
    starts: list[int] = []
    try:
        with _open(fs, path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for _, members in _samples(tar):
                if rows % every == 0:
                    starts.append(members[0].offset)
                rows += 1
                for member in members:
                    digest.update(
                        f"{member.name}\n{member.size}\n{member.mtime}\n".encode("utf-8", "replace")
                    )
                    end = member.offset_data + member.size
    except tarfile.TarError as error:
        raise InvalidInputError(
            f"{path!r} is no tar file, or damaged after {rows} samples: {error}"
        ) from error
    if end > (fs.size(path) or 0):
        raise InvalidInputError(f"{path!r} breaks off in its sample {rows - 1}")
    return rows, starts


def _tar_rows(
    fs: fsspec.AbstractFileSystem, part: Part, schema: pyarrow.Schema, chunk: int
) -> Iterator[tuple[pyarrow.Table, list[Row]]]:
    index = part.first_row
    with _open(fs, part.path) as file:
        file.seek(part.start)
        with tarfile.TarFile(fileobj=file) as tar:
            for some in _chunks(islice(_samples(tar), part.rows), chunk):
                read = [_tar_row(index + number, tar, *sample) for number, sample in enumerate(some)]
                columns = [cells for _, cells in read]
                yield pyarrow.Table.from_pylist(columns, schema), [row for row, _ in read]
                index += len(read)


def _tar_row(
    index: int, tar: tarfile.TarFile, key: str, members: list[tarfile.TarInfo]
) -> tuple[Row, dict[str, str | None]]:
    """A sample: its picture, and its prompt from .txt, or from `prompt` or `caption` of .json."""

    def content(member: tarfile.TarInfo) -> bytes:
        file = tar.extractfile(member)
        assert file is not None
        return file.read()

    suffixes = {member: posixpath.splitext(member.name)[1].lower() for member in members}
    pictures = [member for member, suffix in suffixes.items() if suffix in PICTURES]
    texts = [member for member, suffix in suffixes.items() if suffix == ".txt"]
    records = [member for member, suffix in suffixes.items() if suffix == ".json"]
    error = None
    for name, found in (("pictures", pictures), (".txt files", texts), (".json files", records)):
        if len(found) > 1:
            error = error or f"{len(found)} {name} in one sample"
    json_text = content(records[0]).decode("utf-8", errors="replace") if records else None
    prompt = content(texts[0]).decode("utf-8", errors="replace").strip() if texts else None
    if json_text is not None and prompt is None:
        try:
            value = json.loads(json_text)
        except (ValueError, RecursionError) as damage:
            error = error or f"not JSON: {damage}"
        else:
            prompt = value.get("prompt", value.get("caption")) if isinstance(value, dict) else None
    image = content(pictures[0]) if pictures else None
    row = parse_row(index, {"prompt": prompt, "image": image})
    if error is not None:
        row = Row(index=index, prompt=row.prompt, error=error)
    cells = {
        "key": _text(key),
        "prompt": row.prompt,
        "image": _text(pictures[0].name) if pictures else None,
        "json": json_text,
    }
    return row, cells
