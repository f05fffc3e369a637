"""Pictures that were changed, taken away or supplied since their part was scored: a folder that kept the old
results beside new ones would be a mixture of two inputs.

A part's file holds the mark of every picture that its rows name, and one digest of those that lie in the
input's own files (`Marks.metadata`); a run that goes on looks whether they are still the same.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from dina_lrm.errors import InvalidInputError
from dina_lrm.scaling.places import NOT_TOLD, filesystem, is_local, mark_of, open_file
from dina_lrm.scaling.plan import Part, Plan
from dina_lrm.scaling.rows import Row
from dina_lrm.scaling.sources import read_part

__all__ = ["Marks", "changes"]

KEY = b"dina_lrm.images"
"""Key in the metadata of a part's file."""
READERS = 8
ROWS_READ = 64
"""Rows of the input in memory at once."""


class Marks:
    """Opens the pictures of a part, and notes what they were.

    Args:
        fs: the input's filesystem.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, part: Part) -> None:
        self._fs, self._folder = fs, part.folder
        self._named: dict[str, str | None] = {}
        self._inside = hashlib.sha256()

    def open(self, name: str) -> Path | bytes:
        """As `places.open_file`."""
        self._named[name] = None
        source, self._named[name] = open_file(name, self._fs, self._folder)
        return source

    def add(self, rows: Iterable[Row]) -> None:
        """Note the pictures that lie in the input's files."""
        _digest_inside(self._inside, rows)

    def metadata(self) -> dict[bytes, bytes]:
        """For the schema of the part's file."""
        return {KEY: json.dumps({"named": self._named, "inside": self._inside.hexdigest()}).encode()}


def changes(plan: Plan, part: Part, metadata: Mapping[bytes, bytes]) -> list[str]:
    """What is not as it was when a part was scored, as `'a.png' has changed`.

    Tables and shards on an object store are not read again: the plan has the marks of these files.

    Raises:
        InvalidInputError: the part's file does not say what they were.
        ScoringError: a web server fails or cannot be reached. An OSError of an object store says the same.
    """
    if KEY not in metadata:
        raise InvalidInputError("it does not say which pictures were scored")
    before: dict[str, Any] = json.loads(metadata[KEY])
    fs, _ = filesystem(plan.url)
    found: list[str] = []
    if is_local(fs) and plan.kind in ("parquet", "tar"):
        inside = hashlib.sha256()
        for _, rows in read_part(plan, part, ROWS_READ):
            _digest_inside(inside, rows)
        if inside.hexdigest() != before["inside"]:
            last = part.first_row + part.rows - 1
            found.append(f"a picture of rows {part.first_row} to {last} in {part.path!r} has changed")
    named: dict[str, str | None] = before["named"]
    readers = ThreadPoolExecutor(READERS)
    try:
        now = readers.map(lambda name: mark_of(name, fs, part.folder), named)
        found += [
            change
            for name, mark in zip(named, now, strict=True)
            if (change := _change(name, named[name], mark)) is not None
        ]
    finally:
        readers.shutdown(cancel_futures=True)
    return found


def _change(name: str, before: str | None, now: str | None) -> str | None:
    if before == now or NOT_TOLD in (before, now):
        return None
    if before is None:
        return f"{name!r} was not there, and is now"
    return f"{name!r} is gone" if now is None else f"{name!r} has changed"


def _digest_inside(digest: Any, rows: Iterable[Row]) -> None:
    pictures: Sequence[bytes] = [one for row in rows for one in row.pictures if isinstance(one, bytes)]
    for picture in pictures:
        digest.update(hashlib.sha256(picture).digest())
