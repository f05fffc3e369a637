"""Scores of uploaded pictures for the page: the model is asked in short pieces, one picture and one set of
noise levels at a time."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from PIL import ExifTags, Image
from torch import Tensor

from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.ensemble import mean_and_standard_error
from dina_lrm.core.noise import seeded_noise
from dina_lrm.errors import InvalidInputError
from dina_lrm.images import rgb_tensor, upright_rgb
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.sampling.stepwise import Executor, SamplerState
from dina_lrm.serving.pictures import FORMATS, open_picture
from dina_lrm.serving.schemas import check_prompt
from dina_lrm.serving.views import MeanScore

__all__ = ["LEVELS", "NUM_DRAWS", "EncodedPrompt", "PageModel", "mean_score", "pil_picture", "places"]

LEVELS = (0.05, 0.16, 0.28, 0.39, 0.5, 0.61, 0.73, 0.84, 0.95)
"""Single noise levels that are looked at, evenly spaced."""
NUM_DRAWS = 8
DECODED_TIMES = 4
"""How many times the pixels that are taken may be decoded to shrink a picture."""
SEED = 0
"""Seed of the noise: the page says the same of the same picture."""

T = TypeVar("T")


@dataclass(frozen=True)
class EncodedPrompt:
    """What a prompt came to."""

    text: str
    conditioning: Conditioning
    notes: list[str]
    """What the text encoders did not see of it."""


@dataclass(frozen=True, kw_only=True)
class PageModel:
    """A reward, and what it takes from visitors.

    Every method may raise ScoringError (there is too much other work) and InvalidInputError (it names what is
    wrong with what was given).
    """

    model: RewardModel
    run: Executor
    max_megapixels: float
    max_prompt_length: int

    @property
    def model_levels(self) -> tuple[float, ...]:
        """Noise levels of the model's usual ensemble."""
        return tuple(self.model.config.noise_levels)

    def ask(self, job: Callable[[], T]) -> T:
        """One piece of work with the model, without gradients."""

        def without_gradients() -> T:
            with torch.no_grad():  # holds for one thread, so it has to be said in the model's
                return job()

        return self.run(without_gradients)

    def prompt(self, text: Any) -> EncodedPrompt:
        given = str(text or "").strip()
        check_prompt(given, "Prompt", self.max_prompt_length)

        def encode() -> EncodedPrompt:
            return EncodedPrompt(given, *self.model.read_prompts(given))

        return self.ask(encode)

    def open(self, path: str | None, name: str) -> tuple[Float[Tensor, "3 height width"], list[str]]:
        """An uploaded file as a picture, and what a visitor should know of it.

        A picture over `max_megapixels` is shrunk to them: what a telephone takes is often larger. One that
        would take much memory to decode is refused.

        Args:
            name: what the visitor knows it by.
        """
        if path is None:
            raise InvalidInputError(f"{name}: none is given")
        data = Path(path).read_bytes()
        shrunk = _shrunk(data, self.max_megapixels)
        if shrunk is None:
            return open_picture(data, DECODED_TIMES * self.max_megapixels, name), []
        image, (width, height) = shrunk
        note = (
            f"{name} was shrunk from {width}x{height} to {image.width}x{image.height} pixels: at most "
            f"{self.max_megapixels:g} million are scored."
        )
        return rgb_tensor(image, name), [note]

    def latents(self, picture: Float[Tensor, "3 height width"], name: str) -> Tensor:
        """Clean latents (1, channel, height, width) of a picture."""
        height, width = picture.shape[-2:]
        self.model.picture_size(height, width, name)
        return self.ask(lambda: self.model.encode_images([picture]))

    def decoded(self, latents: Tensor) -> Image.Image:
        """The picture of clean latents (1, channel, height, width)."""
        return pil_picture(self.ask(lambda: self.model.decode_latents(latents))[0])

    def draws(
        self, latents: Tensor, prompt: EncodedPrompt, levels: Sequence[float], num_draws: int = NUM_DRAWS
    ) -> Float[Tensor, " draw"]:
        """Scores of clean latents (1, channel, height, width), all levels together, under `num_draws` draws
        of noise; the noise is that of `RewardModel.score` with seed 0, and depends on the shape alone."""
        noise = seeded_noise(latents.shape[1:], [SEED], num_draws=num_draws)[:, 0]
        several = latents.expand(num_draws, *latents.shape[1:])
        scores = self.ask(
            lambda: self.model.score_latents(several, prompt.conditioning, list(levels), noise=noise)
        )
        scores = scores.double().cpu()
        if not torch.isfinite(scores).all():
            raise InvalidInputError("the score of this picture is not finite")
        return scores

    def state(self, state: SamplerState, prompt: EncodedPrompt) -> float:
        """Score of a noisy state of a sampler, at its own noise level."""
        return self.ask(
            lambda: self.model.score_state(state.noisy, prompt.conditioning, state.timestep).item()
        )


def places(draws: Sequence[Float[Tensor, " draw"]]) -> list[int]:
    """Places of pictures, best first, from their scores under the same draws of noise.

    A picture shares the place of the best one before it that its score cannot be told from: the 95 % interval
    of the difference, draw by draw, reaches zero.
    """
    found: list[int] = []
    for index, one in enumerate(draws):
        best = found.index(found[-1]) if found else 0
        told_apart = index == 0 or mean_score(draws[best] - one).interval[0] > 0
        found.append(index + 1 if told_apart else found[-1])
    return found


def mean_score(draws: Float[Tensor, " draw"]) -> MeanScore:
    """The mean of draws and how well it is known."""
    mean, error = mean_and_standard_error(draws[:, None])
    assert error is not None
    return MeanScore(mean.item(), error.item(), len(draws))


def _shrunk(data: bytes, max_megapixels: float) -> tuple[Image.Image, tuple[int, int]] | None:
    """A picture of too many pixels with as many as are taken, and the size it had; None where it has no more,
    cannot be read, or would have to be decoded at more than `DECODED_TIMES` as many (JPEG can be decoded at
    an eighth of its size)."""
    limit = max_megapixels * 1e6
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height <= limit:
                return None
            scale = math.sqrt(limit / (width * height))
            size = max(1, int(width * scale)), max(1, int(height * scale))
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            image.draft(None, size)
            if image.width * image.height > DECODED_TIMES * limit:
                return None
            upright = upright_rgb(image)
            upright.thumbnail((size[1], size[0]) if turned else size)
            return upright, (height, width) if turned else (width, height)
    except Exception:  # `open_picture` says what is wrong
        return None


def pil_picture(picture: Float[Tensor, "3 height width"], max_side: int | None = None) -> Image.Image:
    """A picture in [0, 1] for PIL, shrunk to `max_side` pixels where it is larger."""
    pixels: Any = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
    image = Image.fromarray(pixels)
    if max_side is not None:
        image.thumbnail((max_side, max_side))
    return image
