"""Many ways to damage a picture, for training pairs from which a reward is to learn what damage is.

None is a damage of the test set `build.unseen.DAMAGE` (JPEG blocks, large pixels, stripes, a tint), and none
draws scenes in another style, so both of these test sets stay unseen by a reward trained on these.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

from dina_lrm.shapes.render import CORRUPTIONS

__all__ = ["VARIED", "damage"]

Damage = Callable[[Image.Image, float, np.random.Generator], Image.Image]
_Pixels = np.ndarray


def damage(image: Image.Image, rng: np.random.Generator, *, most: int = 3) -> Image.Image:
    """One to `most` different damages of `VARIED` in a row, each to a random degree."""
    for name in rng.choice(list(VARIED), size=int(rng.integers(1, most + 1)), replace=False):
        image = VARIED[str(name)](image, float(rng.uniform(0.05, 1.0)), rng)
    return image


def _on_pixels(change: Callable[[_Pixels, float, np.random.Generator], _Pixels]) -> Damage:
    """From a function of (height, width, 3) values of 0 to 255."""

    def changed(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
        pixels = change(np.asarray(image, dtype=float), strength, rng)
        return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))

    return changed


def _motion(pixels: _Pixels, strength: float, rng: np.random.Generator) -> _Pixels:
    """Blur along a line; strength 1 is 9 pixels long."""
    angle, length = rng.uniform(0, np.pi), 9.0 * strength
    offsets = np.linspace(-0.5, 0.5, 7) * length
    shifts = [(np.sin(angle) * offset, np.cos(angle) * offset, 0.0) for offset in offsets]
    return np.mean([ndimage.shift(pixels, shift, order=1, mode="nearest") for shift in shifts], axis=0)


def _ghost(pixels: _Pixels, strength: float, rng: np.random.Generator) -> _Pixels:
    """A faint second copy, up to 6 pixels away; strength 1 is half of the picture."""
    shift = (*rng.integers(-6, 7, size=2).tolist(), 0)
    return pixels + 0.5 * strength * (ndimage.shift(pixels, shift, order=0, mode="nearest") - pixels)


def _warp(pixels: _Pixels, strength: float, rng: np.random.Generator) -> _Pixels:
    """Smooth random displacement; strength 1 has a standard deviation of 3 pixels."""
    smoothness = rng.uniform(2.5, 8.0)
    rows, columns = np.indices(pixels.shape[:2]).astype(float)
    field = ndimage.gaussian_filter(rng.standard_normal((2, *rows.shape)), (0, smoothness, smoothness))
    field *= 3.0 * strength / field.std()
    where = np.stack([rows + field[0], columns + field[1]])
    return np.stack(
        [
            ndimage.map_coordinates(pixels[..., channel], where, order=1, mode="nearest")
            for channel in range(3)
        ],
        axis=2,
    )


def _blotches(pixels: _Pixels, strength: float, rng: np.random.Generator) -> _Pixels:
    """Smooth coloured noise; strength 1 has a standard deviation of 45."""
    smoothness = rng.uniform(1.0, 10.0)
    noise = ndimage.gaussian_filter(rng.standard_normal(pixels.shape), (smoothness, smoothness, 0))
    if rng.random() < 0.5:
        noise[:] = noise[..., :1]
    return pixels + 45.0 * strength * noise / noise.std()


def _dead_pixels(pixels: _Pixels, strength: float, rng: np.random.Generator) -> _Pixels:
    """Pixels of any colour; strength 1 replaces 15 %."""
    dead = rng.random(pixels.shape[:2]) < 0.15 * strength
    return np.where(dead[..., None], rng.uniform(0, 255, size=pixels.shape), pixels)


def _patches(pixels: _Pixels, strength: float, rng: np.random.Generator) -> _Pixels:
    """One to five rectangles, of one colour or of another place of the picture; strength 1 is up to 20 pixels
    wide."""
    pixels = pixels.copy()
    size = pixels.shape[0]
    for _ in range(int(rng.integers(1, 6))):
        height, width = (max(2, round(float(side) * 20 * strength)) for side in rng.uniform(0.2, 1.0, size=2))
        (top, from_top), (left, from_left) = (
            rng.integers(size - height + 1, size=2),
            rng.integers(size - width + 1, size=2),
        )
        if rng.random() < 0.5:
            patch: _Pixels = rng.uniform(0, 255, size=3)
        else:
            patch = pixels[from_top : from_top + height, from_left : from_left + width].copy()
        pixels[top : top + height, left : left + width] = patch
    return pixels


def _scratches(pixels: _Pixels, strength: float, rng: np.random.Generator) -> _Pixels:
    """One to eight straight lines at any angle; strength 1 covers what is under them."""
    rows, columns = np.indices(pixels.shape[:2])
    for _ in range(int(rng.integers(1, 9))):
        angle, width = rng.uniform(0, np.pi), rng.uniform(0.5, 1.5)
        centre = rng.uniform(0, pixels.shape[0], size=2)
        across = np.abs((rows - centre[0]) * np.cos(angle) - (columns - centre[1]) * np.sin(angle))
        opacity = strength * np.clip(width - across, 0, 1)[..., None]
        pixels = pixels + opacity * (rng.uniform(0, 255, size=3) - pixels)
    return pixels


def _exposure(pixels: _Pixels, strength: float, rng: np.random.Generator) -> _Pixels:
    """Contrast, brightness and gamma; strength 1 halves or doubles."""
    contrast, gamma = 2.0 ** (strength * rng.uniform(-1, 1, size=2))
    shifted = contrast * (pixels - 128) + 128 + 50 * strength * rng.uniform(-1, 1)
    return 255 * (np.clip(shifted, 0, 255) / 255) ** gamma


def _few_colours(pixels: _Pixels, strength: float, rng: np.random.Generator) -> _Pixels:
    """Rounded values, with dither in half of the cases; strength 1 leaves 3 a channel."""
    step = 255 / round(2 + 14 * (1 - strength))
    dither = rng.uniform(-0.5, 0.5, size=pixels.shape) if rng.random() < 0.5 else 0.0
    return np.rint(pixels / step + dither) * step


def _erode(pixels: _Pixels, strength: float, rng: np.random.Generator) -> _Pixels:
    """Darker or lighter parts grow; strength 1 is a window of 5 pixels."""
    change = (ndimage.minimum_filter, ndimage.maximum_filter, ndimage.median_filter)[int(rng.integers(3))]
    return strength * change(pixels, size=(5, 5, 1)) + (1 - strength) * pixels


def _halo(pixels: _Pixels, strength: float, rng: np.random.Generator) -> _Pixels:
    """Over-sharpened edges; strength 1 adds what is lost by blurring twice."""
    blurred = ndimage.gaussian_filter(pixels, (width := rng.uniform(0.7, 3.0), width, 0))
    return pixels + 2.0 * strength * (pixels - blurred)


def _speckle(pixels: _Pixels, strength: float, rng: np.random.Generator) -> _Pixels:
    """Noise in grains of one to four pixels; strength 1 has a standard deviation of 60."""
    grain = rng.uniform(0.4, 1.6)
    noise = ndimage.gaussian_filter(rng.standard_normal(pixels.shape), (grain, grain, 0))
    factor = pixels / 128 if rng.random() < 0.5 else 1.0
    return pixels + 60.0 * strength * factor * noise / noise.std()


def _scramble(pixels: _Pixels, strength: float, rng: np.random.Generator) -> _Pixels:
    """Every pixel from a random place near by; strength 1 up to 4 pixels away."""
    reach = 4.0 * strength
    rows, columns = np.indices(pixels.shape[:2])
    moved = [
        np.clip(np.rint(place + rng.uniform(-reach, reach, size=place.shape)), 0, pixels.shape[0] - 1).astype(
            int
        )
        for place in (rows, columns)
    ]
    return pixels[moved[0], moved[1]]


VARIED: dict[str, Damage] = {
    **CORRUPTIONS,
    "motion": _on_pixels(_motion),
    "ghost": _on_pixels(_ghost),
    "warp": _on_pixels(_warp),
    "blotches": _on_pixels(_blotches),
    "dead pixels": _on_pixels(_dead_pixels),
    "patches": _on_pixels(_patches),
    "scratches": _on_pixels(_scratches),
    "exposure": _on_pixels(_exposure),
    "few colours": _on_pixels(_few_colours),
    "erode": _on_pixels(_erode),
    "halo": _on_pixels(_halo),
    "speckle": _on_pixels(_speckle),
    "scramble": _on_pixels(_scramble),
}
"""Each takes (image, strength in [0, 1], generator)."""
