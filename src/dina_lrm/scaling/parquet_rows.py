"""Rows of parquet files."""

from collections.abc import Iterator
from typing import Any

import fsspec
import pyarrow.parquet

from dina_lrm.errors import InvalidInputError
from dina_lrm.scaling.places import is_local
from dina_lrm.scaling.plan import Part, Plan, open_file
from dina_lrm.scaling.rows import Row, parse_row
from dina_lrm.scaling.settings import Task


def _open_parquet(fs: fsspec.AbstractFileSystem, path: str) -> pyarrow.parquet.ParquetFile:
    source = path if is_local(fs) else open_file(fs, path)
    # By default Arrow keeps what was read of a table, which may hold pictures, until the end.
    return pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)


def scan_parquet(
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


def common_schema(schemas: list[pyarrow.Schema], paths: list[str]) -> pyarrow.Schema:
    for path, schema in zip(paths, schemas, strict=True):
        if not schema.equals(schemas[0]):
            odd = sorted({str(field) for field in schema} ^ {str(field) for field in schemas[0]})
            raise InvalidInputError(
                f"{path!r} and {paths[0]!r} have different columns: {odd or 'their order'}"
            )
    return schemas[0]


def parquet_rows(
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
                    names = [picture_name(cell[name]) for cell in cells]
                    table = table.set_column(place, name, pyarrow.array(names, pyarrow.string()))
            yield table.cast(plan.schema), rows
            skip, index, left = 0, index + len(rows), left - len(rows)
            if not left:
                return


def _is_string(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def picture_name(cell: Any) -> str | None:
    """What a picture in a table is called, if it has a name."""
    path = cell.get("path") if isinstance(cell, dict) else cell
    return path if isinstance(path, str) else None
