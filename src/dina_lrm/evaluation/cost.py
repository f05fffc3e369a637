"""What one score costs: floating-point operations and the memory of the weights, counted without computing.

The model is on the meta device, so that a network of twelve billion weights is counted in a second.
"""

import copy
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from dina_lrm.models.backbone import Conditioning
from dina_lrm.models.lora import borrowed
from dina_lrm.models.reward_model import RewardModel

__all__ = ["TEXT_TOKENS", "ScoreFlops", "score_flops", "weight_bytes"]

TEXT_TOKENS = {"sd3": 333, "flux": 512, "wan": 512, "unet": 77, "z_image": 128, "qwen_image": 128}
"""Tokens of a prompt by family. Z-Image and Qwen-Image mask padding, so theirs depend on the prompt: a long
one of 128 is assumed. The others pad every prompt to what their pipelines pad it to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreFlops:
    """Floating-point operations of one score of one latent, two for each multiply-add."""

    backbone: int
    """Embedders and blocks up to the last tap, at every noise level."""
    head: int

    @property
    def total(self) -> int:
        return self.backbone + self.head


@torch.no_grad()
def score_flops(
    model: RewardModel, height: int, width: int, *, num_levels: int = 1, text_tokens: int | None = None
) -> ScoreFlops:
    """Count a score as `RewardModel.score_latents` computes it: K rows in the backbone, then one in the head.

    Args:
        model: on the meta device. LoRA counts as merged, which it is when scoring.
        height, width: of the picture, in pixels.
        num_levels: K, noise levels of a token-level ensemble.
        text_tokens: of the prompt; None: `TEXT_TOKENS` of the family.

    Raises:
        ValueError: the model is not on the meta device.
    """
    if model.device.type != "meta":
        raise ValueError('FLOPs are counted on shapes: make the model with device="meta"')
    model = copy.deepcopy(model).requires_grad_(False)  # the counter cannot follow views of trained weights
    backbone, a = model.backbone, model.backbone.architecture
    tokens = TEXT_TOKENS[backbone.family] if text_tokens is None else text_tokens
    with torch.device("meta"):
        side = backbone.pixels_per_latent
        latents = torch.empty(num_levels, a.latent_channels, height // side, width // side)
        conditioning = Conditioning(
            torch.empty(num_levels, tokens, a.prompt_dim),
            None if a.pooled_dim is None else torch.empty(num_levels, a.pooled_dim),
        )
        timestep = torch.empty(num_levels)
        with borrowed(backbone.parts, None), FlopCounterMode(display=False) as in_backbone:
            features = backbone.features_at(latents, conditioning, timestep)
        with FlopCounterMode(display=False) as in_head:
            model.score_tokens(model.tokens(features).unfold(num_levels))
    return ScoreFlops(backbone=in_backbone.get_total_flops(), head=in_head.get_total_flops())


def weight_bytes(model: RewardModel) -> int:
    """Memory of the base weights, LoRA and head, each in the precision it is kept in."""
    parameters = {id(p): p for module in (model, model.backbone.parts) for p in module.parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values())
