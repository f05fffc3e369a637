"""What a scene has where, at the resolution of the denoiser's image tokens: a second thing to learn from.

The flow loss tells a denoiser every latent value and nothing of what the values mean. Features that must also
name what is drawn learn to draw it sooner: representation alignment (REPA, arXiv:2410.06940), with the true
scene in the place of another network's features. The text encoder alone learns from it first: which of two
objects a caption puts on the left decides a small share of the flow loss, and only close to pure noise, so a
denoiser of this size leaves it at chance; asked directly, the encoder finds it within minutes. The read-outs
are used in training only and do not ship.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dina_lrm.shapes.geometry import CANVAS, SHAPES, coverage
from dina_lrm.shapes.scenes import COLOURS, Scene

GRID = 8
"""Image tokens along each side of the picture."""
CHANNELS = len(SHAPES) + len(COLOURS) + 3
ALIGNED_BLOCK = 3
"""The read-out sees the image tokens after this many blocks: the lower half, as in the paper."""


def scene_layout(scene: Scene) -> np.ndarray:
    """float32 (GRID * GRID, CHANNELS), tokens row by row.

    For each token, in this order: the share of its pixels that each shape covers; the share that each colour
    covers; and, weighted by the share covered, the way from the token's centre to the object's (x, y) and the
    object's radius, in quarters of the canvas.
    """
    cell = CANVAS // GRID
    layout = np.zeros((GRID, GRID, CHANNELS), dtype=np.float32)
    centres = (np.arange(GRID) + 0.5) * cell - 0.5
    unit = CANVAS / 4
    for item in scene.objects:
        share = coverage(item.shape, item.x, item.y, item.radius)
        share = share.reshape(GRID, cell, GRID, cell).mean(axis=(1, 3))
        layout[..., SHAPES.index(item.shape)] += share
        layout[..., len(SHAPES) + list(COLOURS).index(item.colour)] += share
        layout[..., -3] += share * (item.x - centres[None, :]) / unit
        layout[..., -2] += share * (item.y - centres[:, None]) / unit
        layout[..., -1] += share * item.radius / unit
    return layout.reshape(GRID * GRID, CHANNELS)


class LayoutReadout(nn.Module):
    """Predicts the layout of the clean scene from a transformer's image tokens, (batch, token, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, CHANNELS))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


class TextReadout(nn.Module):
    """Predicts the expected layout from a caption's tokens, (batch, token, width): each place asks them
    once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.places = nn.Parameter(0.5 * torch.randn(GRID * GRID, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, CHANNELS)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.places.expand(len(tokens), -1, -1)
        answers, _ = self.attention(places, tokens, tokens, need_weights=False)
        return self.layers(places + answers)


def layout_scale(layouts: Tensor) -> Tensor:
    """(channel,) spread of each channel over a pool of layouts (picture, token, channel): errors are measured
    in it."""
    return layouts.float().std(dim=(0, 1)).clamp(min=1e-3)


def collect_tokens(transformer: Any) -> dict[str, Tensor]:
    """A dictionary whose "image" is, after every forward pass of `transformer`, what the read-out sees."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        seen["image"] = output[1]

    blocks = transformer.transformer_blocks
    blocks[min(ALIGNED_BLOCK, len(blocks) - 1) - 1].register_forward_hook(keep)
    return seen
