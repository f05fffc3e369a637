"""Latents as tokens of patches, and the shift of noise levels that goes by their number."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """(batch, channel, height, width) to tokens of 2 x 2 patches, channel first, as FLUX and Qwen do it."""
    from einops import rearrange

    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse, for a grid of rows x columns patches."""
    from einops import rearrange

    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=columns, p=2, q=2)


def set_shifted_timesteps(scheduler: Any, num_steps: int, num_tokens: int) -> None:
    """Even levels, shifted by the number of image tokens, as FLUX, Qwen-Image and Z-Image sample."""
    mu = linear_shift(scheduler.config, num_tokens)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)


def linear_shift(config: Mapping[str, Any], num_tokens: int) -> float:
    """mu of a scheduler with dynamic shifting: a straight line in the number of image tokens.

    Source: Esser et al., arXiv:2403.03206, section 5.3.2, with the constants of the scheduler's config.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (top - base) * (num_tokens - low) / (high - low)
