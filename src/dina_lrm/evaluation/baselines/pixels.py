"""Pictures as the published rewards saw them, without torchvision: (batch, 3, size, size), normalised."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

__all__ = ["Pixels", "cropped_pixels", "padded_pixels"]

Pixels = Float[Tensor, "batch 3 height width"]

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per channel, over CLIP's training pictures: arXiv:2103.00020 and its released code."""


def cropped_pixels(images: Sequence[Image.Image], size: int) -> Pixels:
    """The shorter side resized to `size` (PIL bicubic), the middle square cut out, normalised."""
    return _normalised(torch.stack([_unit(_cropped(image, size)) for image in images]))


def padded_pixels(images: Sequence[Image.Image], size: int) -> Pixels:
    """The longer side resized to `size`, black borders around the rest, normalised.

    Resized as a tensor, bicubic and antialiased as torchvision does since 0.17; overshoot is not clipped.
    """
    return _normalised(torch.stack([_padded(_unit(image), size) for image in images]))


def _cropped(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    shorter = min(width, height)
    width, height = int(size * width / shorter), int(size * height / shorter)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _padded(image: Tensor, size: int) -> Tensor:
    scale = size / max(image.shape[1:])
    height, width = (max(1, round(side * scale)) for side in image.shape[1:])
    if (height, width) != tuple(image.shape[1:]):
        (image,) = F.interpolate(image[None], size=(height, width), mode="bicubic", antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return F.pad(image, (left, size - width - left, top, size - height - top))


def _unit(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _normalised(pixels: Tensor) -> Pixels:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    return (pixels - mean) / std
