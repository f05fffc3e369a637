"""Files and folders that appear whole or not at all, digests, and what keeps a path from being read."""

import contextlib
import dataclasses
import difflib
import glob
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dina_lrm.errors import InvalidInputError

__all__ = [
    "atomic_folder",
    "atomic_path",
    "atomic_write",
    "content_digest",
    "file_digest",
    "file_fault",
    "naming",
    "not_a_file",
    "readable_json",
    "recover_folder",
]

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
def atomic_path(path: Path) -> Iterator[Path]:
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


def atomic_write(path: Path, content: bytes) -> None:
    """Write `content`."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)


def content_digest(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none that can be read."""
    if file_fault(path) is not None:
        return None
    try:
        return file_digest(path)
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


@contextlib.contextmanager
def atomic_folder(target: Path, owned: Collection[str] | None = None) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `target` once everything is on disk.

    Written beside the target, flushed, then renamed. Until the rename the old folder is untouched; if
    anything fails it stays, and what was written aside is removed.

    Args:
        owned: names that belong to what is written; anything else in the old folder (logs, say) is kept.
            None: nothing of it is.

    Raises:
        OSError: it cannot be written; names `target`, or a file of it.
    """
    target = target.expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise InvalidInputError(f"cannot save to {target}: it is a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    aside, old = (target.parent / f".{target.name}.{mark}.{kind}" for kind in ("new", "old"))
    aside.mkdir()
    try:
        with naming(target):
            yield aside
            for path in [*aside.rglob("*"), aside]:
                _flush(path)
        if target.exists():
            os.rename(target, old)
            try:
                os.rename(aside, target)
            except OSError:
                os.rename(old, target)
                raise
            _finish(old, target, owned)
        else:
            os.rename(aside, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def recover_folder(target: Path, owned: Collection[str] | None = None) -> None:
    """Bring a replacement to its end that was killed half-way, and remove what others left aside.

    To be called when nobody is writing `target`. The old folder comes back if the new one had not yet taken
    its place; what is not owned moves into the new one if it had.
    """
    target = target.expanduser().resolve()
    mark = f".{glob.escape(target.name)}.*"
    for old in sorted(target.parent.glob(f"{mark}.old")):
        with contextlib.suppress(FileNotFoundError):  # another process of the same run was quicker
            if not target.exists():
                os.rename(old, target)
                continue
            _finish(old, target, owned)
    for aside in target.parent.glob(f"{mark}.new"):
        shutil.rmtree(aside, ignore_errors=True)


def _finish(old: Path, target: Path, owned: Collection[str] | None) -> None:
    """What is not owned moves from the old folder into the new one; the rest of the old one goes."""
    for entry in old.iterdir():
        if owned is not None and entry.name not in owned and not (target / entry.name).exists():
            os.rename(entry, target / entry.name)
    shutil.rmtree(old)


def readable_json(record: Any) -> str:
    """Indented, each list of numbers on one line."""
    text = json.dumps(record, indent=2)
    lists = re.compile(r"\[\n\s*([-+.\deE,\s]+?)\n\s*\]")  # no string holds a line break
    return lists.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def json_types(value: Any) -> Any:
    """Dataclasses as dicts and tuples as lists, at every depth: what reading the JSON of it gives.

    >>> json_types({"betas": (0.9, 0.999)})
    {'betas': [0.9, 0.999]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: json_types(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: json_types(item) for key, item in value.items()}
    return [json_types(item) for item in value] if isinstance(value, list | tuple) else value


def file_digest(file: Path) -> str:
    """SHA-256 in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
