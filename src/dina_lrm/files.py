"""Files that appear whole or not at all: written aside, flushed to disk, renamed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["write_whole", "written_aside"]


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the place of `path` once the block has ended without error.

    The name holds the process id, so two processes that write the same file do not meet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write `content`."""
    with written_aside(path) as partial:
        partial.write_bytes(content)
