"""Pictures in, tensors in [0, 1] out: every kind a user may hold, at its own aspect ratio."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dina_lrm.errors import InvalidInputError
from dina_lrm.pictures import fitted_size, resized, rgb_tensor

Picture = Float[Tensor, "3 *frame height width"]
"""A video has its frames before height."""


def as_pictures(images: Any) -> list[Picture]:
    """One picture or many, as a list of float tensors (3, height, width) in [0, 1].

    Each may be a path, encoded bytes, a PIL image, or a uint8 or float tensor (channel, height, width), a
    video a tensor (channel, frame, height, width). A tensor (batch, channel, height, width) counts as a list
    of pictures, a tensor with five axes as a list of videos.
    """
    if isinstance(images, Tensor) and images.ndim >= 4:
        images = list(images)
    if not isinstance(images, Sequence) or isinstance(images, str | bytes):
        images = [images]
    if len(images) == 0:
        raise InvalidInputError("no images were given")
    return [as_picture(image, f"image {index}") for index, image in enumerate(images)]


def as_picture(image: Any, name: str = "image") -> Picture:
    """See `as_pictures`; a PIL image is taken as `pictures.upright_rgb` takes it."""
    from PIL import Image

    if isinstance(image, Tensor):
        return _from_tensor(image, name)
    if isinstance(image, Image.Image):
        return _from_pil(image, name)
    if isinstance(image, str | Path | bytes):
        label = f"{name}: {str(image)!r}" if not isinstance(image, bytes) else f"{name} ({len(image)} bytes)"
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return _from_pil(opened, name)
        except FileNotFoundError as error:
            raise InvalidInputError(f"{label}: no such file") from error
        except InvalidInputError:
            raise
        except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, DecompressionBombError, ...
            raise InvalidInputError(f"{label} is not a readable image ({error})") from error
    raise InvalidInputError(
        f"{name} is a {type(image).__name__}: give a path, PIL image, bytes, or uint8 or float tensor"
    )


def _from_pil(image: Any, name: str) -> Picture:
    return rgb_tensor(image, name)


def _from_tensor(image: Tensor, name: str) -> Picture:
    if image.ndim not in (3, 4) or image.shape[0] not in (1, 3, 4):
        raise InvalidInputError(
            f"{name} has shape {tuple(image.shape)}: tensors must be (channel, height, width), "
            f"or (channel, frame, height, width) for a video, with 1, 3 or 4 channels"
        )
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
                f"{name} has values from {low:.3g} to {high:.3g}: float tensors must be in [0, 1]"
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
