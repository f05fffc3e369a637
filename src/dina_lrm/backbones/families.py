"""Which backbone reads which diffusers class. A new backbone is one file and one line here."""

from collections.abc import Mapping
from typing import Any

from dina_lrm.backbones.architecture import Architecture
from dina_lrm.backbones.backbone import Backbone
from dina_lrm.backbones.flux import FluxBackbone
from dina_lrm.backbones.qwen_image import QwenImageBackbone
from dina_lrm.backbones.sd3 import SD3Backbone
from dina_lrm.backbones.unet import UNetBackbone
from dina_lrm.backbones.wan import WanBackbone
from dina_lrm.backbones.z_image import ZImageBackbone
from dina_lrm.errors import CheckpointError

BACKBONES: tuple[type[Backbone], ...] = (
    SD3Backbone,
    FluxBackbone,
    ZImageBackbone,
    QwenImageBackbone,
    UNetBackbone,
    WanBackbone,
)


def backbone_class(family: str | None) -> type[Backbone]:
    """The backbone of a family's name, as a config states it."""
    for backbone in BACKBONES:
        if backbone.family == family:
            return backbone
    raise CheckpointError(f"unknown backbone family {family!r}; known: {[b.family for b in BACKBONES]}")


def backbone_of(architecture: Architecture) -> type[Backbone]:
    """The backbone that reads an architecture."""
    return next(b for b in BACKBONES if isinstance(architecture, b.architecture_class))


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """From a transformer's or UNet's config.json, by its `_class_name`."""
    kind = config.get("_class_name")
    for backbone in BACKBONES:
        if backbone.architecture_class.diffusers_class == kind:
            return backbone.architecture_class.from_config(config)
    known = ", ".join(b.architecture_class.diffusers_class for b in BACKBONES)
    raise CheckpointError(f"no backbone reads a {kind}: known are {known}")


def lora_config(
    family: str | None, *, rank: int, alpha: float, num_blocks: int, adapts_last_text: bool
) -> Any:
    """PEFT's config for the reward adapter: which projections depends on the family.

    Args:
        num_blocks: blocks that are kept.
        adapts_last_text: whether the text stream of the last of them is read. Where not, projections that
            only it needs are left out there.
    """
    from peft import LoraConfig

    backbone = backbone_class(family)
    last = f"transformer_blocks.{num_blocks - 1}.attn."
    excluded = None if adapts_last_text else [last + name for name in backbone.lora_text_targets]
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        target_modules=list(backbone.lora_targets),
        exclude_modules=excluded or None,
        init_lora_weights="gaussian",
    )
