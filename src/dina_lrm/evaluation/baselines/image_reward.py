"""ImageReward: BLIP reads the prompt with the picture before its eyes, a linear head gives one number."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dina_lrm.core.tensors import Score
from dina_lrm.errors import CheckpointError
from dina_lrm.evaluation.baselines.pixels import cropped_pixels
from dina_lrm.evaluation.baselines.scorer import score_in_batches
from dina_lrm.evaluation.baselines.weights import fill, load_part, loading, own_or, read_state, weights_file

__all__ = ["ImageReward"]

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
"""Mean and deviation of the head's output over ImageReward's own data: published with version 1.0."""
_MAX_TOKENS = 35
_HEAD_WIDTHS = (1024, 128, 64, 16)
_HEAD_WIDTH = 64
"""Channels of an attention head in BLIP's vision towers, base and large."""
_IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_TOWERS = ("blip.visual_encoder.", "blip.text_encoder.")
"""Whatever else BLIP holds (projections, matching head) is not on the way to a score."""
_POSITIONS = "blip.text_encoder.embeddings.position_ids"
"""0, 1, 2, ...: a buffer of older files."""


class ImageReward:
    """(head(CLS) - mean) / std, about standard normal over ImageReward's data (arXiv:2304.05977).

    The prompt's first 35 tokens attend to the picture (224 x 224, the middle square) in BLIP's text encoder;
    its first token goes through five linear layers. There is no activation between them: the published class
    has them commented out, so the head is one linear map in five factors.

    Args:
        vision: transformers' `BlipVisionModel`.
        text: transformers' `BlipTextModel` with cross-attention.
        head: (batch, width) to (batch, 1).
        tokenizer: BERT's, lower case.
        batch_size: pairs per forward pass; no effect on scores.
    """

    name = "imagereward"

    def __init__(
        self, vision: Any, text: Any, head: nn.Module, tokenizer: Any, *, batch_size: int = 16
    ) -> None:
        self.vision = vision.eval()
        self.text = text.eval()
        self.head = head.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path = "THUDM/ImageReward",
        *,
        tokenizer: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> "ImageReward":
        """From the published files, ImageReward.pt and med_config.json, in a folder or on the hub.

        Args:
            tokenizer: folder or hub id; None: the folder's own, else google-bert/bert-base-uncased.
            dtype: of the encoders; the head is float32.

        Raises:
            CheckpointError: a file is missing or damaged, or its tensors are not ImageReward's.
        """
        from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

        path = weights_file(location, "ImageReward.pt")
        config_path = weights_file(location, "med_config.json")
        with loading("the text encoder's config", str(config_path)):
            text_settings = json.loads(config_path.read_text(encoding="utf-8"))
        parts = split_state(read_state(path), str(path))
        vision: Any = BlipVisionModel(_vision_config(parts["vision"], str(path)))
        text: Any = BlipTextModel(_text_config(text_settings, parts), add_pooling_layer=False)
        head = reward_head(text.config.hidden_size)
        for module, name in ((vision, "vision"), (text, "text"), (head, "head")):
            fill(module, parts[name], f"{path} ({name})")
        if tokenizer is None:
            tokenizer = own_or(location, "tokenizer_config.json", "google-bert/bert-base-uncased")
        return cls(
            vision.to(device=device, dtype=dtype),
            text.to(device=device, dtype=dtype),
            head.to(device),
            load_part(AutoTokenizer, tokenizer),
            batch_size=batch_size,
        )

    def score(self, prompts: Sequence[str], images: Sequence[Any]) -> Score:
        """See `Scorer.score`."""
        return score_in_batches(prompts, images, self._score_batch, batch_size=self.batch_size)

    def _score_batch(self, prompts: list[str], images: list[Image.Image]) -> Tensor:
        device = self.vision.device
        pixels = cropped_pixels(images, self.vision.config.image_size)
        seen = self.vision(pixel_values=pixels.to(device=device, dtype=self.vision.dtype)).last_hidden_state
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        ).to(device)
        read = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
        ).last_hidden_state
        return ((self.head(read[:, 0].float()).squeeze(-1) - _MEAN) / _STD).cpu()


def reward_head(width: int) -> nn.Sequential:
    """width-1024-128-64-16-1. The published layers 1, 3 and 5 are dropout: they keep their numbers."""
    first, second, third, fourth = _HEAD_WIDTHS
    return nn.Sequential(
        nn.Linear(width, first),
        nn.Identity(),
        nn.Linear(first, second),
        nn.Identity(),
        nn.Linear(second, third),
        nn.Identity(),
        nn.Linear(third, fourth),
        nn.Linear(fourth, 1),
    )


def split_state(state: Mapping[str, Tensor], source: str) -> dict[str, dict[str, Tensor]]:
    """The published tensors as those of `BlipVisionModel` ("vision"), `BlipTextModel` ("text") and "head".

    The text encoder's names are the same in both; the vision tower is named as timm names it.

    Raises:
        CheckpointError: names that ImageReward does not have.
    """
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    unknown = []
    for name, tensor in state.items():
        if name == _POSITIONS or (name.startswith("blip.") and not name.startswith(_TOWERS)):
            continue
        if name.startswith("mlp.layers."):
            parts["head"][name.removeprefix("mlp.layers.")] = tensor
        elif name.startswith("blip.text_encoder."):
            parts["text"][name.removeprefix("blip.text_encoder.")] = tensor
        elif (found := _vision_name(name)) is not None:
            parts["vision"][found] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{source} has names unknown to ImageReward: {', '.join(sorted(unknown)[:5])}")
    return parts


def _vision_name(name: str) -> str | None:
    single = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
        "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
        "norm.weight": "post_layernorm.weight",
        "norm.bias": "post_layernorm.bias",
    }
    inner = name.removeprefix("blip.visual_encoder.")
    if inner in single:
        return single[inner]
    if not inner.startswith("blocks."):
        return None
    _, block, part = inner.split(".", 2)
    layer, _, kind = part.rpartition(".")
    return f"encoder.layers.{block}.{_IN_BLOCK[layer]}.{kind}" if layer in _IN_BLOCK else None


def _vision_config(state: Mapping[str, Tensor], source: str) -> Any:
    """All sizes from the tensors; the epsilon of BLIP's tower is 1e-6, not transformers' default."""
    from transformers import BlipVisionConfig

    with loading("the vision tower's sizes", source):
        patches = state["embeddings.patch_embedding.weight"]
        width, patch = patches.shape[0], patches.shape[-1]
        num_patches = state["embeddings.position_embedding"].shape[1] - 1
        return BlipVisionConfig(
            hidden_size=width,
            intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=1 + max(int(n.split(".")[2]) for n in state if n.startswith("encoder.layers.")),
            num_attention_heads=width // _HEAD_WIDTH,
            image_size=patch * round(num_patches**0.5),
            patch_size=patch,
            layer_norm_eps=1e-6,
        )


def _text_config(settings: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """From med_config.json; its encoder width is overridden by the vision tower's, as upstream does."""
    from transformers import BlipTextConfig

    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "hidden_act",
        "layer_norm_eps",
        "pad_token_id",
    )
    missing = [name for name in names if name not in settings]
    if missing or "embeddings.word_embeddings.weight" not in parts["text"]:
        raise CheckpointError(f"the text encoder lacks {', '.join(missing) or 'its word embeddings'}")
    return BlipTextConfig(
        **{name: settings[name] for name in names},
        vocab_size=parts["text"]["embeddings.word_embeddings.weight"].shape[0],
        encoder_hidden_size=parts["vision"]["embeddings.patch_embedding.weight"].shape[0],
        is_decoder=True,  # what builds the cross-attention; attention to the text stays bidirectional
    )
