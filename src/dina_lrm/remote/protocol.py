"""The latent scoring protocol, version 1: safetensors bytes to a server, raw scores back.

    POST /v1/score          x-drm-protocol-version: 1, content-type: application/octet-stream
    body                    latents, prompt_embeds, pooled_prompt_embeds, u, and seeds unless noise is fresh
    reply 200               {"protocol_version": "1", "raw_scores": [float, ...]}

Both ends are here: `pack` and `raw_scores` for a client, `unpack` for a server, which trusts nothing that it
reads.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.tensors import check_tensor
from dina_lrm.errors import InvalidInputError, ScoringError
from dina_lrm.models.scoring import check_sigma

__all__ = [
    "CONTENT_TYPE",
    "FIELDS",
    "PROTOCOL_VERSION",
    "VERSION_HEADER",
    "LatentRows",
    "pack",
    "raw_scores",
    "unpack",
]

PROTOCOL_VERSION = "1"
VERSION_HEADER = "x-drm-protocol-version"
CONTENT_TYPE = "application/octet-stream"

_SHAPES = {
    "latents": "(batch, channel, height, width)",
    "prompt_embeds": "(batch, token, dim)",
    "pooled_prompt_embeds": "(batch, dim)",
    "u": "(batch,)",
    "seeds": "(batch,)",
}
FIELDS = tuple(_SHAPES)
"""Tensors of a request."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LatentRows:
    """What a request asks to be scored; all tensors have one row per score."""

    latents: Tensor
    """(batch, channel, height, width), clean, shifted and scaled."""
    prompt_embeds: Tensor
    """(batch, token, dim)."""
    pooled_prompt_embeds: Tensor
    """(batch, dim)."""
    u: Tensor
    """(batch,) float32 noise levels in [0, 1]."""
    seeds: tuple[int, ...] | None
    """Seeds of the noise, one a row; None: fresh noise."""

    def __len__(self) -> int:
        return len(self.latents)


def pack(latents: Tensor, conditioning: Conditioning, u: Tensor, seeds: Sequence[int] | None) -> bytes:
    """The body of a request.

    Args:
        latents: (batch, channel, height, width), shifted and scaled.
        conditioning: one row per latent, with pooled embeddings.
        u: (batch,) noise levels in [0, 1].
        seeds: one per latent, in 64 bits; None: fresh noise at every call.

    Raises:
        InvalidInputError: something that the protocol does not allow.
    """
    embeds, pooled = conditioning.prompt_embeds, conditioning.pooled_prompt_embeds
    if pooled is None:
        raise InvalidInputError("pooled_prompt_embeds are missing: a server takes them beside prompt_embeds")
    mask = conditioning.attention_mask
    if mask is not None and not bool(mask.bool().all()):
        raise InvalidInputError("attention_mask hides tokens: the protocol has no mask")
    tensors = {"latents": latents, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "u": u.float()}
    _check(tensors)
    if seeds is not None:
        if outside := [seed for seed in seeds if not -(2**63) <= seed < 2**63]:
            raise InvalidInputError(f"seeds: {outside[0]} is outside [-2^63, 2^63)")
        tensors["seeds"] = torch.tensor(seeds, dtype=torch.int64)
    _check_rows(tensors)
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )


def unpack(body: bytes) -> LatentRows:
    """What `pack` has packed, read from bytes that may be anything.

    Raises:
        InvalidInputError: not such bytes; it names the tensor that is wrong.
    """
    try:
        tensors = safetensors.torch.load(body)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError, TypeError) as error:
        raise InvalidInputError(f"body: not safetensors bytes ({error})") from error
    if missing := [name for name in _SHAPES if name != "seeds" and name not in tensors]:
        raise InvalidInputError(f"{missing[0]}: missing; the body has {sorted(tensors)[:8]}")
    if unknown := sorted(tensors.keys() - _SHAPES.keys()):
        raise InvalidInputError(f"{unknown[0][:80]!r}: unknown; the body may hold {list(_SHAPES)}")
    seeds = tensors.pop("seeds", None)
    if tensors["u"].dtype != torch.float32:
        raise InvalidInputError(f"u: dtype {_name(tensors['u'])}, expected float32")
    _check(tensors)
    if seeds is not None:
        if seeds.dtype != torch.int64 or seeds.ndim != 1:
            raise InvalidInputError(
                f"seeds: {_name(seeds)} of shape {tuple(seeds.shape)}, expected int64 of shape (batch,)"
            )
        tensors["seeds"] = seeds
    _check_rows(tensors)
    tensors.pop("seeds", None)
    return LatentRows(**tensors, seeds=None if seeds is None else tuple(seeds.tolist()))


def raw_scores(reply: bytes, count: int, url: str) -> list[float]:
    """The scores in a reply.

    Raises:
        ScoringError: the reply breaks the protocol.
    """
    try:
        content = json.loads(reply)
    except ValueError as error:
        raise ScoringError(f"{url} answers with {reply[:200]!r}, which is not JSON") from error
    version = content.get("protocol_version") if isinstance(content, dict) else None
    if version != PROTOCOL_VERSION:
        raise ScoringError(f"{url} speaks protocol version {version!r}: this is {PROTOCOL_VERSION!r}")
    scores = content.get("raw_scores")
    if not isinstance(scores, list) or len(scores) != count or not all(map(_is_finite, scores)):
        raise ScoringError(f"{url} answers raw_scores = {scores!r}: expected {count} finite numbers")
    return [float(score) for score in scores]


def _check(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        shape = _SHAPES[name]
        if tensor.dtype not in _FLOATS:
            raise InvalidInputError(f"{name}: dtype {_name(tensor)}, expected float32, float16 or bfloat16")
        check_tensor(tensor, name, shape.count(",") + (shape != "(batch,)"), shape, finite=True)
    check_sigma(tensors["u"], "u")


def _check_rows(tensors: dict[str, Tensor]) -> None:
    rows = {name: len(tensor) for name, tensor in tensors.items()}
    for name, count in rows.items():
        if count != rows["latents"]:
            raise InvalidInputError(f"{name}: {count} rows for {rows['latents']} latents")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
