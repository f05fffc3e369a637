"""A data set as parts, each scored by itself."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import fsspec
import pyarrow.parquet

from dina_lrm.scaling.settings import SCORE, Task

__all__ = ["PICTURES", "Kind", "Part", "Plan", "SourceFile", "chunks", "open_file"]

Kind = Literal["parquet", "jsonl", "tar", "converted"]
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
"""In a tar shard."""


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
    """Mark of a table or shard on an object store, whose pictures are read once: see `places.mark_of`."""


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


def open_file(fs: fsspec.AbstractFileSystem, path: str) -> Any:
    return fs.open(path, "rb")


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
