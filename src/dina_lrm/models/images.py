"""Pictures in, tensors in [0, 1] out: every kind a user may hold, at its own aspect ratio."""

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dina_lrm.errors import InvalidInputError
from dina_lrm.images import fitted_size, picture_file, resized, rgb_tensor

Picture = Float[Tensor, "3 *frame height width"]
"""A video has its frames before height."""

BYTES = bytes | bytearray | memoryview


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
    """See `as_pictures`; a PIL image is taken as `pictures.upright_rgb` takes it."""
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
    """Of (height, width, channel) or (height, width), as OpenCV, Matplotlib and PIL hold pictures."""
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
