"""Pictures that tests make up, in memory, as bytes and as files."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def noise_picture(
    seed: int, width: int = 64, height: int = 64, *, low: int = 0, high: int = 256
) -> Image.Image:
    """Every value drawn on its own from low to high - 1."""
    pixels = np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def gray_picture(brightness: int, size: int = 8) -> Image.Image:
    """One gray; its score by a `BrightnessModel` is brightness / 255."""
    return Image.new("RGB", (size, size), (brightness,) * 3)


def encoded(picture: Image.Image, form: str = "PNG") -> bytes:
    """The picture as a file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def write_grays(folder: Path, count: int, *, step: int = 51, prefix: str = "") -> list[Path]:
    """PREFIX0.png, PREFIX1.png, ... of brightness 0, step, 2 step, ..."""
    files = [folder / f"{prefix}{number}.png" for number in range(count)]
    for number, file in enumerate(files):
        gray_picture(step * number).save(file)
    return files
