"""Preference rows: read from jsonl or parquet, expanded into pairs, with every bad row accounted for.

A row holds `prompt` and either `chosen`, `rejected` (a path, or bytes in parquet) or `images` + `ranks`
(1 is best, as in ImageReward and HPDv2); optionally `votes_chosen`, `votes_rejected`, `source`, `width`,
`height`. A row that cannot be used never stops a run and never vanishes: it is counted and listed with
its reason, and `num_rows` good and bad rows always add up.
"""

import hashlib
import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from dina_lrm.data.rows import BadRow, rows_of_file
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import written_aside
from dina_lrm.pictures import picture_file, upright_rgb

__all__ = [
    "ImageSource",
    "PairRows",
    "PreferencePair",
    "Reject",
    "StoredLatent",
    "image_name",
    "load_image",
    "read_pairs",
    "write_rejects",
]


@dataclass(frozen=True, slots=True)
class StoredLatent:
    """A picture that was encoded already: an array as `numpy.save` writes it, shifted and scaled."""

    content: bytes
    name: str = "latent"
    """Of the picture it was encoded from."""

    def array(self) -> np.ndarray:
        """(channel, height, width), floating.

        Raises:
            InvalidInputError: the bytes hold no such array, or one that is not finite.
        """
        try:
            latent = np.load(io.BytesIO(self.content), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
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

Check = Literal["none", "exists", "decode"]
"""How far a reader looks at images: not at all, whether they are there, whether they can be decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """One comparison: for `prompt`, raters preferred `chosen` to `rejected`."""

    prompt: str
    chosen: ImageSource
    rejected: ImageSource
    votes_chosen: int | float | None = None
    """Votes for `chosen`; may be fewer than for `rejected`, the share of votes is what is trained on."""
    votes_rejected: int | float | None = None
    """Votes for `rejected`."""
    source: str | None = None
    """Where the pair comes from: a data set or a subset, for accuracy by source."""
    width: int | None = None
    """Pixels, if the row says so; not used to resize."""
    height: int | None = None
    """Pixels, if the row says so; not used to resize."""

    @property
    def target(self) -> float:
        """Share of votes for `chosen`: 1 without votes, 0.5 when raters were split evenly.

        >>> PreferencePair(prompt="p", chosen=b"", rejected=b"", votes_chosen=12, votes_rejected=4).target
        0.75
        """
        if self.votes_chosen is None or self.votes_rejected is None:
            return 1.0
        return self.votes_chosen / (self.votes_chosen + self.votes_rejected)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """One row, or one pair of a row, that cannot be used, and why."""

    row: int
    """Position in the file, from 0."""
    reason: str
    """What is wrong, naming the field and its value."""
    prompt: str | None = None
    """The prompt, where it can be read."""
    file: str | None = None
    """The file of the row, where there may be several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRows:
    """What a file of rows held: the pairs, the rejects, and the number of rows read."""

    pairs: list[PreferencePair]
    rejects: list[Reject]
    num_rows: int

    def summary(self) -> str:
        """One line for a log: how many pairs, and rejects counted by the start of their reason."""
        line = f"{len(self.pairs)} pairs from {self.num_rows} rows"
        if self.rejects:
            counts = Counter(reject.reason.split(":")[0] for reject in self.rejects)
            line += f", {len(self.rejects)} rejected ("
            line += ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) + ")"
        return line


def read_pairs(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    check_images: bool = True,
    rejects_file: str | Path | None = None,
) -> PairRows:
    """Read preference rows from `path` (.jsonl, .json or .parquet).

    Args:
        path: the file of rows.
        image_root: folder that relative image paths start from; None is the folder of `path`.
        check_images: decode every image now, so that an unreadable one is a reject here and not later;
            False looks only whether files exist.
        rejects_file: where to list rejects as jsonl; written only when there are any.

    A row of `images` + `ranks` gives one pair for every two images of different rank; two images of the
    same rank are a reject, since nobody said which is better. Equal votes are kept: their target is 0.5.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of preference rows at {path}")
    root = Path(image_root) if image_root is not None else path.parent
    pairs: list[PreferencePair] = []
    rejects: list[Reject] = []
    num_rows = 0
    for row_index, row in enumerate(rows_of_file(path)):
        num_rows += 1
        prompt = row.get("prompt") if isinstance(row, Mapping) else None
        prompt = prompt if isinstance(prompt, str) else None
        try:
            if isinstance(row, BadRow):
                raise row
            found = pairs_of_row(row, root, "decode" if check_images else "exists")
        except BadRow as bad:
            rejects.append(Reject(row=row_index, reason=str(bad), prompt=prompt))
            continue
        pairs.extend(pair for pair, tie in found if tie is None)
        rejects.extend(
            Reject(row=row_index, reason=tie, prompt=prompt) for _, tie in found if tie is not None
        )
    if rejects_file is not None and rejects:
        write_rejects(rejects, rejects_file)
    return PairRows(pairs=pairs, rejects=rejects, num_rows=num_rows)


def write_rejects(rejects: Iterable[Reject], path: str | Path) -> None:
    """List rejects as jsonl: row, reason, prompt, file. The file appears whole or not at all."""
    with written_aside(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
        for reject in rejects:
            file.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")


def load_image(source: ImageSource) -> Image.Image:
    """Decode an image as scoring does (`pictures.upright_rgb`); whatever fails is an `InvalidInputError` that
    says what."""
    if isinstance(source, Image.Image):
        return upright_rgb(source)
    if isinstance(source, StoredLatent):
        raise InvalidInputError("no picture: this source holds latents")
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else picture_file(source)
    try:
        with Image.open(file) as image:
            return upright_rgb(image)
    except InvalidInputError as error:
        raise InvalidInputError(f"unreadable image: {name} ({error})") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(repr(file), name)  # a buffer's address differs from run to run
        raise InvalidInputError(f"unreadable image: {name} ({reason})") from error


def image_name(source: ImageSource) -> str:
    """What tells a picture from others: its path, or a digest where it is in memory.

    >>> image_name(Path("a.png")), image_name(b"a picture")
    ('a.png', 'blake2b:6d6f532c386533c4a121faffda65f7e1')
    """
    match source:
        case Path():
            return str(source)
        case StoredLatent():
            return source.name
        case bytes():
            content = source
        case _:
            content = f"{source.mode} {source.size} ".encode() + source.tobytes()
    return f"blake2b:{hashlib.blake2b(content, digest_size=16).hexdigest()}"


# --- one row -----------------------------------------------------------------------------------------------


def pairs_of_row(row: Mapping[str, Any], root: Path, check: Check) -> list[tuple[PreferencePair, str | None]]:
    """Every two pictures of a row; with the reason where they share a rank, so that nobody won."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRow(f"no prompt: {prompt!r}")
    common: dict[str, Any] = {
        "prompt": prompt,
        "source": row.get("source"),
        "width": _whole(row, "width"),
        "height": _whole(row, "height"),
    }
    is_pair = row.get("chosen") is not None or row.get("rejected") is not None
    is_group = row.get("images") is not None or row.get("ranks") is not None
    if is_pair == is_group:
        raise BadRow(
            "needs chosen and rejected, or images and ranks: has " + ("both" if is_pair else "neither")
        )
    if is_pair:
        chosen, rejected = (image_cell(row.get(side), side, root, check) for side in ("chosen", "rejected"))
        votes_chosen, votes_rejected = _votes(row)
        pair = PreferencePair(
            chosen=chosen,
            rejected=rejected,
            votes_chosen=votes_chosen,
            votes_rejected=votes_rejected,
            **common,
        )
        return [(pair, None)]

    images, ranks = row.get("images"), row.get("ranks")
    if not isinstance(images, Sequence) or not isinstance(ranks, Sequence) or len(images) != len(ranks):
        raise BadRow("images and ranks: need to be two lists of the same length")
    if len(images) < 2:
        raise BadRow(f"images: needs at least 2, has {len(images)}")
    numbers = [number(rank, f"ranks[{i}]") for i, rank in enumerate(ranks)]
    sources = [image_cell(image, f"images[{i}]", root, check) for i, image in enumerate(images)]
    pairs: list[tuple[PreferencePair, str | None]] = []
    for first, second in itertools.combinations(range(len(images)), 2):
        same = numbers[first] == numbers[second]
        tie = f"tie: images {first} and {second} share rank {numbers[first]:g}" if same else None
        better, worse = (first, second) if numbers[first] <= numbers[second] else (second, first)
        pairs.append((PreferencePair(chosen=sources[better], rejected=sources[worse], **common), tie))
    return pairs


def image_cell(cell: Any, field: str, root: Path, check: Check) -> ImageSource:
    """The picture that a cell of a row names or holds, looked at as far as `check` says."""
    if isinstance(cell, Mapping):  # the image cell of Hugging Face datasets
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell:
        path = Path(cell) if Path(cell).is_absolute() else root / cell
        if check != "none" and not path.is_file():
            raise BadRow(f"missing file: {field} = {cell}")
        source: ImageSource = path
    elif isinstance(cell, bytes) and cell:
        source = cell
    else:
        raise BadRow(f"no image: {field} is {'missing' if cell is None else type(cell).__name__}")
    if check == "decode":
        try:
            load_image(source)
        except InvalidInputError as error:
            raise BadRow(f"{error} in {field}") from error
    return source


def number(value: Any, field: str) -> float:
    """A finite number in a field of a row."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRow(f"not a number: {field} = {value!r}")
    return float(value)


def _whole(row: Mapping[str, Any], field: str) -> int | None:
    value = row.get(field)
    return None if value is None else int(number(value, field))


def _votes(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    given = [row.get(field) for field in ("votes_chosen", "votes_rejected")]
    if given == [None, None]:
        return None, None
    return checked_votes(*given)


def checked_votes(chosen: Any, rejected: Any) -> tuple[float, float]:
    """Votes for either side as a row states them."""
    votes = number(chosen, "votes_chosen"), number(rejected, "votes_rejected")
    if min(votes) < 0 or max(votes) == 0:
        raise BadRow(f"votes: {votes[0]:g} and {votes[1]:g} must be at least 0 and not both 0")
    return votes
