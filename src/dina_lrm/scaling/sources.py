"""A dataset as parts: fixed ranges of its rows, each of which a worker can read alone.

Rows are numbered through all files, the files in the order of their names. A part lies in one file. What the
plan reads also makes the fingerprint: all of a .jsonl, the footer of a .parquet, the headers of a .tar.

A part of a .csv, .json or .gz file cannot be found without reading all that stands before it, so such a file
is written once as JSON lines beside the results (`Plan.converted`), and its parts are those of that file.
"""

import hashlib
import posixpath
import tarfile
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet

from dina_lrm.errors import InvalidInputError
from dina_lrm.scaling.json_rows import converted_lines, json_rows, json_schema, scan_lines
from dina_lrm.scaling.parquet_rows import common_schema, parquet_rows, scan_parquet
from dina_lrm.scaling.places import filesystem, find_files, is_local, stored_mark
from dina_lrm.scaling.plan import Kind, Part, Plan, SourceFile, open_file
from dina_lrm.scaling.rows import Row
from dina_lrm.scaling.settings import SCORE, Task
from dina_lrm.scaling.tar_rows import TAR_SCHEMA, scan_tar, tar_rows

__all__ = ["make_plan", "read_part"]

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
                rows, schema = scan_parquet(fs, path, digest, task)
                schemas.append(schema)
                starts = list(range(0, rows, rows_per_part))
            case "jsonl":
                with open_file(fs, path) as lines:
                    rows, starts = scan_lines(lines, rows_per_part, digest, kinds_of_values, task)
            case "converted":
                names.append((path, f"rows-{len(names):06d}.jsonl"))
                place = posixpath.join(filesystem(output)[1], names[-1][1])
                lines = converted_lines(path)
                rows, starts = scan_lines(lines, rows_per_part, digest, kinds_of_values, task)
            case "tar":
                rows, starts = scan_tar(fs, path, rows_per_part, digest)
        mark = stored_mark(fs, path) if kind in ("parquet", "tar") and not is_local(fs) else None
        files.append(SourceFile(path, rows, fs.size(path) or 0, digest.hexdigest(), mark))
        for number, start in enumerate(starts):
            begin = number * rows_per_part
            count = min(rows_per_part, rows - begin)
            parts.append(Part(len(parts), place, posixpath.dirname(path), first_row + begin, count, start))
        first_row += rows
    if not parts:
        raise InvalidInputError(f"{url!r} holds no rows")
    schema = TAR_SCHEMA
    if kind == "parquet":
        schema = common_schema(schemas, paths)
    elif kind != "tar":
        if missing := [name for name in task.columns if name not in kinds_of_values]:
            there = ", ".join(map(repr, kinds_of_values)) or "no columns"
            raise InvalidInputError(f"no row of {url!r} has {' or '.join(missing)}; they have {there}")
        schema = json_schema(kinds_of_values, task)
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
    reader = {"parquet": parquet_rows, "tar": tar_rows}.get(plan.kind, json_rows)
    count = 0
    try:
        for table, rows in reader(fs, part, plan, chunk):
            count += len(rows)
            yield table, rows
    except (pyarrow.ArrowInvalid, tarfile.TarError) as error:
        raise InvalidInputError(f"{part.path!r} is damaged near its row {part.start}: {error}") from error
    if count != part.rows:
        raise InvalidInputError(f"{part.path!r} has changed since this run began")


# --- parquet -----------------------------------------------------------------------------------------------


# --- JSON lines --------------------------------------------------------------------------------------------


# --- tar shards --------------------------------------------------------------------------------------------
