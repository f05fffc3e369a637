"""What all scorers share: the interface, the checks of what comes in, and the walk in batches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from dina_lrm.core.tensors import Score
from dina_lrm.data.pairs import load_image
from dina_lrm.errors import InvalidInputError

__all__ = ["Scorer", "checked_pairs", "picture", "score_in_batches"]


@runtime_checkable
class Scorer(Protocol):
    """A reward of a picture for a prompt."""

    name: str
    """As in `SCORERS`."""

    def score(self, prompts: Sequence[str], images: Sequence[Any]) -> Score:
        """Scores (batch,), float32 on the CPU, higher is better; prompt i goes with image i.

        Deterministic, without gradient, and up to rounding the same whatever else is in the call.

        Args:
            prompts: one for each image, none empty.
            images: paths, encoded bytes or PIL images, of any sizes.

        Raises:
            InvalidInputError: unequal lengths, an empty prompt, an unreadable image.
        """
        ...


def checked_pairs(prompts: Sequence[str], images: Sequence[Any]) -> list[tuple[str, Any]]:
    """Prompts and images as pairs.

    Raises:
        InvalidInputError: not two lists of one length, or a prompt that is empty or no string.
    """
    for name, given in (("prompts", prompts), ("images", images)):
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            raise InvalidInputError(f"{name} must be a list, one entry a pair, not {type(given).__name__}")
    if len(prompts) != len(images):
        raise InvalidInputError(f"{len(prompts)} prompts for {len(images)} images: give one prompt per image")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise InvalidInputError(f"prompt {index} must be a non-empty string, not {prompt!r}")
    return list(zip(prompts, images, strict=True))


def picture(image: Any, index: int) -> Image.Image:
    """An image as `data.pairs.load_image` decodes it: upright 8-bit RGB."""
    if isinstance(image, str):
        image = Path(image)
    if not isinstance(image, Path | bytes | Image.Image):
        raise InvalidInputError(
            f"image {index} is a {type(image).__name__}: give a path, encoded bytes or a PIL image"
        )
    try:
        return load_image(image)
    except (InvalidInputError, OSError) as error:  # OSError: a PIL image whose file is read only now
        raise InvalidInputError(f"image {index}: {error}") from error


def score_in_batches(
    prompts: Sequence[str],
    images: Sequence[Any],
    score_batch: Callable[[list[str], list[Image.Image]], Tensor],
    *,
    batch_size: int,
) -> Score:
    """Scores of all pairs, `batch_size` at a time, without gradient; no more pictures than that in memory."""
    pairs = checked_pairs(prompts, images)
    scores = torch.empty(len(pairs), dtype=torch.float32)
    with torch.no_grad():
        for start in range(0, len(pairs), batch_size):
            rows = pairs[start : start + batch_size]
            pictures = [picture(image, start + offset) for offset, (_, image) in enumerate(rows)]
            scores[start : start + len(rows)] = score_batch([prompt for prompt, _ in rows], pictures)
    return scores
