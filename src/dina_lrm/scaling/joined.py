"""Results in one file instead of a folder of parts: the parts lie beside it until all of them are there."""

import base64
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from dina_lrm.errors import InvalidInputError
from dina_lrm.files import atomic_path, file_fault
from dina_lrm.scaling.bulk import BulkJob, score_dataset
from dina_lrm.scaling.folder import BulkSummary

if TYPE_CHECKING:
    from dina_lrm.models.reward_model import RewardModel

__all__ = ["OUTPUT_SUFFIXES", "score_to_file"]

OUTPUT_SUFFIXES = (".parquet", ".jsonl", ".csv")

Write = Callable[[pyarrow.Table], None]


def score_to_file(
    job: BulkJob,
    *,
    rejects: Path | None = None,
    model: "RewardModel | None" = None,
    workers: int | None = 0,
    overwrite: bool = False,
    retry_rejects: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> BulkSummary:
    """As `score_dataset`, with a file as `job.output`; the parts are in OUTPUT.parts, where an interrupted
    run goes on. They stay there as long as there are rejects, which may be tried again.

    Args:
        rejects: file of the rows without a result; by default OUTPUT.rejects.jsonl. Absent without any.

    Raises:
        InvalidInputError: the output is there already, or is none of .parquet, .jsonl and .csv; and what
            `score_dataset` raises.
    """
    target = Path(job.output)
    if target.suffix not in OUTPUT_SUFFIXES:
        raise InvalidInputError(
            f"a file of results is {', '.join(OUTPUT_SUFFIXES)}, a folder of them has no suffix; got "
            f"{job.output!r}"
        )
    rejects = rejects or target.with_name(target.name + ".rejects.jsonl")
    if target.resolve() == rejects.resolve():
        raise InvalidInputError(f"results and rejects would both be {str(target)!r}: give two files")
    parts = target.with_name(target.name + ".parts")
    for path in (target, rejects):
        if path.exists() and Path(job.input).exists() and path.samefile(job.input):
            raise InvalidInputError(f"{str(path)!r} is the input: choose another name")
        if path.exists():
            if fault := file_fault(path):  # a FIFO, say, would be replaced
                raise InvalidInputError(f"{str(path)!r} {fault}, not a file")
            if not overwrite and not (retry_rejects and parts.is_dir()):
                retry = ", --retry-rejects" if parts.is_dir() else ""
                raise InvalidInputError(f"{str(path)!r} exists: choose another name{retry}, or --overwrite")
    summary = score_dataset(
        replace(job, output=str(parts)),
        workers=workers,
        model=model,
        overwrite=overwrite,
        retry_rejects=retry_rejects,
        on_progress=on_progress,
    )
    with atomic_path(target) as aside, _writer(aside, target.suffix) as write:
        for path in sorted(parts.glob("part-*.parquet")):
            write(pyarrow.parquet.read_table(path).replace_schema_metadata())
    rejects.unlink(missing_ok=True)
    if summary.rejects is not None:
        with atomic_path(rejects) as aside:
            shutil.copyfile(summary.rejects, aside)
    if not summary.rejected:
        shutil.rmtree(parts)
    return replace(summary, output=job.output, rejects=None if summary.rejects is None else str(rejects))


@contextmanager
def _writer(path: Path, suffix: str) -> Iterator[Write]:
    """A function that appends a table to a file."""
    if suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            yield lambda table: file.writelines(_lines(table))
        return
    parquet = partial(pyarrow.parquet.ParquetWriter, compression="zstd")
    writer_of = pyarrow.csv.CSVWriter if suffix == ".csv" else parquet
    opened: list[Any] = []

    def write(table: pyarrow.Table) -> None:
        if suffix == ".csv":
            table = _flat(table)
        if not opened:
            opened.append(writer_of(path, table.schema))
        opened[0].write_table(table)

    try:
        yield write
    finally:
        for writer in opened:
            writer.close()


def _lines(table: pyarrow.Table) -> Iterator[str]:
    """Rows as JSON. What was JSON in the input and became text in the table is JSON again."""
    texts = [field.name for field in table.schema if field.metadata and b"json" in field.metadata]
    for row in table.to_pylist():
        for name in texts:
            row[name] = None if row[name] is None else json.loads(row[name])
        yield json.dumps({name: _json_value(value) for name, value in row.items()}, ensure_ascii=False) + "\n"


def _json_value(value: Any) -> Any:
    """A cell as JSON can hold it: no NaN, bytes in base 64, times as text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode()
        case dict():
            return {str(name): _json_value(one) for name, one in value.items()}
        case list() | tuple():
            return [_json_value(one) for one in value]
    return str(value)


def _flat(table: pyarrow.Table) -> pyarrow.Table:
    """Columns of lists and structs as JSON text, bytes in base 64: a .csv cell is a number or a text."""
    for place, field in enumerate(table.schema):
        if pyarrow.types.is_nested(field.type) or pyarrow.types.is_binary(field.type):
            cells = [_json_value(value) for value in table[place].to_pylist()]
            as_is = (str, type(None))
            texts = [
                cell if isinstance(cell, as_is) else json.dumps(cell, ensure_ascii=False) for cell in cells
            ]
            table = table.set_column(place, field.name, pyarrow.array(texts, pyarrow.string()))
    return table
