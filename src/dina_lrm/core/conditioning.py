"""Encoded prompts, as every backbone and the head are given them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts, one row each, as the generator's own text encoders give them."""

    prompt_embeds: Tensor
    """(prompt, token, dim)"""
    pooled_prompt_embeds: Tensor | None = None
    """(prompt, dim), for the backbones that take a pooled vector: SD3, FLUX.1, SDXL"""
    attention_mask: Tensor | None = None
    """(prompt, token), 1 for real tokens, for the backbones that mask padding: Z-Image, Qwen-Image"""

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
