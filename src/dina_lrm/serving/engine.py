"""The model behind a server: what requests want, as units of work that share passes.

A row, a latent or a picture with its prompt, is scored in as many units as it has noise draws; a picture is
encoded first, in a unit of its own. A unit holds what its pass needs and no more: a picture of the size that
is encoded, or a latent.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dina_lrm.backbones.prompts import joined_rows
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.noise import seeded_generator
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.encoders import pixels_per_latent
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.remote.protocol import LatentRows

__all__ = ["Draws", "Encode", "Encoded", "Engine", "Result", "Row", "Score", "Unit"]


@dataclass(frozen=True)
class Encoded:
    """A picture with its prompt, ready to be scored."""

    latent: Tensor
    conditioning: Conditioning
    """One row."""
    notes: tuple[str, ...]
    """What the text encoders did not see of the prompt."""


@dataclass(frozen=True, eq=False)
class Encode:
    """Encode a picture and its prompt."""

    picture: Tensor
    """(3, height, width) in [0, 1], of the size that is encoded."""
    prompt: str

    stage = "encode"

    @property
    def kind(self) -> Hashable:
        return self.stage, self.picture.shape

    @property
    def work(self) -> int:
        """Patches of 16 pixels a side, of which most backbones make a token."""
        return max(1, self.picture[0].numel() // 256)


@dataclass(frozen=True, eq=False)
class Score:
    """Score a latent under one noise sample, at its noise levels together."""

    latent: Tensor
    conditioning: Conditioning
    noise_levels: tuple[float, ...]
    noise: "Draws"
    draw: int
    """Which of the noise draws."""
    text_kind: Hashable
    """Rows whose conditioning can stand in one batch have equal ones."""
    tokens: int
    """Image and text tokens."""

    stage = "forward"

    @property
    def kind(self) -> Hashable:
        return self.stage, self.latent.shape, len(self.noise_levels), self.text_kind

    @property
    def work(self) -> int:
        """Tokens, each counted once a noise level."""
        return self.tokens * len(self.noise_levels)


@dataclass(frozen=True, eq=False)
class Row:
    """What is to be scored of one row of a request."""

    latent: Tensor
    conditioning: Conditioning
    noise_levels: tuple[float, ...]
    seed: int
    num_draws: int = 1


Unit = Encode | Score
Result = Encoded | float


class Draws:
    """The noise draws of a row, those of `seeded_noise`, each made when a pass wants it."""

    def __init__(self, row: Row) -> None:
        self._shape = row.latent.shape
        self._generator = seeded_generator(row.seed)
        self._made: dict[int, Tensor] = {}
        self._next = 0

    def __call__(self, index: int) -> Tensor:
        while self._next <= index:
            self._made[self._next] = torch.randn(self._shape, generator=self._generator, dtype=torch.float32)
            self._next += 1
        return self._made[index]

    def drop(self, index: int) -> None:
        """Forget a draw that has been scored."""
        self._made.pop(index, None)


def _not_finite(unit: Score) -> InvalidInputError:
    """What is wrong with a row whose score is not finite: it names the tensor with the largest value."""
    conditioning = unit.conditioning
    tensors = {"latents": unit.latent, "prompt_embeds": conditioning.prompt_embeds}
    if conditioning.pooled_prompt_embeds is not None:
        tensors["pooled_prompt_embeds"] = conditioning.pooled_prompt_embeds
    largest, name = max((tensor.float().abs().max().item(), name) for name, tensor in tensors.items())
    return InvalidInputError(
        f"{name}: a value of {largest:.3g} is far outside the usual range, the score is not finite"
    )


class Engine:
    """A reward, its costs, and its passes.

    Attributes:
        prompt_tokens: text tokens of a short prompt, known after `warm_up`; 0 without text encoders.
    """

    def __init__(self, model: RewardModel) -> None:
        self._model: RewardModel | None = model
        self.prompt_tokens = 0

    @property
    def model(self) -> RewardModel:
        assert self._model is not None, "the server has ended"
        return self._model

    def release(self) -> None:
        """Give the model's memory back; nothing can be scored any more."""
        self._model = None

    # ------------------------------------------------------------------------------------- costs

    def image_tokens(self, latent_shape: Sequence[int]) -> int:
        """Image tokens of a latent (channel, *frame, height, width)."""
        count = 1
        for side in latent_shape[1:]:
            count *= side
        return max(1, count // self.model.backbone.architecture.latent_multiple**2)

    def picture_tokens(self, height: int, width: int) -> int:
        """Image and text tokens of a picture that is encoded at this size."""
        encoders = self.model.encoders
        assert encoders is not None  # `picture_size` was asked before
        factor = pixels_per_latent(encoders.source.config("vae", "config.json"))
        return self.image_tokens((1, height // factor, width // factor)) + self.prompt_tokens

    # ------------------------------------------------------------------------------------- units

    def latent_rows(self, request: LatentRows, fresh_seeds: Sequence[int]) -> list[Row]:
        """The rows of a request of the latent protocol.

        Args:
            fresh_seeds: used where the request has none.

        Raises:
            InvalidInputError: they do not suit the model's backbone.
        """
        self.model.backbone.check_latents(request.latents, finite=False)
        conditioning = Conditioning(request.prompt_embeds, request.pooled_prompt_embeds)
        self.model.backbone.check_conditioning(conditioning, finite=False)
        seeds, levels = fresh_seeds if request.seeds is None else request.seeds, request.u.tolist()
        return [
            Row(
                request.latents[row].float(),
                Conditioning(
                    request.prompt_embeds[row : row + 1].float(),
                    request.pooled_prompt_embeds[row : row + 1].float(),
                ),
                (levels[row],),
                seeds[row],
            )
            for row in range(len(request))
        ]

    def score_unit(self, row: Row, noise: Draws, draw: int) -> Score:
        """One noise draw of a row."""
        conditioning = row.conditioning
        text = conditioning.prompt_embeds.shape[1]
        return Score(
            row.latent,
            conditioning,
            row.noise_levels,
            noise,
            draw,
            # Where the backbone masks padding, texts of any length stand in one batch.
            (
                None if self.model.backbone.masks_text else text,
                conditioning.pooled_prompt_embeds is None,
            ),
            self.image_tokens(row.latent.shape) + text,
        )

    # ------------------------------------------------------------------------------------- passes

    @torch.no_grad()
    def run(self, units: list[Unit]) -> list[Result | Exception]:
        """Results of units of one kind."""
        pictures = [unit for unit in units if isinstance(unit, Encode)]
        if pictures:
            return list(self._encode(pictures))
        return list(self._score([unit for unit in units if isinstance(unit, Score)]))

    def _encode(self, units: list[Encode]) -> list[Encoded]:
        prompts = list(dict.fromkeys(unit.prompt for unit in units))
        self.model.read_prompts(prompts)  # together; then one by one from the cache, without padding
        read = {prompt: self.model.read_prompts(prompt) for prompt in prompts}
        latents = self.model.encode_images([unit.picture for unit in units])
        return [
            Encoded(latent, conditioning, tuple(notes))
            for latent, (conditioning, notes) in zip(
                latents, (read[unit.prompt] for unit in units), strict=True
            )
        ]

    def _score(self, units: list[Score]) -> list[float | Exception]:
        device = self.model.device
        scores = self.model.score_checked(
            torch.stack([unit.latent.to(device) for unit in units]),
            joined_rows([unit.conditioning.to(device) for unit in units]).to(device),
            torch.arange(len(units), device=device),
            torch.tensor([unit.noise_levels for unit in units]).T,
            torch.stack([unit.noise(unit.draw) for unit in units]),
        )
        finite = torch.isfinite(scores).tolist()
        return [
            score if finite[index] else _not_finite(units[index])
            for index, score in enumerate(scores.tolist())
        ]

    def warm_up(self) -> None:
        """Score one small latent, and load the text encoders where there are any."""
        a = self.model.backbone.architecture
        side = a.latent_multiple * -(-8 // a.latent_multiple)
        shape = (a.latent_channels, *([1] if a.max_latent_frames is not None else []), side, side)
        row = Row(
            torch.zeros(shape),
            Conditioning(torch.zeros(1, 8, a.prompt_dim), torch.zeros(1, a.pooled_dim or 1)),
            (0.4,),
            0,
        )
        (result,) = self.run([self.score_unit(row, Draws(row), 0)])
        if isinstance(result, Exception):
            raise result
        encoders = self.model.encoders
        if encoders is not None and all(map(encoders.source.has, encoders.text.encoders)):
            conditioning = encoders.encode_prompts(["a picture"], self.model.device)
            self.prompt_tokens = conditioning.prompt_embeds.shape[1]
