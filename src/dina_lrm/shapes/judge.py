"""The gold judge: from the pixels alone, how well a picture fits its caption and how clean it is.

No learned model is involved. Objects are found by chroma (every background is a gray), named by hue, counted
as connected components, and classified by re-rendering each candidate shape at the component's centre and
area and comparing the coverage. Cleanness is how closely the picture resembles the ideal re-rendering of what
was read. The judge's `utility` is the true preference of the simulated raters, so experiments can tell a
better generator from a hacked reward.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from dina_lrm.shapes.geometry import CROSS_HALF_WIDTH, SQUARE_HALF_SIDE, TRIANGLE_HALF_BASE, coverage
from dina_lrm.shapes.render import render_array
from dina_lrm.shapes.scenes import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    RELATIONS,
    SHAPES,
    CaptionSpec,
    ObjectSpec,
    PlacedObject,
    Scene,
    parse_caption,
    relation_holds,
)

CHROMA_THRESHOLD = 30.0
"""Largest minus smallest colour value (of 255) from which a pixel belongs to an object; palette colours have
180 or more."""
MIN_AREA = 45
"""Pixels; smaller components are dirt, not objects. The smallest object of the grammar covers about 130."""
MIN_OVERLAP = 0.72
"""Intersection over union with the best-fitting shape below which a component has no recognisable shape."""
CLEANNESS_SCALE = 40.0
"""Residual (of 255) at which cleanness has fallen to 1/e."""
ALIGNMENT_WEIGHT = 0.7
"""Share of alignment in the utility; cleanness has the rest."""

_HUES = {name: np.arctan2(np.sqrt(3.0) * (g - b), 2.0 * r - g - b) for name, (r, g, b) in COLOURS.items()}
_AREA = {
    "circle": np.pi,
    "square": 4.0 * SQUARE_HALF_SIDE**2,
    "triangle": 2.0 * TRIANGLE_HALF_BASE,
    "cross": 8.0 * CROSS_HALF_WIDTH - 4.0 * CROSS_HALF_WIDTH**2,
}
"""Area of each shape in units of its squared radius."""
_CENTROID_BELOW = {"triangle": 1.0 / 3.0}
"""How far the centre of mass lies below the centre of the bounding box, in radii."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadObject:
    """One object as read from the pixels; `overlap` is the intersection over union with its best-fitting
    shape."""

    best_shape: str
    colour: str
    x: float
    y: float
    radius: float
    overlap: float

    @property
    def shape(self) -> str:
        """The best-fitting shape, or "unknown" when even that fits badly."""
        return self.best_shape if self.overlap >= MIN_OVERLAP else "unknown"

    def placed(self) -> PlacedObject:
        """The object as the renderer would draw it."""
        return PlacedObject(shape=self.best_shape, colour=self.colour, x=self.x, y=self.y, radius=self.radius)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a picture shows, whatever its caption."""

    objects: tuple[ReadObject, ...]
    background: str
    cleanness: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """The verdict on a picture for a caption.

    `facts` lists everything that the caption states and whether the picture shows it. `alignment` (weighted
    share of true facts), `cleanness` and `utility` are in [0, 1]; `full_match` means that every fact holds.
    """

    facts: dict[str, bool]
    alignment: float
    cleanness: float
    utility: float
    full_match: bool
    reading: Reading


def read_picture(image: Image.Image | np.ndarray) -> Reading:
    """Read objects, background and cleanness from an RGB picture of `CANVAS` x `CANVAS` pixels.

    Raises:
        ValueError: the picture has another size.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, dtype=float)
    if pixels.shape != (CANVAS, CANVAS, 3):
        raise ValueError(
            f"the judge reads {CANVAS}x{CANVAS} RGB pictures, not an array of shape {pixels.shape}"
        )
    smooth = ndimage.median_filter(pixels, size=(3, 3, 1), mode="nearest")
    chroma = smooth.max(axis=2) - smooth.min(axis=2)
    r, g, b = np.moveaxis(smooth, 2, 0)
    hue = np.arctan2(np.sqrt(3.0) * (g - b), 2.0 * r - g - b)
    distance = np.stack([np.abs(np.angle(np.exp(1j * (hue - value)))) for value in _HUES.values()])
    nearest = distance.argmin(axis=0)
    coloured = chroma > CHROMA_THRESHOLD
    plain = smooth[~coloured].mean(axis=1) if (~coloured).any() else smooth.mean(axis=2).ravel()
    gray = float(np.median(plain))
    background = min(BACKGROUNDS, key=lambda name: abs(BACKGROUNDS[name][0] - gray))
    objects = []
    for index, colour in enumerate(COLOURS):
        mask = coloured & (nearest == index)
        labels, count = cast("tuple[np.ndarray, int]", ndimage.label(mask))
        for label in range(1, count + 1):
            component = labels == label
            if component.sum() >= MIN_AREA:
                objects.append(_read_object(component, chroma, colour))
    reading = tuple(sorted(objects, key=lambda item: (item.x, item.y)))
    return Reading(objects=reading, background=background, cleanness=_cleanness(pixels, reading, background))


def _read_object(component: np.ndarray, chroma: np.ndarray, colour: str) -> ReadObject:
    """Classify one connected component by the shape whose coverage fits best."""
    near = ndimage.binary_dilation(component, iterations=2)
    full = np.quantile(chroma[component], 0.75)
    alpha = np.where(near, np.clip(chroma / max(full, 1.0), 0.0, 1.0), 0.0)
    area = alpha.sum()
    rows, columns = np.indices(alpha.shape)
    x, y = (alpha * columns).sum() / area, (alpha * rows).sum() / area
    fits = []
    for shape in SHAPES:
        radius = float(np.sqrt(area / _AREA[shape]))
        centre_y = float(y - _CENTROID_BELOW.get(shape, 0.0) * radius)
        ideal = coverage(shape, float(x), centre_y, radius)
        overlap = float(np.minimum(alpha, ideal).sum() / np.maximum(alpha, ideal).sum())
        fits.append(
            ReadObject(
                best_shape=shape, colour=colour, x=float(x), y=centre_y, radius=radius, overlap=overlap
            )
        )
    return max(fits, key=lambda item: item.overlap)


def _cleanness(pixels: np.ndarray, objects: tuple[ReadObject, ...], background: str) -> float:
    """Closeness to the ideal picture, a re-rendering of what was read: palette fidelity times sharpness.

    Palette fidelity is exp(-residual / CLEANNESS_SCALE); the residual is the mean of two root mean square
    errors, over the objects with a rim of two pixels and over the rest. Sharpness is the energy of the
    picture's gradients over the ideal picture's, at most 1: any blur lowers it.
    """
    ideal = render_array(
        Scene(objects=tuple(item.placed() for item in objects), background=background)
    ).astype(float)
    error = np.square(pixels - ideal).mean(axis=2)
    covered = np.zeros((CANVAS, CANVAS), dtype=bool)
    for item in objects:
        covered |= coverage(item.best_shape, item.x, item.y, item.radius) > 0
    around = np.asarray(ndimage.binary_dilation(covered, iterations=2), dtype=bool)
    if not around.any() or around.all():
        return float(np.exp(-np.sqrt(error.mean()) / CLEANNESS_SCALE))
    residual = 0.5 * (np.sqrt(error[around].mean()) + np.sqrt(error[~around].mean()))
    sharpness = min(1.0, _gradient_energy(pixels) / _gradient_energy(ideal))
    return float(np.exp(-residual / CLEANNESS_SCALE) * sharpness**0.5)


def _gradient_energy(pixels: np.ndarray) -> float:
    return float(np.square(np.diff(pixels, axis=0)).sum() + np.square(np.diff(pixels, axis=1)).sum())


def judge(image: Image.Image | np.ndarray, caption: str | CaptionSpec) -> Judgement:
    """Judge a picture against a caption of the grammar.

    Objects read from the picture are assigned one-to-one to the caption's so that most of the stated
    attributes hold. An object's facts weigh 3 together (colour, shape and, if stated, size, in equal parts);
    the background, the exact number of objects and the relation weigh 1, 1.5 and 2.

    Raises:
        ValueError: the caption is not of the grammar, or the picture is not `CANVAS` x `CANVAS`.
    """
    spec = parse_caption(caption) if isinstance(caption, str) else caption
    reading = read_picture(image)
    found = reading.objects
    truth = [[_attribute_facts(wanted, have) for have in found] for wanted in spec.objects]
    partner: dict[int, int] = {}
    if found:
        gain = np.array([[np.mean(list(facts.values())) for facts in row] for row in truth])
        partner = {
            int(i): int(j) for i, j in zip(*linear_sum_assignment(-gain), strict=True) if gain[i, j] > 0
        }
    facts: dict[str, bool] = {}
    weights: dict[str, float] = {}
    for index, wanted in enumerate(spec.objects):
        missing = dict.fromkeys(["colour", "shape"] + ["size"] * (wanted.size is not None), False)
        stated = truth[index][partner[index]] if index in partner else missing
        for name, holds in stated.items():
            facts[f"object {index + 1} {name}"] = holds
            weights[f"object {index + 1} {name}"] = 3.0 / len(stated)
    facts["background"], weights["background"] = reading.background == spec.background, 1.0
    facts["count"], weights["count"] = len(found) == len(spec.objects), 1.5
    if spec.relation is not None:
        assert spec.relation in RELATIONS
        both = 0 in partner and 1 in partner
        facts["relation"] = both and relation_holds(
            spec.relation,
            (found[partner[0]].x, found[partner[0]].y),
            (found[partner[1]].x, found[partner[1]].y),
            4.0,
        )
        weights["relation"] = 2.0
    alignment = sum(weights[name] * holds for name, holds in facts.items()) / sum(weights.values())
    return Judgement(
        facts=facts,
        alignment=alignment,
        cleanness=reading.cleanness,
        utility=ALIGNMENT_WEIGHT * alignment + (1.0 - ALIGNMENT_WEIGHT) * reading.cleanness,
        full_match=all(facts.values()),
        reading=reading,
    )


def _attribute_facts(wanted: ObjectSpec, have: ReadObject) -> dict[str, bool]:
    facts = {"colour": have.colour == wanted.colour, "shape": have.shape == wanted.shape}
    if wanted.size is not None:
        facts["size"] = have.placed().size == wanted.size
    return facts
