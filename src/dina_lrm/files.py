"""Files that appear whole or not at all, their digests, and what is wrong with a path that should be read."""

import contextlib
import difflib
import hashlib
import itertools
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["content_digest", "file_fault", "naming", "not_a_file", "write_whole", "written_aside"]

LISTED = 2000
"""Entries of a folder that are looked at for what a mistyped name may have meant."""


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


def content_digest(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none that can be read."""
    if file_fault(path) is not None:
        return None
    try:
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError:
        return None


def file_fault(path: Path) -> str | None:
    """What keeps `path` from being read as a file: nothing there, or a folder, or a FIFO, socket or device,
    which may block for ever. None for a file.

    >>> file_fault(Path("/dev/null"))
    'is a device'
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:  # a name too long, a NUL, a folder that may not be entered
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return None if stat.S_ISREG(mode) else f"is a {kinds.get(stat.S_IFMT(mode), 'device')}"


def not_a_file(path: Path) -> str:
    """Says why `path` is no file to read; of one that is not there, which names are like it, or beside it."""
    fault = file_fault(path)
    if fault != "is missing":
        return f"{path} {fault or 'is a file'}"
    lost = path
    while not lost.parent.is_dir() and lost != lost.parent:
        lost = lost.parent
    try:
        names = sorted(entry.name for entry in itertools.islice(os.scandir(lost.parent), LISTED))
    except OSError:
        names = []
    if not names:
        return f"nothing at {path}: {lost.parent} is empty"
    if close := difflib.get_close_matches(lost.name, names, n=3):
        return f"nothing at {path}; did you mean {', '.join(close)} in {lost.parent}?"
    more = ", ..." if len(names) > 5 else ""
    return f"nothing at {path}; {lost.parent} holds {', '.join(names[:5])}{more}"
