"""A client of the latent scoring protocol, version 1: safetensors bytes to a server, raw scores back.

    POST server_url         x-drm-protocol-version: 1, content-type: application/octet-stream
    body                    latents, prompt_embeds, pooled_prompt_embeds, u, and seeds unless noise is fresh
    reply 200               {"protocol_version": "1", "raw_scores": [float, ...]}

Only what may pass is tried again: no connection, a time-out, HTTP 408, 429 and 5xx. What the server refuses,
or answers against the protocol, it would refuse and answer again.
"""

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

import torch
from safetensors.torch import save
from torch import Tensor

from dina_lrm.errors import InvalidInputError, ScoringError
from dina_lrm.models.backbone import Conditioning, check_tensor
from dina_lrm.models.scoring import check_sigma

PROTOCOL_VERSION = "1"
LATENT_CHANNELS = 16
"""Of every latent that the protocol carries."""
BACKOFF_SECONDS = 0.5
"""Before the first repetition; twice as long before each one after it."""
_PASSING = (408, 429)


def score_latents(
    server_url: str,
    latents: Tensor,
    conditioning: Conditioning,
    sigma: Tensor,
    seeds: Sequence[int] | None,
    *,
    timeout_seconds: float = 120.0,
    max_retries: int = 2,
) -> list[float]:
    """Raw scores of clean latents by a server, one for each.

    Args:
        server_url: such as http://127.0.0.1:8000/v1/score.
        latents: (batch, 16, height, width), shifted and scaled.
        conditioning: one row per latent, with pooled embeddings.
        sigma: (batch,) noise levels in [0, 1].
        seeds: one per latent, in 64 bits; None: fresh noise at every call.
        timeout_seconds: of one attempt.

    Raises:
        InvalidInputError: something that the protocol does not allow, before anything is sent.
        ScoringError: the server cannot be reached, refuses, or breaks the protocol.
    """
    if not server_url.startswith(("http://", "https://")):
        raise InvalidInputError(f"server_url = {server_url!r}: it must start with http:// or https://")
    body = _body(latents, conditioning, sigma, seeds)
    attempts = 0
    while True:
        try:
            return _raw_scores(_post(server_url, body, timeout_seconds), len(latents), server_url)
        except _PassingError as problem:
            attempts += 1
            if attempts > max_retries:
                raise ScoringError(
                    f"{server_url} gave no score in {attempts} attempts, at last: {problem}"
                ) from problem
            time.sleep(max(BACKOFF_SECONDS * 2 ** (attempts - 1), problem.retry_after_seconds))


class _PassingError(Exception):
    def __init__(self, message: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


def _body(latents: Tensor, conditioning: Conditioning, sigma: Tensor, seeds: Sequence[int] | None) -> bytes:
    embeds, pooled = conditioning.prompt_embeds, conditioning.pooled_prompt_embeds
    check_tensor(latents, "latents", 4, f"(batch, {LATENT_CHANNELS}, height, width)", finite=True)
    if latents.shape[1] != LATENT_CHANNELS:
        raise InvalidInputError(f"latents have {latents.shape[1]} channels: a server takes {LATENT_CHANNELS}")
    check_tensor(embeds, "prompt_embeds", 3, "(batch, token, dim)", finite=True)
    if pooled is None:
        raise InvalidInputError("pooled_prompt_embeds are missing: a server takes them beside prompt_embeds")
    check_tensor(pooled, "pooled_prompt_embeds", 2, "(batch, dim)", finite=True)
    check_sigma(sigma, "u")
    tensors = {
        "latents": latents,
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "u": sigma.float(),
    }
    if seeds is not None:
        tensors["seeds"] = torch.tensor(seeds, dtype=torch.int64)
    rows = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(rows.values())) > 1:
        raise InvalidInputError(f"rows differ: {rows}; a server takes one of each per latent")
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _post(url: str, body: bytes, timeout_seconds: float) -> bytes:
    headers = {"content-type": "application/octet-stream", "x-drm-protocol-version": PROTOCOL_VERSION}
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        with error:
            text = error.read(2000).decode(errors="replace")
        message = f"HTTP {error.code}: {text}"
        if error.code in _PASSING or error.code >= 500:
            wait = error.headers.get("Retry-After", "")
            raise _PassingError(
                message, min(float(wait), timeout_seconds) if wait.isdigit() else 0.0
            ) from error
        raise ScoringError(f"{url} refuses: {message}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _PassingError(f"{type(error).__name__}: {error}") from error


def _raw_scores(reply: bytes, count: int, url: str) -> list[float]:
    try:
        content = json.loads(reply)
    except ValueError as error:
        raise ScoringError(f"{url} answers with {reply[:200]!r}, which is not JSON") from error
    version = content.get("protocol_version") if isinstance(content, dict) else None
    if version != PROTOCOL_VERSION:
        raise ScoringError(
            f"{url} speaks protocol version {version!r}: this client speaks {PROTOCOL_VERSION!r}"
        )
    scores = content.get("raw_scores")
    if not isinstance(scores, list) or len(scores) != count or not all(map(_is_finite, scores)):
        raise ScoringError(f"{url} answers raw_scores = {scores!r}: expected {count} finite numbers")
    return [float(score) for score in scores]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
