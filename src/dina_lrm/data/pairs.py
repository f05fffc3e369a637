"""A preference pair, its pictures, and what is told of a row or pair that cannot be used."""

import contextlib
import filecmp
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from dina_lrm.errors import InvalidInputError
from dina_lrm.files import atomic_path, file_fault
from dina_lrm.images import picture_file, upright_rgb

__all__ = [
    "ImageSource",
    "PreferencePair",
    "Reject",
    "StoredLatent",
    "image_name",
    "image_size",
    "load_image",
    "reasons",
    "row_place",
    "same_picture",
    "write_rejects",
]


@dataclass(frozen=True, slots=True)
class StoredLatent:
    """A picture that was encoded already: an array as `numpy.save` writes it, shifted and scaled."""

    content: bytes
    name: str = "latent"
    """Name of the picture it was encoded from."""

    def array(self) -> np.ndarray:
        """(channel, height, width), floating.

        Raises:
            InvalidInputError: the bytes hold no such array, or one that is not finite.
        """
        try:
            latent = np.lib.format.read_array(io.BytesIO(self.content), allow_pickle=False)
        except Exception as error:  # the header is parsed as Python, and fails in as many ways
            raise InvalidInputError(f"unreadable latent: {len(self.content)} bytes ({error})") from error
        if latent.ndim == 4 and len(latent) == 1:
            latent = latent[0]
        if latent.ndim not in (3, 4) or latent.dtype.kind != "f":
            raise InvalidInputError(f"unreadable latent: shape {latent.shape}, dtype {latent.dtype}")
        if not np.isfinite(latent).all():
            raise InvalidInputError("latent is not finite")
        return latent


ImageSource = Path | Image.Image | bytes | StoredLatent
"""An image that is on disk, in memory, in a table cell, or encoded already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """One comparison: for `prompt`, raters preferred `chosen` to `rejected`."""

    prompt: str
    chosen: ImageSource
    rejected: ImageSource
    votes_chosen: int | float | None = None
    """Votes for `chosen`. Whatever reads rows exchanges the sides where `rejected` has more."""
    votes_rejected: int | float | None = None
    """Votes for `rejected`."""
    tie: bool = False
    """Nobody won: as the data set says, or since the votes are even. Which side is called `chosen` means
    nothing then."""
    source: str | None = None
    """Where the pair comes from: a data set or a subset, for accuracy by source."""
    width: int | None = None
    """Pixels, if the row says so; not used to resize."""
    height: int | None = None
    """Pixels, if the row says so; not used to resize."""

    def __post_init__(self) -> None:
        if self.votes_chosen is not None and self.votes_chosen == self.votes_rejected:
            object.__setattr__(self, "tie", True)

    @property
    def target(self) -> float:
        """Share of votes for `chosen`: 1 without votes, 0.5 for a tie.

        >>> PreferencePair(prompt="p", chosen=b"", rejected=b"", votes_chosen=12, votes_rejected=4).target
        0.75
        """
        if self.tie:
            return 0.5
        if self.votes_chosen is None or self.votes_rejected is None:
            return 1.0
        return self.votes_chosen / (self.votes_chosen + self.votes_rejected)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """One row, or one pair of a row, that cannot be used, and why."""

    row: int
    """Position of the row in the file, from 0: empty lines and a header are not counted."""
    reason: str
    """What is wrong, naming the field and its value."""
    line: int | None = None
    """Where the row begins in the file, from 1, as an editor counts; None where the form has no lines."""
    prompt: str | None = None
    """The prompt, where it can be read."""
    file: str | None = None
    """The file of the row, where there may be several."""


def write_rejects(rejects: Iterable[Reject], path: str | Path) -> None:
    """List rejects as jsonl: row, reason, line, prompt, file. The file appears whole or not at all."""
    # Half of a character, as a file's name may hold, becomes the escape that JSON has for it.
    escape = "backslashreplace"
    with atomic_path(Path(path)) as partial, partial.open("w", encoding="utf-8", errors=escape) as file:
        for reject in rejects:
            file.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")


def reasons(rejects: Iterable[Reject]) -> str:
    """How many there are of each kind, and the first one, to follow a sentence; nothing where there are none.

    >>> reasons([Reject(row=0, reason="tie: nobody won"), Reject(row=1, reason="tie: nobody won")])
    ': 2 tie; first: row 0, tie: nobody won'
    """
    listed = list(rejects)
    if not listed:
        return ""
    counts = Counter(reject.reason.split(":")[0] for reject in listed)
    where = row_place(listed[0].row, listed[0].line)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return f": {kinds}; first: {where}, {listed[0].reason}"


def row_place(row: int, line: int | None) -> str:
    """Where a row stands, as a message says it: the line of an editor where its file has lines."""
    return f"row {row}" if line is None else f"line {line}"


def load_image(source: ImageSource) -> Image.Image:
    """Decode an image as scoring does (`upright_rgb`); whatever fails is an `InvalidInputError` that
    says what."""
    with _opened(source) as image:
        return upright_rgb(image)


_QUARTER_TURNS = (5, 6, 7, 8)
"""Orientations of EXIF that exchange height and width."""


def image_size(source: ImageSource) -> tuple[int, int]:
    """Height and width as a viewer shows it, from the header alone.

    Raises:
        InvalidInputError: no picture, or none that can be read.
    """
    with _opened(source) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in _QUARTER_TURNS
        return (image.width, image.height) if turned else (image.height, image.width)


@contextlib.contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """The picture, to be decoded within the block; what fails there is an error that names it."""
    if isinstance(source, Image.Image):
        yield source
        return
    if isinstance(source, StoredLatent):
        raise InvalidInputError("no picture: this source holds latents")
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else picture_file(source)
    try:
        with Image.open(file) as image:
            yield image
    except Exception as error:  # a decoder of a damaged file raises whatever it stumbles over
        reason = str(error).replace(repr(file), name)  # a buffer's address differs from run to run
        raise InvalidInputError(f"unreadable image: {name} ({reason})") from error


def same_picture(one: ImageSource, other: ImageSource, *, look: bool = True) -> bool:
    """Whether two sources are one picture: a path that leads to one file, or the same bytes.

    Args:
        look: compare the content of files too; read only where they are of one size.
    """
    if isinstance(one, Path) and isinstance(other, Path):
        if os.path.normpath(one) == os.path.normpath(other):
            return True
        if not look or file_fault(one) is not None or file_fault(other) is not None:
            return False
        try:
            return filecmp.cmp(one, other, shallow=False)
        except OSError:
            return False  # whoever decodes it says why
    if isinstance(one, StoredLatent) and isinstance(other, StoredLatent):
        return one.content == other.content
    return one is other or (isinstance(one, bytes) and one == other)


def image_name(source: ImageSource) -> str:
    """What tells a picture from others: its path, or a digest where it is in memory.

    >>> image_name(Path("a.png")), image_name(b"a picture")
    ('a.png', 'blake2b:6d6f532c386533c4a121faffda65f7e1')
    """
    match source:
        case Path():
            return str(source).encode(errors="backslashreplace").decode()  # a name need not be UTF-8
        case StoredLatent():
            return source.name
        case bytes():
            content = source
        case _:
            content = f"{source.mode} {source.size} ".encode() + source.tobytes()
    return f"blake2b:{hashlib.blake2b(content, digest_size=16).hexdigest()}"
