"""One way from a decoded picture to the tensor that is encoded: a picture is trained on as it is scored."""

import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from dina_lrm.errors import InvalidInputError
from dina_lrm.files import file_fault

__all__ = ["fitted_size", "picture_file", "resized", "rgb_tensor", "upright_rgb"]


def picture_file(path: str | os.PathLike[str]) -> Path:
    """The path, if a file is there: a folder has no content, and a FIFO or a device no end.

    Raises:
        InvalidInputError: it is none.
    """
    file = Path(path)
    fault = file_fault(file)
    if fault is not None:
        raise InvalidInputError(
            f"missing file: {file}" if fault == "is missing" else f"no file: {file} {fault}"
        )
    return file


def upright_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """The picture as a viewer shows it, in 8-bit RGB.

    EXIF rotation is applied, transparency becomes white, grey gets three channels, 16- and 32-bit grey is
    scaled (PIL's own conversion clips it).

    Raises:
        InvalidInputError: floating pixels outside [0, 1]; `name` says which picture.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F" and not (np.isfinite(values).all() and 0 <= values.min() and values.max() <= 1):
            raise InvalidInputError(f"{name} has floating pixels outside [0, 1]")
        top = 1.0 if image.mode == "F" else 65535.0
        return Image.fromarray(np.rint(255 * (values / top).clip(0, 1)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def rgb_tensor(image: Image.Image, name: str = "image") -> Tensor:
    """`upright_rgb` as floats (3, height, width) in [0, 1]."""
    pixels = np.array(upright_rgb(image, name))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def fitted_size(
    height: int,
    width: int,
    *,
    multiple: int,
    max_side: int | None = None,
    max_pixels: int | None = None,
    name: str = "image",
) -> tuple[int, int]:
    """Height and width that a picture is encoded at: shrunk to the limits where needed, sides rounded down to
    a multiple; never enlarged.

    Raises:
        InvalidInputError: a side comes to nothing; `name` says which picture.

    >>> fitted_size(1080, 1920, multiple=16, max_pixels=1024 * 1024)
    (768, 1360)
    """
    scale = 1.0 if max_side is None else min(1.0, max_side / max(height, width))
    if max_pixels is not None:
        scale = min(scale, math.sqrt(max_pixels / (height * width)))
    # The small addend keeps 0.1 * 640 = 63.999 from losing a whole multiple.
    new_height, new_width = (int(side * scale / multiple + 1e-6) * multiple for side in (height, width))
    if min(new_height, new_width) == 0:
        raise InvalidInputError(
            f"{name} of {width}x{height} pixels is too small or too narrow: "
            f"both sides must come to at least {multiple} pixels"
            f"{'' if max_side is None else f' within {max_side} a side'}"
        )
    return new_height, new_width


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """(channel, *frame, height, width) at another size: bicubic, antialiased, within [0, 1]."""
    if picture.shape[-2:] == (height, width):
        return picture
    frames = picture.reshape(len(picture), -1, *picture.shape[-2:]).transpose(0, 1)
    frames = F.interpolate(frames, size=(height, width), mode="bicubic", antialias=True)
    return frames.transpose(0, 1).reshape(*picture.shape[:-2], height, width).clamp(0, 1)
