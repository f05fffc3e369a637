"""Scorers that are one angle between the text's and the picture's features: CLIP score, PickScore, HPSv2."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dina_lrm.core.tensors import Score
from dina_lrm.evaluation.baselines.open_clip import clip_state_from_open_clip
from dina_lrm.evaluation.baselines.pixels import padded_pixels
from dina_lrm.evaluation.baselines.scorer import score_in_batches
from dina_lrm.evaluation.baselines.weights import fill, load_part, own_or, read_state, weights_file

__all__ = ["ClipScore", "HPSv2", "PickScore"]

_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_PROCESSOR_FILE = "preprocessor_config.json"


class ClipScore:
    """100 times the cosine between CLIP's features of text and picture, in [-100, 100].

    Not clipped at 0 and not multiplied by 2.5, both of which arXiv:2104.08718 does: that changes no order of
    positive cosines. Prompts are cut at the text tower's length (77 tokens).

    Args:
        model: transformers' `CLIPModel` or a model with the same two feature methods.
        tokenizer: its tokenizer.
        to_pixels: pictures to (batch, 3, height, width), resized and normalised.
        batch_size: pairs per forward pass; no effect on scores.
    """

    name = "clip-score"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        to_pixels: Callable[[list[Image.Image]], Tensor],
        *,
        batch_size: int = 16,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.to_pixels = to_pixels
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path = "openai/clip-vit-large-patch14",
        *,
        processor: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> "ClipScore":
        """From a hub id or a folder of `save_pretrained`.

        Args:
            processor: where tokenizer and image processor lie; None: with the model.

        Raises:
            CheckpointError: a part is missing or damaged.
        """
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        model = load_part(CLIPModel, location).to(device=device, dtype=dtype)
        processor = location if processor is None else processor
        tokenizer = load_part(AutoTokenizer, processor)
        image_processor = load_part(AutoImageProcessor, processor)

        def to_pixels(images: list[Image.Image]) -> Tensor:
            return image_processor(images=images, return_tensors="pt")["pixel_values"]

        return cls(model, tokenizer, to_pixels, batch_size=batch_size)

    @property
    def scale(self) -> float:
        """What the cosine is multiplied by."""
        return 100.0

    def score(self, prompts: Sequence[str], images: Sequence[Any]) -> Score:
        """See `Scorer.score`."""
        return score_in_batches(prompts, images, self._score_batch, batch_size=self.batch_size)

    def _score_batch(self, prompts: list[str], images: list[Image.Image]) -> Tensor:
        tokens = self.tokenizer(
            prompts,
            padding=True,  # causal, and read at the end token: padding cannot be seen
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        text = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        pixels = self.to_pixels(images).to(device=self.model.device, dtype=self.model.dtype)
        image = self.model.get_image_features(pixel_values=pixels)
        cosine = (_unit_features(text) * _unit_features(image)).sum(dim=-1)
        return (self.scale * cosine).cpu()


class PickScore(ClipScore):
    """exp(logit scale) times the cosine, as PickScore's model card computes it (arXiv:2305.01569).

    A difference of scores of two pictures is the log-odds that the first is preferred.
    """

    name = "pickscore"

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path = "yuvalkirstain/PickScore_v1",
        *,
        processor: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> "PickScore":
        """See `ClipScore.from_pretrained`; processor None: the folder's own, else that of LAION's CLIP-H."""
        processor = own_or(location, _PROCESSOR_FILE, _CLIP_H) if processor is None else processor
        scorer = super().from_pretrained(
            location, processor=processor, device=device, dtype=dtype, batch_size=batch_size
        )
        assert isinstance(scorer, PickScore)
        return scorer

    @property
    def scale(self) -> float:
        """exp of the learnt logit scale, about 100."""
        return float(self.model.logit_scale.float().exp())


class HPSv2(ClipScore):
    """The cosine of CLIP-H fine-tuned on HPD v2 (arXiv:2306.09341), in [-1, 1]; in practice about 0.2 to 0.3.

    HPSv2's own `score` returns the product of unit features, without the logit scale: so does this. A picture
    is fitted into the square by its longer side and padded with black, as HPSv2 does and CLIP does not.
    """

    name = "hpsv2"

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path = "xswu/HPSv2",
        *,
        weights: str = "HPS_v2.1_compressed.pt",
        processor: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> "HPSv2":
        """From the published open_clip checkpoint: a file, or a folder or hub id that holds `weights`.

        Args:
            weights: name of the file; "HPS_v2_compressed.pt" is version 2.0.
            processor: folder or hub id of a transformers CLIP of the same shape, for its config and
                tokenizer; None: the folder's own, else LAION's CLIP-H.

        Raises:
            CheckpointError: a part is missing, damaged, or of another shape.
        """
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        path = weights_file(location, weights)
        processor = own_or(location, "config.json", _CLIP_H) if processor is None else processor
        model: Any = CLIPModel(load_part(CLIPConfig, processor))
        fill(model, clip_state_from_open_clip(read_state(path)), str(path))
        model.to(device=device, dtype=dtype)
        tokenizer = load_part(AutoTokenizer, processor)
        size = model.config.vision_config.image_size
        return cls(model, tokenizer, lambda images: padded_pixels(images, size), batch_size=batch_size)

    @property
    def scale(self) -> float:
        """1: the plain cosine."""
        return 1.0


def _unit_features(output: Any) -> Float[Tensor, "batch dim"]:
    """Length 1, float32. Before transformers 5.0 features came as they are, since then inside an output."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1)
