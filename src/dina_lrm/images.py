"""From any image a user may hold to the tensor that is encoded: it is trained on as it is scored."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dina_lrm.errors import InvalidInputError
from dina_lrm.files import file_fault

__all__ = [
    "BYTES",
    "Picture",
    "as_picture",
    "as_pictures",
    "fit",
    "fitted_size",
    "image_label",
    "image_list",
    "picture_file",
    "resized",
    "rgb_tensor",
    "upright_rgb",
]

Picture = Float[Tensor, "3 *frame height width"]
"""A video has its frames before height."""
BYTES = bytes | bytearray | memoryview


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


def image_list(images: Any) -> list[Any]:
    """One picture or many as a list, none of them decoded.

    A tensor (batch, channel, height, width) and an array (batch, height, width, channel) count as lists of
    pictures, a tensor with five axes as a list of videos.

    Raises:
        InvalidInputError: the list is empty.
    """
    if isinstance(images, Tensor | np.ndarray) and images.ndim >= 4:
        images = list(images)
    if not isinstance(images, Sequence) or isinstance(images, str | BYTES):
        images = [images]
    if len(images) == 0:
        raise InvalidInputError("no images were given")
    return list(images)


def image_label(image: Any, index: int) -> str:
    """What a message calls a picture: its file's name, or `image 0` where it has none."""
    if isinstance(image, str | os.PathLike):
        return repr(os.fsdecode(image))
    file = getattr(image, "filename", None) or getattr(image, "name", None)  # of a PIL image, an open file
    return repr(file) if isinstance(file, str) else f"image {index}"


def as_pictures(images: Any) -> list[Picture]:
    """One picture or many, as a list of float tensors (3, height, width) in [0, 1].

    Each may be a path, encoded bytes, a file opened in binary, a PIL image, a NumPy array (height, width,
    channel) or (height, width), or a tensor (channel, height, width); arrays and tensors are uint8, or
    floating in [0, 1]. A video is a tensor (channel, frame, height, width). See `image_list` for batches.

    Raises:
        InvalidInputError: something else, or unreadable; the message says which picture, see `image_label`.
    """
    listed = image_list(images)
    return [as_picture(image, image_label(image, index)) for index, image in enumerate(listed)]


def as_picture(image: Any, name: str = "image") -> Picture:
    """See `as_pictures`; a PIL image is taken as `upright_rgb` takes it."""
    if isinstance(image, Tensor):
        return _from_tensor(image, name)
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if isinstance(image, io.TextIOBase):
        raise InvalidInputError(f"{name} is a file opened as text: open it in binary, with open(..., 'rb')")
    try:
        if isinstance(image, Image.Image):
            return rgb_tensor(image, name)
        if isinstance(image, BYTES):
            name = f"{name} ({len(image)} bytes)"
            source: Any = io.BytesIO(image)
        elif isinstance(image, str | os.PathLike):
            source = picture_file(os.fsdecode(image))
        elif hasattr(image, "read"):
            source = image
        else:
            raise InvalidInputError(
                f"{name} is a {type(image).__name__}: give a path, bytes, an open binary file, a PIL image, "
                f"an array or a tensor"
            )
        with Image.open(source) as opened:
            return rgb_tensor(opened, name)
    except InvalidInputError:
        raise
    except UnidentifiedImageError as error:  # whose own message repeats the name, or a buffer's address
        raise InvalidInputError(f"{name} is not a readable image") from error
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, DecompressionBombError, ...
        raise InvalidInputError(f"{name} is not a readable image ({error})") from error


def _from_array(image: np.ndarray, name: str) -> Picture:
    """Take (height, width, channel) or (height, width), as OpenCV, Matplotlib and PIL hold pictures."""
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise InvalidInputError(
            f"{name} has shape {image.shape}: arrays must be (height, width, channel) with 1, 3 or 4 "
            f"channels, or (height, width); give channels first as a torch tensor"
        )
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise InvalidInputError(
            f"{name} has dtype {image.dtype}: arrays must be uint8, or floating in [0, 1]"
        )
    values = image if image.dtype == np.uint8 else image.astype(np.float32)
    channels_first = values[None] if values.ndim == 2 else np.moveaxis(values, 2, 0)
    return _from_tensor(torch.from_numpy(channels_first.copy()), name)


def _from_tensor(image: Tensor, name: str) -> Picture:
    if image.ndim not in (3, 4) or image.shape[0] not in (1, 3, 4):
        raise InvalidInputError(
            f"{name} has shape {tuple(image.shape)}: tensors must be (channel, height, width), "
            f"or (channel, frame, height, width) for a video, with 1, 3 or 4 channels"
        )
    if 0 in image.shape:
        raise InvalidInputError(f"{name} has shape {tuple(image.shape)}: no side may be empty")
    if image.dtype == torch.uint8:
        image = image.float() / 255
    elif not image.is_floating_point():
        raise InvalidInputError(
            f"{name} has dtype {image.dtype}: tensors must be uint8, or floating in [0, 1]"
        )
    else:
        image = image.float()
        low, high = (float(bound) for bound in image.detach().aminmax())
        if not (low >= 0.0 and high <= 1.0):  # also true of NaN
            raise InvalidInputError(
                f"{name} has values from {low:.3g} to {high:.3g}: floating pixels must be in [0, 1]"
            )
    if image.shape[0] == 4:
        colour, alpha = image[:3], image[3:]
        return colour * alpha + (1 - alpha)
    return image.expand(3, *image.shape[1:])


def fit(
    picture: Picture,
    *,
    multiple: int,
    max_side: int | None = None,
    max_pixels: int | None = None,
    name: str = "image",
) -> Float[Tensor, "3 *frame new_height new_width"]:
    """Shrink to the limits where needed and round the sides down to a multiple; never enlarge."""
    height, width = picture.shape[-2:]
    size = fitted_size(height, width, multiple=multiple, max_side=max_side, max_pixels=max_pixels, name=name)
    return resized(picture, *size)
