"""Scenes of coloured shapes, and the grammar that turns them into captions and back.

A caption is the *specification* of a picture; a scene is one concrete layout that satisfies it. The grammar
is regular and unambiguous, so `parse_caption(spec.caption) == spec` for every specification, and the judge
can check a picture against it. In the tradition of ShapeWorld (arXiv:1704.04517) and CLEVR
(arXiv:1612.06890).

    caption  := objects " on a " background " background"
    objects  := object | object relation object | object " and " object | object " , " object " and " object
    object   := ("a" | "an") [size] colour shape

Positions are in pixels of a `CANVAS` x `CANVAS` picture, x to the right and y down, at pixel centres.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dina_lrm.shapes.geometry import CANVAS, SHAPES, coverage

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 60, 225),
    "yellow": (245, 215, 20),
    "purple": (150, 40, 190),
    "cyan": (40, 205, 225),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (16, 16, 16),
}
SIZES: dict[str, tuple[float, float]] = {"small": (7.5, 9.0), "big": (12.0, 14.0)}
"""Range of the radius in pixels (half the height of the shape's bounding box) for each size word."""
SIZE_BOUNDARY = 10.5
"""Radius in pixels that separates small from big for the judge: the middle of the gap between the two
ranges."""
Part = Literal["train", "validation", "test"]
RELATIONS = ("to the left of", "to the right of", "above", "below")
RELATION_MARGIN = 14.0
"""Centres differ by at least this many pixels along the axis of a stated relation."""
GAP = 2.0
"""Least distance in pixels between two objects' bounding circles, and to the border of the canvas."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectSpec:
    """What a caption says of one object; `size` is None when the caption leaves it open."""

    shape: str
    colour: str
    size: str | None = None

    def phrase(self) -> str:
        words = [word for word in (self.size, self.colour, self.shape) if word is not None]
        return f"a {' '.join(words)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionSpec:
    """The content of a caption: one to three objects, a background, and for two objects perhaps a
    relation."""

    objects: tuple[ObjectSpec, ...]
    background: str
    relation: str | None = None

    @property
    def caption(self) -> str:
        """The one caption that says this."""
        phrases = [item.phrase() for item in self.objects]
        if len(phrases) == 1:
            body = phrases[0]
        elif len(phrases) == 2:
            body = f" {self.relation or 'and'} ".join(phrases)
        else:
            body = f"{phrases[0]} , {phrases[1]} and {phrases[2]}"
        return f"{body} on a {self.background} background"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedObject:
    """One object of a scene; `radius` is half its bounding box's height in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def size(self) -> str:
        return "small" if self.radius < SIZE_BOUNDARY else "big"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A concrete layout: what the renderer draws."""

    objects: tuple[PlacedObject, ...]
    background: str


_OBJECT = (
    rf"an? (?:(?P<size>{'|'.join(SIZES)}) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
)
_CAPTION = re.compile(rf"(?P<objects>.+) on an? (?P<background>{'|'.join(BACKGROUNDS)}) background")
_JOIN = re.compile(rf" (?P<relation>{'|'.join(RELATIONS)}) | and | ?, ")


def parse_caption(caption: str) -> CaptionSpec:
    """Read a caption of the grammar back into its specification.

    Case, surrounding white space, a final full stop and the space before a comma do not matter.

    Raises:
        ValueError: the caption is not one of the grammar; the message shows an example.

    >>> parse_caption("a small red circle above a blue square on a gray background").relation
    'above'
    """
    text = " ".join(caption.lower().strip().rstrip(".").split())
    problem = (
        f"{caption!r} is not a caption of the shapes grammar, such as "
        "'a small red circle above a blue square on a gray background'"
    )
    outer = _CAPTION.fullmatch(text)
    if outer is None:
        raise ValueError(problem)
    body = outer["objects"]
    relations = [match["relation"] for match in _JOIN.finditer(body)]
    phrases = re.split(_JOIN.pattern.replace("(?P<relation>", "(?:"), body)
    matches = [re.fullmatch(_OBJECT, phrase) for phrase in phrases]
    if not 1 <= len(phrases) <= 3 or any(match is None for match in matches):
        raise ValueError(problem)
    stated = [relation for relation in relations if relation is not None]
    if stated and len(phrases) != 2:
        raise ValueError(problem)
    objects = tuple(
        ObjectSpec(shape=match["shape"], colour=match["colour"], size=match["size"])
        for match in matches
        if match
    )
    return CaptionSpec(
        objects=objects, background=outer["background"], relation=stated[0] if stated else None
    )


def caption_part(spec: CaptionSpec) -> Part:
    """Which part of all captions this one belongs to, by its digest: one in five is kept for tests, one in
    ten for validation, and training sees neither."""
    place = hashlib.blake2b(spec.caption.encode(), digest_size=8).digest()[0] % 10
    return "test" if place < 2 else "validation" if place < 3 else "train"


def vocabulary() -> list[str]:
    """Every word and mark a caption can hold, sorted; well under 100."""
    words = {"a", "an", "and", ",", "on", "background", "to", "the", "left", "right", "of", "above", "below"}
    return sorted(words | set(SHAPES) | set(COLOURS) | set(BACKGROUNDS) | set(SIZES))


def sample_caption(rng: np.random.Generator, *, num_objects: int | None = None) -> CaptionSpec:
    """Draw a caption: one, two or three objects (probabilities 0.4, 0.4, 0.2 unless `num_objects` is given).

    Objects of one caption differ in colour, so that each can be found by its colour. Sizes are stated half of
    the time for one and two objects and never for three; two objects have a relation four times out of five.
    """
    count = num_objects or int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))
    colours = rng.permutation(list(COLOURS))[:count]
    objects = tuple(
        ObjectSpec(
            shape=str(rng.choice(SHAPES)),
            colour=str(colour),
            size=str(rng.choice(list(SIZES))) if count < 3 and rng.random() < 0.5 else None,
        )
        for colour in colours
    )
    relation = str(rng.choice(RELATIONS)) if count == 2 and rng.random() < 0.8 else None
    return CaptionSpec(objects=objects, background=str(rng.choice(list(BACKGROUNDS))), relation=relation)


def relation_holds(
    relation: str, first: tuple[float, float], second: tuple[float, float], margin: float = 0.0
) -> bool:
    """Whether centre `first` (x, y) stands in `relation` to centre `second`, by more than `margin` pixels."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    return {"to the left of": -dx, "to the right of": dx, "above": -dy, "below": dy}[relation] > margin


def sample_scene(rng: np.random.Generator, spec: CaptionSpec) -> Scene:
    """Draw a layout that satisfies `spec`, uniformly by rejection: no overlap, all objects wholly on the
    canvas."""
    for _ in range(20_000):
        placed: list[PlacedObject] = []
        for item in spec.objects:
            size = item.size or ("small" if len(spec.objects) == 3 or rng.random() < 0.5 else "big")
            radius = float(rng.uniform(*SIZES[size]))
            x, y = rng.uniform(radius + GAP, CANVAS - radius - GAP, size=2)
            placed.append(
                PlacedObject(shape=item.shape, colour=item.colour, x=float(x), y=float(y), radius=radius)
            )
        if spec.relation is not None and not relation_holds(
            spec.relation, (placed[0].x, placed[0].y), (placed[1].x, placed[1].y), RELATION_MARGIN
        ):
            continue
        if all(_apart(a, b) for i, a in enumerate(placed) for b in placed[:i]) and _disjoint(placed):
            return Scene(objects=tuple(placed), background=spec.background)
    raise RuntimeError(f"no layout found for {spec.caption!r}")


def _apart(a: PlacedObject, b: PlacedObject) -> bool:
    """A quick test that rules out most overlaps: bounding circles, corners not counted."""
    return float(np.hypot(a.x - b.x, a.y - b.y)) > 1.05 * (a.radius + b.radius) + GAP


def _disjoint(placed: list[PlacedObject]) -> bool:
    """Whether no two objects touch, each grown by half of `GAP`."""
    grown = [coverage(item.shape, item.x, item.y, item.radius + GAP / 2) > 0 for item in placed]
    return not (np.sum(grown, axis=0) > 1).any()


def change_attribute(rng: np.random.Generator, spec: CaptionSpec) -> CaptionSpec:
    """A specification that differs from `spec` in one thing that `spec` states.

    That thing is drawn among an object's shape, colour or stated size, the relation, the number of objects
    and the background. Rendering the result gives a picture that is wrong for `spec` in that one respect.
    """
    kinds = ["shape", "colour", "background", "count"]
    kinds += ["size"] if any(item.size for item in spec.objects) else []
    kinds += ["relation"] * 2 if spec.relation else []
    kind = str(rng.choice(kinds))
    objects = list(spec.objects)
    index = int(rng.integers(len(objects)))
    if kind == "relation":
        opposite = (
            RELATIONS.index(spec.relation or "above") ^ 1
        )  # left and right, above and below are neighbours
        return replace(spec, relation=RELATIONS[opposite])
    if kind == "background":
        return replace(spec, background=_other(rng, tuple(BACKGROUNDS), spec.background))
    if kind == "count":
        if len(objects) == 1 or (len(objects) == 2 and rng.random() < 0.5):
            unused = [colour for colour in COLOURS if colour not in {item.colour for item in objects}]
            objects = [replace(item, size=item.size or "small") for item in objects]
            objects.append(
                ObjectSpec(shape=str(rng.choice(SHAPES)), colour=str(rng.choice(unused)), size="small")
            )
            return CaptionSpec(objects=tuple(objects), background=spec.background, relation=None)
        del objects[index]
        return CaptionSpec(objects=tuple(objects), background=spec.background)
    if kind == "size":
        index = int(rng.choice([i for i, item in enumerate(objects) if item.size]))
        objects[index] = replace(objects[index], size=_other(rng, tuple(SIZES), objects[index].size or ""))
    elif kind == "shape":
        objects[index] = replace(objects[index], shape=_other(rng, SHAPES, objects[index].shape))
    else:
        used = {item.colour for item in objects}
        objects[index] = replace(
            objects[index], colour=str(rng.choice([c for c in COLOURS if c not in used]))
        )
    return replace(spec, objects=tuple(objects))


def _other(rng: np.random.Generator, values: tuple[str, ...], value: str) -> str:
    return str(rng.choice([candidate for candidate in values if candidate != value]))
