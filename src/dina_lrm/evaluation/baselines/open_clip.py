"""Names of a CLIP in open_clip's state dict, translated into those of transformers' `CLIPModel`.

open_clip keeps query, key and value in one matrix, and multiplies features by a projection from the right,
where transformers has a linear layer: `visual.proj` and `text_projection` are transposed.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from dina_lrm.errors import CheckpointError

__all__ = ["clip_state_from_open_clip"]

_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_SINGLE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' own spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BUFFERS = {"attn_mask"}
"""Computed, not learnt; older files carry it."""


def clip_state_from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under transformers' names; views where possible, nothing is copied.

    Args:
        state: of an open_clip `CLIP` whose two towers are plain transformers, such as ViT-H-14.

    Raises:
        CheckpointError: a name that such a model does not have.
    """
    converted: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        block = _BLOCK.fullmatch(name)
        if name in _SINGLE:
            converted[_SINGLE[name]] = tensor
        elif name in _TRANSPOSED:
            converted[_TRANSPOSED[name]] = tensor.T
        elif block is not None:
            tower = "vision_model" if block[1] else "text_model"
            parts = _block_part(block[3], tensor)
            converted |= {f"{tower}.encoder.layers.{block[2]}.{part}": value for part, value in parts.items()}
            if not parts:
                unknown.append(name)
        elif name not in _BUFFERS:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"not the weights of an open_clip ViT: {', '.join(sorted(unknown)[:5])}")
    return converted


def _block_part(part: str, tensor: Tensor) -> dict[str, Tensor]:
    """Empty for an unknown name."""
    layer, _, kind = part.rpartition(".")
    if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = part.removeprefix("attn.in_proj_")
        names = (f"self_attn.{which}_proj.{kind}" for which in "qkv")
        return dict(zip(names, tensor.chunk(3), strict=True))
    if layer in _IN_BLOCK and kind in ("weight", "bias"):
        return {f"{_IN_BLOCK[layer]}.{kind}": tensor}
    return {}
