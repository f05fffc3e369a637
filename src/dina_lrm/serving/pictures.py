"""Pictures from strangers: the size is known before a pixel is decoded, and only what is encoded is kept."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dina_lrm.errors import InvalidInputError
from dina_lrm.images import resized, upright_rgb

__all__ = ["FORMATS", "EncodedPicture", "open_picture", "picture_header"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Formats of pictures that are taken from strangers."""
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange height and width."""
_ORIENTATION = 0x0112

T = TypeVar("T")


@dataclass(frozen=True)
class EncodedPicture:
    """A picture as it was sent."""

    data: bytes
    height: int
    """As a viewer shows it, EXIF rotation applied."""
    width: int
    name: str
    """Field of the request, for messages."""

    @property
    def pixels(self) -> int:
        return self.height * self.width


def picture_header(data: bytes, max_megapixels: float, name: str) -> EncodedPicture:
    """A picture whose size has been read, and no pixel.

    Raises:
        InvalidInputError: not a picture in one of `FORMATS`, or of more pixels than allowed.
    """

    def read(image: Image.Image) -> EncodedPicture:
        width, height = image.size
        if width * height > max_megapixels * 1e6:
            raise InvalidInputError(
                f"{name}: {width}x{height} pixels, at most {max_megapixels:g} million are taken"
            )
        turned = image.getexif().get(_ORIENTATION) in _TURNED
        return EncodedPicture(data, *((width, height) if turned else (height, width)), name)

    return _opened(data, max_megapixels, name, read)


def open_picture(
    data: bytes,
    max_megapixels: float,
    name: str,
    fitted: Callable[[int, int], tuple[int, int]] = lambda height, width: (height, width),
) -> Tensor:
    """A picture (3, height, width) in [0, 1] from bytes that may be anything.

    The result is that of `images.fit`, bit for bit, but no picture of the full size is made in
    floating point: colours are shrunk one after another.

    Args:
        fitted: height and width to shrink to, of height and width.

    Raises:
        InvalidInputError: as in `picture_header`, or its pixels cannot be decoded.
    """

    def decode(image: Image.Image) -> Tensor:
        width, height = image.size
        if width * height > max_megapixels * 1e6:
            raise InvalidInputError(
                f"{name}: {width}x{height} pixels, at most {max_megapixels:g} million are taken"
            )
        image.load()
        pixels = np.asarray(upright_rgb(image, name))
        size = fitted(*pixels.shape[:2])
        colours = [
            resized(torch.from_numpy(pixels[None, ..., colour].copy()).float().div_(255), *size)
            for colour in range(3)
        ]
        return torch.cat(colours)

    return _opened(data, max_megapixels, name, decode)


def _opened(data: bytes, max_megapixels: float, name: str, use: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return use(image)
    except InvalidInputError:
        raise
    except Image.DecompressionBombError as error:
        raise InvalidInputError(
            f"{name}: far more than the {max_megapixels:g} million pixels that are taken"
        ) from error
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, ValueError, struct.error, ...
        raise InvalidInputError(
            f"{name}: not a readable picture ({', '.join(FORMATS)}); {len(data)} bytes"
        ) from error
