"""The four shapes as sets of points, and how much of each pixel of the canvas they cover."""

import numpy as np

CANVAS = 64
"""Height and width of a picture in pixels."""
SHAPES = ("circle", "square", "triangle", "cross")
SUPERSAMPLING = 4

TRIANGLE_HALF_BASE = 1.15
"""Half the triangle's base in units of its radius; its height is two radii."""
SQUARE_HALF_SIDE = 0.9
CROSS_HALF_WIDTH = 0.36
"""Half the width of a cross's bars in units of its radius."""


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points (x right, y down, in units of the radius, origin at the centre) lie inside the shape."""
    match shape:
        case "circle":
            return x * x + y * y <= 1.0
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) <= SQUARE_HALF_SIDE
        case "triangle":
            return (y <= 1.0) & (np.abs(x) <= TRIANGLE_HALF_BASE * (y + 1.0) / 2.0)
        case "cross":
            narrow, wide = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
            return (narrow <= CROSS_HALF_WIDTH) & (wide <= 1.0)
    raise ValueError(f"unknown shape {shape!r}")


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Share of each pixel that a shape covers: float64 (CANVAS, CANVAS) in [0, 1].

    It is counted over `SUPERSAMPLING`^2 sub-pixel centres, so edges are smooth and lie right to 1/8 of a
    pixel.
    """
    left, right = _pixel_range(x, radius)
    top, bottom = _pixel_range(y, radius)
    across = (_sub_pixel_centres(left, right) - x) / radius
    down = (_sub_pixel_centres(top, bottom) - y) / radius
    inside = _inside(shape, across[None, :], down[:, None])
    share = inside.reshape(bottom - top, SUPERSAMPLING, right - left, SUPERSAMPLING).mean(axis=(1, 3))
    picture = np.zeros((CANVAS, CANVAS))
    picture[top:bottom, left:right] = share
    return picture


def _pixel_range(centre: float, radius: float) -> tuple[int, int]:
    """First and last-plus-one pixel that an object of this centre and radius can touch, inside the canvas."""
    reach = 1.2 * radius + 1.0
    first, last = int(np.clip(centre - reach, 0, CANVAS - 1)), int(np.clip(centre + reach + 1, 1, CANVAS))
    return first, max(last, first + 1)


def _sub_pixel_centres(first: int, last: int) -> np.ndarray:
    return first - 0.5 + (np.arange((last - first) * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
