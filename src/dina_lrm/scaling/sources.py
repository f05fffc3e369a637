"""A dataset as parts: fixed ranges of its rows, each of which a worker can read alone.

Rows are numbered through all files, the files in the order of their names. A part lies in one file. What the
plan reads also makes the fingerprint: all of a .jsonl, the footer of a .parquet, the headers of a .tar.

A part of a .csv, .json or .gz file cannot be found without reading all that stands before it, so such a file
is written once as JSON lines beside the results (`Plan.converted`), and its parts are those of that file.
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
import pyarrow.parquet

from dina_lrm.data.rows import BadRow, repeated_key, rows_of_file, shown
from dina_lrm.errors import InvalidInputError
from dina_lrm.scaling.places import filesystem, find_files, is_local, stored_mark
from dina_lrm.scaling.rows import Row, parse_row
from dina_lrm.scaling.settings import SCORE, Task

__all__ = ["Part", "Plan", "SourceFile", "converted_lines", "make_plan", "read_part"]

Kind = Literal["parquet", "jsonl", "tar", "converted"]
SUFFIXES: dict[str, Kind] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".tar": "tar",
    ".json": "converted",
    ".csv": "converted",
    ".jsonl.gz": "converted",
    ".json.gz": "converted",
    ".csv.gz": "converted",
}
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
"""In a tar shard."""
_TAR_SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in ("key", "prompt", "image", "json")])


@dataclass(frozen=True)
class SourceFile:
    """One file of the input."""

    path: str
    """On the input's filesystem."""
    rows: int
    bytes: int
    sha256: str
    """Digest of what the plan read."""
    mark: str | None = None
    """Of a table or a shard on an object store, whose pictures are read once only: see `places.mark_of`."""


@dataclass(frozen=True)
class Part:
    """Some rows of one file."""

    index: int
    path: str
    folder: str
    """Folder of the input file: relative paths of pictures begin there."""
    first_row: int
    """Number of its first row in the whole input."""
    rows: int
    start: int
    """Where it begins in its file: a row of a .parquet, a byte of the others."""

    @property
    def name(self) -> str:
        """The file with its results."""
        return f"part-{self.index:06d}.parquet"


@dataclass(frozen=True)
class Plan:
    """An input, cut into parts."""

    url: str
    """URL of the input, or of the folder with the converted rows: where the paths of the parts lie."""
    kind: Kind
    files: tuple[SourceFile, ...]
    parts: tuple[Part, ...]
    schema: pyarrow.Schema
    """The input's columns as they are written out: pictures that lie in the table are left out."""
    task: Task = SCORE
    converted: tuple[tuple[str, str], ...] = ()
    """Input files that are written as JSON lines, and the names of these."""

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


# --- the plan ----------------------------------------------------------------------------------------------


def make_plan(url: str, rows_per_part: int, output: str, task: Task = SCORE) -> Plan:
    """Cut an input into parts.

    Args:
        url: a file, a folder of files of one kind, or a pattern such as shards/*.tar; a path or a URL.
        output: folder that converted rows are written to.

    Raises:
        InvalidInputError: no rows, files that are damaged or do not fit together, columns that are missing
            or whose names are those of the results.
    """
    fs, suffix, paths = find_files(url, tuple(SUFFIXES))
    kind = SUFFIXES[suffix]
    if kind == "tar" and task != SCORE:
        raise InvalidInputError(f"a .tar sample has one picture, and a row {len(task.pictures)}: {url!r}")
    if kind == "converted" and not is_local(fs):
        raise InvalidInputError(
            f"{suffix} is read from the local disk only; {url!r} has to be .jsonl or .parquet"
        )
    files: list[SourceFile] = []
    parts: list[Part] = []
    schemas: list[pyarrow.Schema] = []
    kinds_of_values: dict[str, set[str]] = {}
    names: list[tuple[str, str]] = []
    first_row = 0
    for path in paths:
        digest = hashlib.sha256()
        place = path
        match kind:
            case "parquet":
                rows, schema = _scan_parquet(fs, path, digest, task)
                schemas.append(schema)
                starts = list(range(0, rows, rows_per_part))
            case "jsonl":
                with _open(fs, path) as lines:
                    rows, starts = _scan_lines(lines, rows_per_part, digest, kinds_of_values, task)
            case "converted":
                names.append((path, f"rows-{len(names):06d}.jsonl"))
                place = posixpath.join(filesystem(output)[1], names[-1][1])
                lines = converted_lines(path)
                rows, starts = _scan_lines(lines, rows_per_part, digest, kinds_of_values, task)
            case "tar":
                rows, starts = _scan_tar(fs, path, rows_per_part, digest)
        mark = stored_mark(fs, path) if kind in ("parquet", "tar") and not is_local(fs) else None
        files.append(SourceFile(path, rows, fs.size(path) or 0, digest.hexdigest(), mark))
        for number, start in enumerate(starts):
            begin = number * rows_per_part
            count = min(rows_per_part, rows - begin)
            parts.append(Part(len(parts), place, posixpath.dirname(path), first_row + begin, count, start))
        first_row += rows
    if not parts:
        raise InvalidInputError(f"{url!r} holds no rows")
    schema = _TAR_SCHEMA
    if kind == "parquet":
        schema = _common_schema(schemas, paths)
    elif kind != "tar":
        if missing := [name for name in task.columns if name not in kinds_of_values]:
            there = ", ".join(map(repr, kinds_of_values)) or "no columns"
            raise InvalidInputError(f"no row of {url!r} has {' or '.join(missing)}; they have {there}")
        schema = _json_schema(kinds_of_values, task)
    if taken := [name for name in ("row", *task.results, "error") if name in schema.names]:
        raise InvalidInputError(f"{url!r} has a column {taken[0]!r}, the name of a result: rename it")
    where = output if kind == "converted" else url
    return Plan(where, kind, tuple(files), tuple(parts), schema, task, tuple(names))


def read_part(plan: Plan, part: Part, chunk: int) -> Iterator[tuple[pyarrow.Table, list[Row]]]:
    """A part's rows, some at a time: the columns to write out, and what is to be scored.

    Raises:
        InvalidInputError: the file has changed since it was planned, or is damaged.
    """
    fs, _ = filesystem(plan.url)
    reader = {"parquet": _parquet_rows, "tar": _tar_rows}.get(plan.kind, _json_rows)
    count = 0
    try:
        for table, rows in reader(fs, part, plan, chunk):
            count += len(rows)
            yield table, rows
    except (pyarrow.ArrowInvalid, tarfile.TarError) as error:
        raise InvalidInputError(f"{part.path!r} is damaged near its row {part.start}: {error}") from error
    if count != part.rows:
        raise InvalidInputError(f"{part.path!r} has changed since this run began")


def _open(fs: fsspec.AbstractFileSystem, path: str) -> Any:
    return fs.open(path, "rb")


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


# --- parquet -----------------------------------------------------------------------------------------------


def _open_parquet(fs: fsspec.AbstractFileSystem, path: str) -> pyarrow.parquet.ParquetFile:
    source = path if is_local(fs) else _open(fs, path)
    # By default Arrow keeps what was read of a table, which may hold pictures, until the end.
    return pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)


def _scan_parquet(
    fs: fsspec.AbstractFileSystem, path: str, digest: Any, task: Task
) -> tuple[int, pyarrow.Schema]:
    try:
        with _open_parquet(fs, path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInputError(f"{path!r} is not a Parquet file: {error}") from error
    if missing := [name for name in task.columns if name not in schema.names]:
        raise InvalidInputError(f"{path!r} has no column {', '.join(missing)}; it has {schema.names}")
    size = metadata.serialized_size
    digest.update(fs.tail(path, size + 8))
    schema = schema.remove_metadata()
    for name in task.pictures:
        place = schema.get_field_index(name)
        if not _is_string(schema.field(place).type):
            schema = schema.set(place, pyarrow.field(name, pyarrow.string()))
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
    fs: fsspec.AbstractFileSystem, part: Part, plan: Plan, chunk: int
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
            cells = table.select(plan.task.columns).to_pylist()
            rows = [parse_row(index + number, cell, plan.task) for number, cell in enumerate(cells)]
            for name in plan.task.pictures:
                place = table.schema.get_field_index(name)
                if not _is_string(table.schema.field(place).type):
                    names = [_picture_name(cell[name]) for cell in cells]
                    table = table.set_column(place, name, pyarrow.array(names, pyarrow.string()))
            yield table.cast(plan.schema), rows
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
                kinds.setdefault(_text(name), set()).add(_kind(value))
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


def _json_schema(kinds: dict[str, set[str]], task: Task) -> pyarrow.Schema:
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
        [
            pyarrow.field(name, pyarrow.string(), metadata={"json": "1"})
            if kind is None
            else pyarrow.field(name, kind)
            for name, kind in fields.items()
        ]
    )


def _json_rows(
    fs: fsspec.AbstractFileSystem, part: Part, plan: Plan, chunk: int
) -> Iterator[tuple[pyarrow.Table, list[Row]]]:
    index = part.first_row
    with _open(fs, part.path) as lines:
        lines.seek(part.start)
        mine = islice((line for line in lines if line.strip()), part.rows)
        for some in _chunks(mine, chunk):
            records = [_parse(line) for line in some]
            rows = [_json_row(index + number, record, plan) for number, record in enumerate(records)]
            cells = [
                {_text(name): value for name, value in record.items()} if isinstance(record, dict) else {}
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
        values = [None if value is None else _text(value) for value in values]
    elif pyarrow.types.is_floating(field.type):
        values = [None if value is None else float(value) for value in values]
    return pyarrow.array(values, field.type)


def _cell(value: Any) -> str | None:
    """A prompt or the name of a picture; what is neither is kept as JSON text."""
    name = _picture_name(value)
    if name is None and value is not None:
        name = json.dumps(value)
    return None if name is None else _text(name)


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
    fs: fsspec.AbstractFileSystem, part: Part, plan: Plan, chunk: int
) -> Iterator[tuple[pyarrow.Table, list[Row]]]:
    index = part.first_row
    with _open(fs, part.path) as file:
        file.seek(part.start)
        with tarfile.TarFile(fileobj=file) as tar:
            for some in _chunks(islice(_samples(tar), part.rows), chunk):
                read = [_tar_row(index + number, tar, *sample) for number, sample in enumerate(some)]
                columns = [cells for _, cells in read]
                yield pyarrow.Table.from_pylist(columns, plan.schema), [row for row, _ in read]
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
