"""ImageRewardDB as the hub holds it: parts of some 500 prompts, each its pictures and a JSON list of them.

    images/SPLIT/SPLIT_N.zip    SPLIT_N.json and the pictures, or the same unpacked in images/SPLIT/SPLIT_N/

The list has a row a picture: image_path, prompt_id, prompt, rank (1 is best, ties allowed) and ratings. The
pictures of a prompt_id are one ranked list. They are read out of the archive, which need not be unpacked.

Source: zai-org/ImageRewardDB. Its loading script does the same; `datasets` 4 and later run none.
"""

import contextlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from dina_lrm.data.comparisons import Check, Comparison, Row, number, prompt_text
from dina_lrm.data.pairs import ImageSource, Reject
from dina_lrm.data.row import BadRow, FileRow, shown
from dina_lrm.data.rows import rows_of_file, rows_of_list

__all__ = ["count_part", "part_files", "read_part"]

MAX_PICTURE_BYTES = 1 << 28
"""Largest picture that is unpacked: an archive can claim any size."""

_BROKEN = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError)
"""What reading a damaged, encrypted or unusual archive raises."""

FindPicture = Callable[[Row, str], ImageSource | BadRow]
"""The picture that an image_path of a part names."""


def part_files(files: list[Path]) -> list[Path]:
    """The same without archives that lie beside their unpacked folder: a part counts once."""
    return [
        file
        for file in files
        if file.suffix != ".zip" or file.parent / file.stem / f"{file.stem}.json" not in files
    ]


def read_part(file: Path, *, name: str, root: Path, check: Check) -> Iterator[Comparison | Reject]:
    """Comparisons of a part: every two pictures of a prompt. A row that cannot be used costs its own picture.

    Args:
        file: SPLIT_N.zip, or SPLIT_N.json among its pictures.
        name: what comparisons and rejects call the file; `row` is that of the prompt's first picture.
        root: of relative paths.
    """
    with contextlib.ExitStack() as stack:
        try:
            rows, picture = stack.enter_context(_opened(file, root))
            groups, bad = _grouped(rows)
        except _BROKEN as error:
            yield Reject(row=0, reason=f"damaged file: {error}", file=name)
            return
        yield from (Reject(row=row, reason=reason, file=name) for row, reason in bad)
        for group in groups:
            index, values = group[0]
            row = Row(values, index, None, name, root, check)
            yield from row.read(partial(_ranked, group=[values for _, values in group], picture=picture))


def count_part(file: Path) -> int:
    """How many comparisons and rejects `read_part` gives, without unpacking pictures."""
    try:
        with _opened(file, file.parent) as (rows, _):
            groups, bad = _grouped(rows)
    except _BROKEN:
        return 1
    return len(bad) + sum(max(1, len(group) * (len(group) - 1) // 2) for group in groups)


@contextlib.contextmanager
def _opened(file: Path, root: Path) -> Iterator[tuple[Iterator[FileRow], FindPicture]]:
    if file.suffix != ".zip":
        beside = file.parent.relative_to(root)
        yield rows_of_file(file), lambda row, path: row.image(str(beside / _name(path)), "image_path")
        return
    with zipfile.ZipFile(file) as archive:
        members = {_name(member.filename): member for member in archive.infolist() if not member.is_dir()}
        if f"{file.stem}.json" not in members:
            raise zipfile.BadZipFile(f"it holds no {file.stem}.json")
        with archive.open(members[f"{file.stem}.json"]) as stream:
            yield rows_of_list(stream, file), partial(_unpacked, archive, members)


def _name(path: str) -> str:
    """The last part of an image_path: folders before it are those of the machine that made the list."""
    return PurePosixPath(path).name


def _unpacked(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], row: Row, path: str
) -> ImageSource | BadRow:
    member = members.get(_name(path))
    if member is None:
        return BadRow(f"missing file: image_path = {path} is not in {row.file}")
    if member.file_size > MAX_PICTURE_BYTES:
        return BadRow(f"unreadable image: {path} of {member.file_size} bytes, at most {MAX_PICTURE_BYTES}")
    try:
        content = archive.read(member)
    except _BROKEN as error:
        return BadRow(f"unreadable image: {path} ({error})")
    return row.image(content, "image_path") if content else BadRow(f"unreadable image: {path} is empty")


Group = list[tuple[int, Mapping[str, Any]]]
"""Rows of one prompt and their positions."""


def _grouped(rows: Iterator[FileRow]) -> tuple[list[Group], list[tuple[int, str]]]:
    """Rows by prompt, in the order of their first picture, and those that are none, with the reason."""
    groups: dict[tuple[str, str], Group] = {}
    bad: list[tuple[int, str]] = []
    for found in rows:
        try:
            if isinstance(found.values, BadRow):
                raise found.values
            values = found.values
            for field in ("image_path", "prompt_id"):
                if not isinstance(values.get(field), str):
                    raise BadRow(f"not text: {field} = {shown(values.get(field))}")
            prompt_text(values.get("prompt"))
            number(values.get("rank"), "rank")
        except BadRow as reason:
            bad.append((found.index, str(reason)))
        else:
            key = values["prompt_id"], values["prompt"]
            groups.setdefault(key, []).append((found.index, values))
    return list(groups.values()), bad


def _ranked(row: Row, group: list[Mapping[str, Any]], picture: FindPicture) -> Iterator[Comparison | Reject]:
    if len(group) < 2:
        raise BadRow(f"one picture: prompt_id {group[0]['prompt_id']} has nothing to compare it with")
    images = [picture(row, values["image_path"]) for values in group]
    ranks = [number(values["rank"], "rank") for values in group]
    yield from row.ranked(row.prompt(), images, ranks, source="imagerewarddb")
