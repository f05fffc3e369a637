"""What every diffusion backbone offers to the reward head.

A backbone adapter turns latents, text conditioning and a noise level into token features. Patching, position
tables and timestep conventions stay inside the adapter: outside there are only unpacked latents
`(batch, channel, height, width)`, already shifted and scaled, and sigma, with 0 clean and 1 pure noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from dina_lrm.core.noise import NoiseSchedule
from dina_lrm.core.tensors import Features
from dina_lrm.errors import InvalidInputError


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts, one row each, as the generator's own text encoders give them."""

    prompt_embeds: Tensor
    """(prompt, token, dim)"""
    pooled_prompt_embeds: Tensor | None = None
    """(prompt, dim), for the backbones that take a pooled vector"""
    attention_mask: Tensor | None = None
    """(prompt, token), 1 for real tokens; SD3 attends to all tokens and takes none"""

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    def index_select(self, rows: Tensor) -> "Conditioning":
        """Rows in a new order, with repeats where wanted."""
        return self._map(lambda field: field.index_select(0, rows.to(field.device)))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Conditioning":
        """Move, and cast the embeddings; the mask keeps its type."""
        mask = self.attention_mask
        moved = Conditioning(self.prompt_embeds, self.pooled_prompt_embeds)._map(
            lambda field: field.to(device=device, dtype=dtype)
        )
        return Conditioning(
            moved.prompt_embeds, moved.pooled_prompt_embeds, None if mask is None else mask.to(device=device)
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        fields = (self.prompt_embeds, self.pooled_prompt_embeds, self.attention_mask)
        embeds, pooled, mask = (None if field is None else change(field) for field in fields)
        assert embeds is not None
        return Conditioning(embeds, pooled, mask)


@dataclass(frozen=True)
class EmbeddedConditioning:
    """Conditioning after the backbone's own context projection: the part that no noise level changes.

    Computed once per prompt, then shared by all of its pictures, noise levels and draws.
    """

    context: Features
    pooled: Float[Tensor, "batch pooled"]

    def __len__(self) -> int:
        return self.context.shape[0]

    def index_select(self, rows: Tensor) -> "EmbeddedConditioning":
        return EmbeddedConditioning(self.context.index_select(0, rows), self.pooled.index_select(0, rows))


@dataclass(frozen=True)
class BackboneFeatures:
    """Tokens read inside the backbone, and its noise-and-text embedding."""

    image: tuple[Float[Tensor, "batch image_token dim"], ...]
    """One per image tap, ascending."""
    text: tuple[Float[Tensor, "batch text_token dim"], ...]
    """One per text tap, ascending; empty where text is not read."""
    temb: Float[Tensor, "batch embedding"]
    """The backbone's time and pooled-text embedding, before any non-linearity."""


class Backbone(Protocol):
    """A truncated diffusion backbone. `models/sd3.py` is the first implementation."""

    schedule: NoiseSchedule
    image_taps: tuple[int, ...]
    text_taps: tuple[int, ...]
    num_blocks: int
    token_dim: int
    embedding_dim: int

    def check_latents(self, latents: Tensor, *, finite: bool = True) -> None:
        """Raise InvalidInputError unless the latents suit this backbone."""
        ...

    def check_conditioning(self, conditioning: Conditioning, *, finite: bool = True) -> None:
        """Raise InvalidInputError unless the conditioning suits this backbone."""
        ...

    def embed(self, conditioning: Conditioning) -> EmbeddedConditioning:
        """Context projection, row by row."""
        ...

    def features(
        self, noisy_latents: Tensor, embedded: EmbeddedConditioning, sigma: Tensor
    ) -> BackboneFeatures:
        """Run the blocks up to the last tap; one row of `embedded` per latent."""
        ...

    def __call__(self, noisy_latents: Tensor, conditioning: Conditioning, sigma: Tensor) -> BackboneFeatures:
        """`features(noisy_latents, embed(conditioning), sigma)`, a single conditioning row serving all."""
        ...


def rows_for(count: int, batch: int, device: torch.device, *, what: str = "conditioning") -> Tensor:
    """Which conditioning row each of `batch` latents reads: its own, or the only one there is."""
    if count not in (1, batch):
        raise InvalidInputError(
            f"{what} has {count} rows for {batch} latents: give one row, or one per latent"
        )
    return (
        torch.zeros(batch, dtype=torch.long, device=device)
        if count == 1
        else torch.arange(batch, device=device)
    )


def check_tensor(value: object, name: str, num_axes: int, layout: str, *, finite: bool) -> None:
    """Shape and value checks whose messages name the tensor; `finite` costs a pass over it."""
    if not isinstance(value, Tensor):
        raise InvalidInputError(f"{name} must be a tensor {layout}, not {type(value).__name__}")
    if value.ndim != num_axes:
        raise InvalidInputError(f"{name} has shape {tuple(value.shape)}: it must be {layout}")
    if not value.is_floating_point():
        raise InvalidInputError(f"{name} has dtype {value.dtype}: it must be a floating type")
    if 0 in value.shape:
        raise InvalidInputError(f"{name} has shape {tuple(value.shape)}: no axis may be empty")
    if finite and value.device.type != "meta" and not torch.isfinite(value).all():
        raise InvalidInputError(f"{name} holds {int((~torch.isfinite(value)).sum())} NaN or infinite values")
