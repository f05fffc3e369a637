"""Scores of latents by a server, for trainers that call a function: one client a process for each server."""

import functools
from collections.abc import Sequence

from torch import Tensor

from dina_lrm.core.conditioning import Conditioning
from dina_lrm.remote.client import Client

__all__ = ["score_latents"]


def score_latents(
    server_url: str,
    latents: Tensor,
    conditioning: Conditioning,
    sigma: Tensor,
    seeds: Sequence[int] | None,
    *,
    timeout_seconds: float = 120.0,
    max_retries: int = 5,
) -> list[float]:
    """Raw scores of clean latents, one for each; arguments and errors are those of `Client.score_latents`.

    Args:
        server_url: such as http://127.0.0.1:8000/v1/score.
        sigma: (batch,) noise levels in [0, 1].
    """
    return (
        _client(server_url, timeout_seconds, max_retries)
        .score_latents(latents, conditioning, sigma, seeds)
        .tolist()
    )


@functools.lru_cache(maxsize=8)
def _client(server_url: str, timeout_seconds: float, max_retries: int) -> Client:
    return Client(server_url, timeout_seconds=timeout_seconds, max_retries=max_retries)
