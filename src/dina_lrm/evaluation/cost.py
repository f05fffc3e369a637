"""What one score costs: floating-point operations and the memory of the weights, counted without computing.

The model is on the meta device, so that a network of twelve billion weights is counted in a second.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from dina_lrm.backbones.architecture import Architecture, stored_dtype
from dina_lrm.backbones.flux import FLUX1_DEV
from dina_lrm.backbones.lora import tuner_layers
from dina_lrm.backbones.qwen_image import QWEN_IMAGE
from dina_lrm.backbones.sd3 import SD35_LARGE, SD35_MEDIUM
from dina_lrm.backbones.unet import SD15, SDXL
from dina_lrm.backbones.wan import WAN21_1B
from dina_lrm.backbones.z_image import Z_IMAGE
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.reward_model import RewardModel

__all__ = [
    "FULL_SIZE",
    "PROMPT_LENGTHS",
    "TEXT_TOKENS",
    "MeasuredCost",
    "ScoreFlops",
    "counted_flops",
    "limited_text_tokens",
    "peak_memory_bytes",
    "reset_peak_memory",
    "score_flops",
    "weight_bytes",
]

FULL_SIZE: dict[str, Architecture] = {
    "stabilityai/stable-diffusion-3.5-medium": SD35_MEDIUM,
    "stabilityai/stable-diffusion-3.5-large": SD35_LARGE,
    "black-forest-labs/FLUX.1-dev": FLUX1_DEV,
    "Tongyi-MAI/Z-Image-Turbo": Z_IMAGE,
    "Qwen/Qwen-Image": QWEN_IMAGE,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": WAN21_1B,
}
"""Shapes of the generators that have a recipe, by hub id, so that nothing is fetched to count them."""

PROMPT_LENGTHS: dict[str, dict[str, int]] = {
    "sd3": {"tokenizer": 77, "tokenizer_3": 256},
    "flux": {"tokenizer_2": 512},
    "wan": {"tokenizer": 512},
    "unet": {"tokenizer": 77},
    "z_image": {"tokenizer": 128},
    "qwen_image": {"tokenizer": 128},
}
"""Tokens that a backbone reads of a prompt, by family and by the tokenizer that makes them. Z-Image and
Qwen-Image mask padding, so theirs depend on the prompt: a long one of 128 is assumed. The others read what
their pipelines pad every prompt to."""

TEXT_TOKENS = {family: sum(lengths.values()) for family, lengths in PROMPT_LENGTHS.items()}
"""Their sum, to plan with."""


def limited_text_tokens(family: str, limits: Mapping[str, int]) -> int:
    """The same for a pipeline whose tokenizers have limits of their own.

    >>> TEXT_TOKENS["sd3"], limited_text_tokens("sd3", {"tokenizer": 77, "tokenizer_3": 77})
    (333, 154)
    """
    usual = PROMPT_LENGTHS[family]
    return sum(min(length, limits.get(tokenizer, length)) for tokenizer, length in usual.items())


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
        InvalidInputError: the model is not on the meta device, or the backbone cannot take such a picture.
    """
    if model.device.type != "meta":
        raise InvalidInputError('FLOPs are counted on shapes: make the model with device="meta"')
    model = (
        copy.deepcopy(model).eval().requires_grad_(False)
    )  # the counter cannot follow views of trained weights
    backbone, a = model.backbone, model.backbone.architecture
    tokens = TEXT_TOKENS[backbone.family] if text_tokens is None else text_tokens
    with torch.device("meta"):
        side = backbone.pixels_per_latent
        latents = torch.empty(num_levels, a.latent_channels, height // side, width // side)
        backbone.check_latents(latents)
        conditioning = Conditioning(
            torch.empty(num_levels, tokens, a.prompt_dim),
            None if a.pooled_dim is None else torch.empty(num_levels, a.pooled_dim),
        )
        timestep = torch.empty(num_levels)
        for layer in tuner_layers(backbone.parts):
            layer.enable_adapters(False)
        with FlopCounterMode(display=False) as in_backbone:
            features = backbone.features_at(latents, conditioning, timestep)
        with FlopCounterMode(display=False) as in_head:
            model.score_tokens(model.tokens(features).unfold(num_levels))
    return ScoreFlops(backbone=in_backbone.get_total_flops(), head=in_head.get_total_flops())


def weight_bytes(model: RewardModel) -> int:
    """Memory of the weights for scoring in bfloat16: of base weights and position tables as they are stored
    then, LoRA and head in float32."""
    parts = model.backbone.parts
    stored = {name: tensor for name, tensor in parts.state_dict().items() if ".lora_" not in name}
    base = sum(
        tensor.numel() * stored_dtype(parts, name, torch.bfloat16).itemsize for name, tensor in stored.items()
    )
    counts = model.num_parameters()
    return base + torch.float32.itemsize * (counts["total"] - counts["backbone"])


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredCost:
    """What one score of one picture took, encoding and all, as it was measured."""

    flops: int | None
    """Counted by torch on one picture; None where it cannot (`counted_flops`)."""
    seconds: float
    """Mean over pictures, in batches."""
    peak_memory_bytes: int
    """See `peak_memory_bytes`."""
    batch_size: int


def counted_flops(run: Callable[[], object]) -> int | None:
    """Floating-point operations of a call, two for each multiply-add.

    None where torch's counter cannot follow it: it refuses modules that are handed weights in training
    (`requires_grad_(False)` helps), and sees nothing of a model that computes elsewhere.
    """
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            run()
    except AssertionError:
        return None
    return int(counter.get_total_flops()) or None


_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory() -> None:
    """Begin a new measurement of `peak_memory_bytes`: on a GPU and on Linux; elsewhere the old peak stays."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def peak_memory_bytes() -> int:
    """The largest amount of memory that was in use at once since `reset_peak_memory`: of the GPU if it was
    used, otherwise of the whole process, Python and libraries included."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
