"""What a preparation is told, and what came of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dina_lrm.data.buckets import Size
from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.sources.own_rows import TIE
from dina_lrm.errors import InvalidInputError

__all__ = ["LoadEncoder", "PairEncoder", "PrepareSettings", "Prepared", "unwanted"]


@runtime_checkable
class PairEncoder(Protocol):
    """What preparing needs of a pipeline: `models.encoders.Encoders`."""

    def encode_images(self, images: Any, device: torch.device) -> list[Tensor]: ...

    def encode_prompts(self, prompts: Sequence[str], device: torch.device) -> Any: ...

    def prompt_notes(self, prompts: Sequence[str], device: torch.device) -> list[str]: ...

    def picture_size(self, height: int, width: int, name: str = ...) -> Size: ...

    @property
    def latent_space(self) -> str | None: ...


LoadEncoder = Callable[[str], PairEncoder]
"""Makes the encoder for a device in each process; it has to be picklable."""


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """What decides the bytes of the shards."""

    source: str
    split: str | None
    pipeline: str
    """Whose VAE and text encoders."""
    latent_space: str | None
    max_pixels: int | None
    mixed_sizes: Literal["pad", "reject"]
    ties: Literal["reject", "half"]
    min_confidence: float | None
    embeddings: bool
    prompt_dtype: Literal["float16", "float32"]
    max_text_tokens: int | None
    pairs_per_shard: int
    pairs_per_row_group: int
    files: dict[str, str]
    """Files of the source, with the digests of their content."""
    part: dict[str, Any] | None = None
    """Which part of the source this is, where it is split (`data.split.SourcePart`)."""

    def __post_init__(self) -> None:
        for name, least in (("pairs_per_shard", 1), ("pairs_per_row_group", 1), ("max_pixels", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidInputError(f"{name} = {value}: must be at least {least}")
        if self.min_confidence is not None and not 0 <= self.min_confidence <= 1:
            raise InvalidInputError(f"min_confidence = {self.min_confidence}: must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a finished folder holds."""

    num_items: int
    """Comparisons and rejects that the source gave."""
    num_pairs: int
    rejects: dict[str, int]
    """By the start of their reason. Pairs and rejects add up to the items."""
    num_prompts: int
    num_cut_prompts: int
    """Prompts that are longer than the encoders read, or have words that they do not know. Counted in the run
    that encoded them."""
    buckets: dict[str, int]
    """Pairs by latent shape."""
    num_bytes: int


def unwanted(
    item: Comparison, *, ties: Literal["reject", "half"], min_confidence: float | None
) -> str | None:
    """Why a comparison is not asked for, or None."""
    if item.pair.tie and ties == "reject":
        return TIE
    if min_confidence is not None and item.confidence is not None and item.confidence < min_confidence:
        return f"confidence: {item.confidence:g} is under {min_confidence:g}"
    return None
