"""What is to be labelled: prompts with two or more pictures each, from a file of rows or a folder.

    rows     of any form of `data.rows`: `prompt` and `images` (a list), or `image_a` and `image_b`, or
             `chosen` and `rejected`; optional `source`. Pictures are paths beside the file, or bytes.
    folder   NAME.txt with the prompt, NAME.*.png (of any format) beside it, in any subfolder

Every two pictures of a row are a pair. Which picture is `a` and which is `b`, and the numbers that a browser
asks for pictures by, follow from digests of their names: neither tells which one a row calls chosen.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dina_lrm.data.comparisons import image_cell, prompt_text
from dina_lrm.data.pairs import ImageSource, Reject, image_name, reasons, same_picture
from dina_lrm.data.row import BadRow, FileRow, checked_row
from dina_lrm.data.rows import rows_of_file
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import file_fault, not_a_file

__all__ = ["Items", "LabelPair", "read_items"]


@dataclass(frozen=True, slots=True)
class LabelPair:
    """Two pictures for one prompt; `a` and `b` are positions in `Items.pictures`, and a < b."""

    prompt: str
    a: int
    b: int
    source: str | None = None
    """As the row states it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Items:
    """Pairs in the order of the file, and the pictures that they name."""

    path: Path
    """The file or folder."""
    pairs: list[LabelPair]
    pictures: list[ImageSource]
    rejects: list[Reject]
    """Rows that give no pair and pictures that are not there, and why."""
    fingerprint: str
    """Digest of prompts, names and sizes of pictures: votes belong to one such set of pairs."""


@dataclass(frozen=True, slots=True)
class _Row:
    prompt: str
    pictures: list[ImageSource]
    source: str | None


def read_items(path: str | Path) -> Items:
    """The pairs of a file of rows, or of a folder; pictures are looked for and not decoded.

    Pictures that lie in a table are held in memory.

    Raises:
        InvalidInputError: nothing is there, or no two pictures that could be compared.
    """
    path = Path(path)
    if not path.exists():
        raise InvalidInputError(f"no items to label: {not_a_file(path)}")
    root = path if path.is_dir() else path.parent
    rows: list[_Row] = []
    rejects: list[Reject] = []
    for file, found in _folder(path) if path.is_dir() else _file(path):
        prompt = found.values.get("prompt") if isinstance(found.values, Mapping) else None
        try:
            row, faults = _row(found.values, root)
            rows.append(row)
        except BadRow as bad:
            faults = [bad]
        prompt = prompt if isinstance(prompt, str) else None
        rejects += [
            Reject(row=found.index, line=found.line, reason=str(fault), prompt=prompt, file=file)
            for fault in faults
        ]
    pictures: dict[bytes, ImageSource] = {}
    for row in rows:
        pictures |= {_digest(picture, root): picture for picture in row.pictures}
    numbers = {digest: number for number, digest in enumerate(sorted(pictures))}
    pairs: dict[tuple[str, int, int], LabelPair] = {}
    for row in rows:
        found = sorted({numbers[_digest(picture, root)] for picture in row.pictures})
        for a, b in itertools.combinations(found, 2):
            pairs.setdefault((row.prompt, a, b), LabelPair(row.prompt, a, b, row.source))
    if not pairs:
        raise InvalidInputError(f"no pair to label in {path}{reasons(rejects)}")
    return Items(
        path=path,
        pairs=list(pairs.values()),
        pictures=[pictures[digest] for digest in sorted(pictures)],
        rejects=rejects,
        fingerprint=_fingerprint(list(pairs.values()), sorted(pictures)),
    )


def _row(values: Mapping[str, Any] | BadRow, root: Path) -> tuple[_Row, list[BadRow]]:
    """The row with the pictures that are there, and why others are not; at least two have to be."""
    if isinstance(values, BadRow):
        raise values
    prompt, source = prompt_text(values.get("prompt")), values.get("source")
    layouts = ("images",), ("image_a", "image_b"), ("chosen", "rejected")
    given = [names for names in layouts if any(values.get(name) is not None for name in names)]
    if len(given) != 1:
        found = " and ".join(names[0] for names in given) or "none of them"
        raise BadRow(f"needs images, or image_a and image_b, or chosen and rejected: has {found}")
    cells = {name: values.get(name) for name in given[0]}
    if "images" in cells:
        images = cells["images"]
        if not isinstance(images, list):
            raise BadRow(f"images: a list is expected, not {type(images).__name__}")
        cells = {f"images[{index}]": image for index, image in enumerate(images)}
    pictures: list[ImageSource] = []
    faults: list[BadRow] = []
    for name, cell in cells.items():
        try:
            pictures.append(image_cell(cell, name, root, "exists"))
        except BadRow as fault:
            faults.append(fault)
    if faults and len(pictures) < 2:
        raise faults[0]
    if len(pictures) < 2 or any(same_picture(*two) for two in itertools.combinations(pictures, 2)):
        raise BadRow(f"{' and '.join(given[0])}: at least 2 pictures, all different; has {len(pictures)}")
    return _Row(prompt, pictures, source if isinstance(source, str) else None), faults


def _file(path: Path) -> Iterator[tuple[str, FileRow]]:
    for found in rows_of_file(path):
        yield path.name, found


def _folder(root: Path) -> Iterator[tuple[str, FileRow]]:
    Image.init()
    beside: dict[Path, list[str]] = {}
    for index, file in enumerate(sorted(root.rglob("*.txt"))):
        if file.parent not in beside:
            names = sorted(place.name for place in file.parent.iterdir())
            beside[file.parent] = [name for name in names if Path(name).suffix.lower() in Image.EXTENSION]
        folder, name = file.parent.relative_to(root), image_name(file.relative_to(root))
        images = [str(folder / one) for one in beside[file.parent] if one.startswith(f"{file.stem}.")]
        try:
            if (fault := file_fault(file)) is not None:
                raise OSError(fault)
            prompt = file.read_text(encoding="utf-8-sig").strip()
            values = checked_row({"prompt": prompt, "images": images})
        except (OSError, UnicodeDecodeError) as error:
            values = BadRow(f"unreadable prompt: {error}")
        yield name, FileRow(index, None, values)


def _digest(picture: ImageSource, root: Path) -> bytes:
    """Digest of the name, which for a file is its place beside the rows and its size in bytes."""
    name = image_name(picture)
    if isinstance(picture, Path):
        inside = picture.relative_to(root) if picture.is_relative_to(root) else picture
        name = f"{inside.as_posix()} {picture.stat().st_size}"
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def _fingerprint(pairs: list[LabelPair], pictures: list[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        digest.update(hashlib.blake2b(pair.prompt.encode(), digest_size=16).digest())
        digest.update(pictures[pair.a] + pictures[pair.b])
    return digest.hexdigest()
