"""An anti-aliased renderer of scenes, and the corruptions that make a picture worse in a known way.

Pictures are RGB, `CANVAS` x `CANVAS`, uint8; edges are as smooth as `geometry.coverage` makes them.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from dina_lrm.shapes.geometry import coverage
from dina_lrm.shapes.scenes import BACKGROUNDS, CANVAS, COLOURS, Scene


def render_array(scene: Scene) -> np.ndarray:
    """The picture as uint8 (CANVAS, CANVAS, 3)."""
    picture = np.empty((CANVAS, CANVAS, 3))
    picture[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        alpha = coverage(item.shape, item.x, item.y, item.radius)[..., None]
        picture = (1.0 - alpha) * picture + alpha * np.asarray(COLOURS[item.colour], dtype=float)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def render(scene: Scene) -> Image.Image:
    """The picture of a scene."""
    return Image.fromarray(render_array(scene))


def blur(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur; strength 1 is a standard deviation of 3 pixels."""
    del rng
    return image.filter(ImageFilter.GaussianBlur(float(3.0 * strength)))


def add_pixel_noise(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Independent Gaussian noise on every value; strength 1 is a standard deviation of 60 of 255."""
    pixels = np.asarray(image, dtype=float)
    noisy = pixels + 60.0 * strength * rng.standard_normal(pixels.shape)
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def fade_colours(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Colour corruption: every colour moves towards its own gray; strength 1 removes 70 % of the
    saturation."""
    del rng
    pixels = np.asarray(image, dtype=float)
    gray = pixels.mean(axis=2, keepdims=True)
    return Image.fromarray(np.rint(pixels + 0.7 * strength * (gray - pixels)).astype(np.uint8))


CORRUPTIONS: dict[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "blur": blur,
    "noise": add_pixel_noise,
    "fade": fade_colours,
}
"""Ways to make a picture worse; each takes (image, strength in [0, 1], generator)."""
