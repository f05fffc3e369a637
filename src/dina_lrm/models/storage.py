"""Writing a checkpoint folder so that a crash or a full disk never leaves half of one."""

import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from dina_lrm.errors import InvalidInputError
from dina_lrm.files import naming


@contextlib.contextmanager
def replaced_folder(target: Path, owned: Collection[str] | None = None) -> Iterator[Path]:
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
