"""Files that appear whole or not at all: written aside, flushed to disk, renamed."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["naming", "write_whole", "written_aside"]


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the operating system inside, such as a full disk, becomes an `OSError` that names `path`.

    A failed write names no file, and safetensors wraps it in an error of its own.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except SafetensorError as error:
        if (code := re.search(r"(?:os error|code:) (\d+)", str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the place of `path` once the block has ended without error.

    The name holds the process id, so two processes that write the same file do not meet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with naming(path):
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
