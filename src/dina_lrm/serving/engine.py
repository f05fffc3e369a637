"""The model behind a server: rows of requests in, scores out."""

import io
import time
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dina_lrm.core.ensemble import mean_and_standard_error
from dina_lrm.core.noise import seeded_noise
from dina_lrm.errors import InvalidInputError, PromptWarning
from dina_lrm.models.backbone import Conditioning
from dina_lrm.models.images import as_picture
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.protocol import LatentRows

__all__ = ["Engine", "LatentRow", "PictureRow", "RowScore", "open_picture"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Of pictures that are taken from strangers."""


@dataclass(frozen=True)
class RowScore:
    """Of one row."""

    score: float
    standard_error: float | None = None
    encode_seconds: float = 0.0
    """Of the pass that the row was in: text encoders and VAE."""
    forward_seconds: float = 0.0
    """Of the pass: backbone and head."""
    notes: tuple[str, ...] = ()
    """What the text encoders did not see of the prompt."""


@dataclass(frozen=True)
class LatentRow:
    """A clean latent with its conditioning, without a batch axis, in float32."""

    latent: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    noise_level: float
    seed: int

    @property
    def kind(self) -> Hashable:
        return "latent", self.latent.shape, self.prompt_embeds.shape


@dataclass(frozen=True)
class PictureRow:
    """A picture (3, height, width) in [0, 1] with its prompt."""

    picture: Tensor
    prompt: str
    noise_levels: tuple[float, ...]
    seed: int
    num_draws: int
    size: tuple[int, int]
    """Height and width that it is encoded at."""

    @property
    def kind(self) -> Hashable:
        return "picture", self.size, len(self.noise_levels), self.num_draws


Row = LatentRow | PictureRow


class Engine:
    """Scores rows of one kind in one pass; checks them before they are queued."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def latent_rows(self, request: LatentRows, fresh_seeds: Sequence[int]) -> list[LatentRow]:
        """The rows of a request of the latent protocol.

        Args:
            fresh_seeds: used where the request has none.

        Raises:
            InvalidInputError: they do not suit the model's backbone.
        """
        self.model.backbone.check_latents(request.latents, finite=False)
        self.model.backbone.check_conditioning(
            Conditioning(request.prompt_embeds, request.pooled_prompt_embeds), finite=False
        )
        latents, embeds, pooled = (
            tensor.float()
            for tensor in (request.latents, request.prompt_embeds, request.pooled_prompt_embeds)
        )
        seeds, levels = fresh_seeds if request.seeds is None else request.seeds, request.u.tolist()
        return [
            LatentRow(latents[row], embeds[row], pooled[row], levels[row], seeds[row])
            for row in range(len(request))
        ]

    def picture_row(
        self,
        picture: Tensor,
        prompt: str,
        noise_levels: tuple[float, ...],
        seed: int,
        num_draws: int,
        name: str,
    ) -> PictureRow:
        """A row of a request with pictures.

        Raises:
            InvalidInputError: the picture is too small for the VAE; it says `name`.
            MissingComponentError: the model's pipeline has no VAE.
        """
        height, width = picture.shape[-2:]
        size = self.model.picture_size(height, width, name)
        return PictureRow(picture, prompt, noise_levels, seed, num_draws, size)

    @torch.no_grad()
    def score(self, rows: list[Row]) -> list[RowScore | Exception]:
        """Scores of rows of one kind; InvalidInputError in place of one that is not finite."""
        started = time.perf_counter()
        latents, conditioning, levels, num_draws = self._inputs(rows)
        encoded = time.perf_counter()
        noise = seeded_noise(latents.shape[1:], [row.seed for row in rows], num_draws=num_draws)
        draws = torch.stack(
            [self.model.score_latents(latents, conditioning, levels, noise=one) for one in noise]
        )
        scores, errors = mean_and_standard_error(draws.float())
        values = scores.tolist()
        spreads = [None] * len(rows) if errors is None else errors.tolist()
        times = encoded - started, time.perf_counter() - encoded
        prompts = [row.prompt if isinstance(row, PictureRow) else "" for row in rows]
        notes = {prompt: tuple(self.model.prompt_notes(prompt)) for prompt in set(prompts) if prompt}
        finite = torch.isfinite(scores).tolist()
        return [
            RowScore(values[index], spreads[index], *times, notes=notes.get(prompts[index], ()))
            if finite[index]
            else InvalidInputError(
                "latents: their score is not finite, so they are far outside the usual range"
            )
            for index in range(len(rows))
        ]

    def _inputs(self, rows: list[Row]) -> tuple[Tensor, Conditioning, Tensor, int]:
        """Latents, one row of conditioning each, noise levels (level, batch), and noise draws."""
        pictures = [row for row in rows if isinstance(row, PictureRow)]
        if pictures:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PromptWarning)  # the notes go to the client
                conditioning = self.model.encode_prompts([row.prompt for row in pictures])
            latents = self.model.encode_images([row.picture for row in pictures])
            levels = torch.tensor([row.noise_levels for row in pictures]).T
            return latents, conditioning, levels, pictures[0].num_draws
        own = [row for row in rows if isinstance(row, LatentRow)]
        conditioning = Conditioning(
            torch.stack([row.prompt_embeds for row in own]).to(self.model.device),
            torch.stack([row.pooled_prompt_embeds for row in own]).to(self.model.device),
        )
        latents = torch.stack([row.latent for row in own])
        return latents, conditioning, torch.tensor([[row.noise_level for row in own]]), 1

    def warm_up(self) -> None:
        """Score one small latent, and load the text encoders where there are any."""
        a = self.model.backbone.architecture
        side = a.latent_multiple * -(-8 // a.latent_multiple)
        row = LatentRow(
            torch.zeros(a.latent_channels, side, side),
            torch.zeros(8, a.prompt_dim),
            torch.zeros(a.pooled_dim or 1),
            0.4,
            0,
        )
        (result,) = self.score([row])
        if isinstance(result, Exception):
            raise result
        encoders = self.model.encoders
        if encoders is not None and all(map(encoders.source.has, encoders.text.encoders)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PromptWarning)
                encoders.encode_prompts(["a picture"], self.model.device)


def open_picture(data: bytes, max_megapixels: float, name: str) -> Tensor:
    """A picture (3, height, width) in [0, 1] from bytes that may be anything.

    Raises:
        InvalidInputError: not a picture in one of `FORMATS`, or of more pixels than allowed; its size is
            read before any pixel is.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_megapixels * 1e6:
                raise InvalidInputError(
                    f"{name}: {width} x {height} pixels, at most {max_megapixels:g} million are taken"
                )
            image.load()
            return as_picture(image, name)
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
