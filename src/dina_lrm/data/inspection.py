"""What is in a set of comparisons, and whether two sets share what they should not.

Both work on the stream of `data.sources`, in memory that grows with the number of distinct prompts and images
(eight bytes each), not with the pictures.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.pairs import ImageSource, Reject, image_size, load_image, row_place
from dina_lrm.data.split import fold_prompt
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import file_fault

__all__ = ["Audit", "Inspection", "Overlap", "audit", "inspect"]

PHASH_DISTANCE = 4
"""Bits of 64: pictures whose perceptual hashes differ in at most so many count as the same."""


@dataclass(kw_only=True)
class Inspection:
    """Counts over a stream of comparisons and rejects."""

    rows: int = 0
    prompts: int = 0
    """Distinct, as written."""
    strict_pairs: int = 0
    ties: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    """By the start of their reason."""
    pairs_with_votes: int = 0
    total_votes: float = 0.0
    unanimous: int = 0
    """Pairs with votes that all go one way."""
    pairs_with_confidence: int = 0
    confident: int = 0
    """Pairs among them of confidence 0.95 or more, which HPSv3 trains on."""
    repeated_pairs: int = 0
    """Comparisons of two pictures for a prompt that an earlier row compared already."""
    images: int = 0
    """Distinct: by path, or by content where they lie in the table."""
    shared_images: int = 0
    """Images that stand under more than one prompt."""
    missing_images: int | None = None
    """Files that are not there; None: not looked for."""
    unreadable_images: int | None = None
    resolutions: Counter[str] = field(default_factory=Counter)
    """WIDTHxHEIGHT of the images whose header was read."""
    first_of: dict[str, str] = field(default_factory=dict)
    """The first of each kind of reject, and of missing and unreadable images, with its place."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            name: dict(value.most_common()) if isinstance(value, Counter) else value
            for name, value in vars(self).items()
        }


def inspect(
    stream: Iterable[Comparison | Reject],
    *,
    look_at_images: bool = True,
    max_sizes: int = 10_000,
    on_row: Callable[[int], None] | None = None,
) -> Inspection:
    """Count.

    Args:
        stream: from `read_source(..., check_images="none")`: missing images then change no count but theirs.
        look_at_images: look whether files are there, and read headers.
        max_sizes: headers to read, of the first distinct images that are there.
        on_row: called with the number of rows done.
    """
    found = Inspection(missing_images=0, unreadable_images=0) if look_at_images else Inspection()
    rows: set[int] = set()
    prompts: set[int] = set()
    compared: set[int] = set()
    owner: dict[int, int] = {}  # image -> its first prompt, or 0 once it has two
    for item in stream:
        rows.add(_key(item.file or "", str(item.row)))
        if on_row is not None and len(rows) % 1000 == 0:
            on_row(len(rows))
        if isinstance(item, Reject):
            kind = item.reason.split(":")[0]
            found.rejects[kind] += 1
            found.first_of.setdefault(f"rejected: {kind}", f"{_place(item)}: {item.reason}")
            continue
        pair = item.pair
        prompt = _key(pair.prompt)
        prompts.add(prompt)
        if pair.tie:
            found.ties += 1
        else:
            found.strict_pairs += 1
        if pair.votes_chosen is not None and pair.votes_rejected is not None:
            found.pairs_with_votes += 1
            found.total_votes += pair.votes_chosen + pair.votes_rejected
            found.unanimous += pair.votes_chosen == 0 or pair.votes_rejected == 0
        if item.confidence is not None:
            found.pairs_with_confidence += 1
            found.confident += item.confidence >= 0.95
        sides = [_image_key(image) for image in (pair.chosen, pair.rejected)]
        both = hash((prompt, *sorted(sides)))
        found.repeated_pairs += both in compared
        compared.add(both)
        for key, image in zip(sides, (pair.chosen, pair.rejected), strict=True):
            if key not in owner:
                owner[key] = prompt
                if look_at_images and (fault := _look(image, found, max_sizes)) is not None:
                    kind, what = fault
                    found.first_of.setdefault(kind, f"{_place(item)}: {what}")
            elif owner[key] not in (0, prompt):
                owner[key] = 0
                found.shared_images += 1
    found.rows, found.prompts, found.images = len(rows), len(prompts), len(owner)
    return found


def _look(image: ImageSource, found: Inspection, max_sizes: int) -> tuple[str, str] | None:
    """Count an image; "missing images" or "unreadable images" and what is wrong, if something is."""
    assert found.missing_images is not None
    assert found.unreadable_images is not None
    fault = file_fault(image) if isinstance(image, Path) else None
    if fault == "is missing":
        found.missing_images += 1
        return "missing images", str(image)
    if fault is not None:
        found.unreadable_images += 1
        return "unreadable images", f"{image} {fault}"
    if found.resolutions.total() < max_sizes:
        try:
            height, width = image_size(image)
            found.resolutions[f"{width}x{height}"] += 1
        except InvalidInputError as error:
            found.unreadable_images += 1
            return "unreadable images", str(error)
    return None


def _place(item: Comparison | Reject) -> str:
    row = row_place(item.row, item.line)
    return f"{item.file}, {row}" if item.file else row


# --- audit -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """One thing of the tested set that the other set holds too."""

    kind: str
    """"prompt", "file" or "picture"."""
    tested: str
    other: str
    distance: int = 0
    """Bits in which the perceptual hashes differ; pictures only."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What the tested set shares with another one, and how its sides are distributed."""

    prompts: int
    """Prompts of the tested set."""
    shared_prompts: int
    """After folding case, spaces and punctuation."""
    images: int
    """Readable images of the tested set."""
    shared_files: int | None
    """Images with the same bytes in the other set; None: images were not looked at."""
    shared_pictures: int | None
    """Images whose perceptual hash is within `PHASH_DISTANCE` bits of one there: same files included."""
    pairs: int
    tainted_pairs: int
    """Comparisons of the tested set whose prompt or either image is shared."""
    unreadable_images: int
    chosen_first: int | None
    """Strict pairs in which the chosen side stood first; None where the layout keeps no positions."""
    positioned_pairs: int
    overlaps: tuple[Overlap, ...]

    @property
    def position_bias(self) -> tuple[float, float, float] | None:
        """Share of strict pairs won by the first side, and its 95 % interval (Wilson)."""
        if self.chosen_first is None or self.positioned_pairs == 0:
            return None
        from scipy.stats import binomtest  # here, since scipy is slow to load

        test = binomtest(self.chosen_first, self.positioned_pairs)
        low, high = test.proportion_ci(method="wilson")
        return self.chosen_first / self.positioned_pairs, float(low), float(high)


@dataclass
class _Fingerprints:
    prompts: dict[str, str]
    files: dict[bytes, str]
    pictures: dict[str, int]
    unreadable: int


def audit(
    tested: Iterable[Comparison | Reject],
    other: Iterable[Comparison | Reject],
    *,
    look_at_images: bool = True,
    on_image: Callable[[int], None] | None = None,
) -> Audit:
    """Does `tested` share prompts or pictures with `other`, which a model may have been trained on?

    Args:
        tested, other: streams of `read_source(..., check_images="none")`; rejects are left aside.
        look_at_images: hash files and pictures too; otherwise only prompts are compared.
        on_image: called with the number of images hashed.
    """
    comparisons = [item for item in tested if isinstance(item, Comparison)]
    if not comparisons:
        raise InvalidInputError("there are no comparisons to audit")
    done = _counter(on_image)
    own = _fingerprints(comparisons, look_at_images, done)
    theirs = _fingerprints((item for item in other if isinstance(item, Comparison)), look_at_images, done)
    overlaps = [
        Overlap(kind="prompt", tested=own.prompts[key], other=theirs.prompts[key])
        for key in own.prompts.keys() & theirs.prompts.keys()
    ]
    same_files = [
        Overlap(kind="file", tested=own.files[key], other=theirs.files[key])
        for key in own.files.keys() & theirs.files.keys()
    ]
    near = list(_near(own.pictures, theirs.pictures))
    tainted_prompts = {fold_prompt(overlap.tested) for overlap in overlaps}
    tainted_images = {overlap.tested for overlap in (*same_files, *near)}
    strict = [item for item in comparisons if not item.pair.tie and item.chosen_was_first is not None]
    return Audit(
        prompts=len(own.prompts),
        shared_prompts=len(overlaps),
        images=len(own.pictures),
        shared_files=len(same_files) if look_at_images else None,
        shared_pictures=len({overlap.tested for overlap in near}) if look_at_images else None,
        pairs=len(comparisons),
        tainted_pairs=sum(
            fold_prompt(item.pair.prompt) in tainted_prompts
            or bool({_name(item.pair.chosen), _name(item.pair.rejected)} & tainted_images)
            for item in comparisons
        ),
        unreadable_images=own.unreadable + theirs.unreadable,
        chosen_first=sum(bool(item.chosen_was_first) for item in strict) if strict else None,
        positioned_pairs=len(strict),
        overlaps=tuple(
            sorted((*overlaps, *same_files, *near), key=lambda found: (found.kind, found.tested, found.other))
        ),
    )


def _fingerprints(
    comparisons: Iterable[Comparison], look_at_images: bool, done: Callable[[], None]
) -> _Fingerprints:
    """Folded prompts, digests of files, and perceptual hashes of pictures, each with a name."""
    found = _Fingerprints({}, {}, {}, 0)
    seen: set[int] = set()
    for item in comparisons:
        found.prompts.setdefault(fold_prompt(item.pair.prompt), item.pair.prompt)
        if not look_at_images:
            continue
        for image in (item.pair.chosen, item.pair.rejected):
            key = _image_key(image)
            if key in seen:
                continue
            seen.add(key)
            done()
            try:
                found.pictures[_name(image)] = _perceptual_hash(image)
                content = image.read_bytes() if isinstance(image, Path) else image
                if isinstance(content, bytes):
                    found.files.setdefault(hashlib.sha256(content).digest(), _name(image))
            except (OSError, InvalidInputError):
                found.unreadable += 1
    return found


def _perceptual_hash(image: ImageSource) -> int:
    """64 bits of the picture's low frequencies (pHash), equal for re-encoded and resized copies."""
    import imagehash

    return int(str(imagehash.phash(load_image(image))), 16)


def _near(tested: dict[str, int], other: dict[str, int]) -> Iterator[Overlap]:
    """The nearest picture of the other set for each tested one that has one near enough."""
    names = list(other)
    table = np.array([other[name] for name in names], dtype=np.uint64)
    if not len(table):
        return
    for name, value in tested.items():
        distances = np.bitwise_count(table ^ np.uint64(value))
        nearest = int(distances.argmin())
        if distances[nearest] <= PHASH_DISTANCE:
            yield Overlap(kind="picture", tested=name, other=names[nearest], distance=int(distances[nearest]))


def _counter(on_image: Callable[[int], None] | None) -> Callable[[], None]:
    count = 0

    def done() -> None:
        nonlocal count
        count += 1
        if on_image is not None:
            on_image(count)

    return done


def _name(image: ImageSource) -> str:
    if isinstance(image, Path):
        return str(image)
    return f"{len(image)} bytes {_image_key(image):016x}" if isinstance(image, bytes) else repr(image)


def _image_key(image: ImageSource) -> int:
    if isinstance(image, bytes):
        return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest())
    return _key(str(image))


def _key(*parts: str) -> int:
    content = "\0".join(parts).encode(errors="surrogatepass")  # a file's name need not be UTF-8
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
