"""A reward on pixels with a fusion of its own: what a latent reward is compared with at equal data.

As in today's large rewards, towers of picture and text give tokens, a transformer reads both, and one token
becomes the score. Its gradient in the latents of a generator crosses the VAE's decoder.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor, nn

from dina_lrm.core.tensors import Score
from dina_lrm.errors import CheckpointError
from dina_lrm.evaluation.baselines.pixels import Pixels
from dina_lrm.evaluation.baselines.scorer import score_in_batches
from dina_lrm.evaluation.baselines.weights import fill, load_part, loading, read_state

__all__ = ["Fusion", "PixelFusion", "PixelNetwork"]

_CONFIG, _WEIGHTS = "fusion.json", "fusion.safetensors"


class Fusion(nn.Module):
    """Image tokens and text tokens to a score, read at a token of its own.

    Args:
        image_dim, text_dim: widths of the tokens that come in.
        width: of the transformer, a multiple of `num_heads`.
        num_layers: pre-norm.
    """

    def __init__(
        self, image_dim: int, text_dim: int, *, width: int = 96, num_layers: int = 3, num_heads: int = 4
    ) -> None:
        super().__init__()
        self.settings = {"width": width, "num_layers": num_layers, "num_heads": num_heads}
        self.project_image = nn.Linear(image_dim, width)
        self.project_text = nn.Linear(text_dim, width)
        self.kind = nn.Parameter(0.02 * torch.randn(3, width))
        """Added to the token that is read, to image tokens and to text tokens."""
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)

    def forward(
        self,
        image: Float[Tensor, "batch patch image_dim"],
        text: Float[Tensor, "batch token text_dim"],
        mask: Bool[Tensor, "batch token"],
    ) -> Score:
        """Scores; `mask` is true where a text token is no padding."""
        query = self.kind[0].expand(len(image), 1, -1)
        tokens = [query, self.project_image(image) + self.kind[1], self.project_text(text) + self.kind[2]]
        padding = torch.cat([mask.new_zeros(len(image), 1 + image.shape[1]), ~mask], dim=1)
        read = self.layers(torch.cat(tokens, dim=1), src_key_padding_mask=padding)
        return self.score(self.norm(read[:, 0])).squeeze(-1)


class PixelFusion(nn.Module):
    """The towers of transformers' `CLIPModel` (its projections are not used) and a `Fusion` on their
    tokens."""

    def __init__(self, clip: Any, **settings: int) -> None:
        super().__init__()
        self.clip = clip
        sizes = clip.config.vision_config.hidden_size, clip.config.text_config.hidden_size
        self.fusion = Fusion(*sizes, **settings)

    def forward(
        self, pixels: Pixels, ids: Int64[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
    ) -> Score:
        """Scores, differentiable in the pixels.

        Args:
            pixels: normalised as the CLIP model's image processor does.
            mask: which of `ids` are no padding.
        """
        image = self.clip.vision_model(pixel_values=pixels).last_hidden_state
        text = self.clip.text_model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return self.fusion(image, text, mask)


class PixelNetwork:
    """A trained `PixelFusion` with its tokenizer and image processor.

    Args:
        network: in the device and dtype that it scores in.
        batch_size: pairs per forward pass; no effect on scores.
    """

    name = "pixel-network"

    def __init__(
        self, network: PixelFusion, tokenizer: Any, image_processor: Any, *, batch_size: int = 16
    ) -> None:
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> "PixelNetwork":
        """From a folder of `save_pretrained`; none is published.

        Raises:
            CheckpointError: a part is missing or damaged.
        """
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        if location is None or not (Path(location) / _CONFIG).is_file():
            raise CheckpointError(
                f"pixel-network needs a folder that holds {_CONFIG}, which benchmarks/shapes_baselines.py "
                f"writes; got {location}"
            )
        folder = Path(location)
        with loading("the settings of a pixel network", str(folder / _CONFIG)):
            settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            network = PixelFusion(load_part(CLIPModel, folder), **settings)
        fill(network.fusion, read_state(folder / _WEIGHTS), str(folder / _WEIGHTS))
        return cls(
            network.to(device=device, dtype=dtype),
            load_part(AutoTokenizer, folder),
            load_part(AutoImageProcessor, folder),
            batch_size=batch_size,
        )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the towers as a CLIP model, tokenizer and image processor beside them, and the fusion."""
        from safetensors.torch import save_model

        folder = Path(folder)
        self.network.clip.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        save_model(self.network.fusion, str(folder / _WEIGHTS))
        settings = json.dumps(self.network.fusion.settings, indent=2)
        (folder / _CONFIG).write_text(settings + "\n", encoding="utf-8")
        return folder

    def score(self, prompts: Sequence[str], images: Sequence[Any]) -> Score:
        """See `Scorer.score`."""
        return score_in_batches(prompts, images, self._score_batch, batch_size=self.batch_size)

    def _score_batch(self, prompts: list[str], images: list[Image.Image]) -> Tensor:
        weight = self.network.fusion.score.weight
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        ids, mask = self.tokens(prompts)
        return self.network(pixels.to(weight), ids, mask).float().cpu()

    def tokens(
        self, prompts: Sequence[str]
    ) -> tuple[Int64[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
        """Ids and mask of prompts, on the network's device; cut at the text tower's length."""
        limit = self.network.clip.config.text_config.max_position_embeddings
        found = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(self.network.fusion.score.weight.device)
        return found["input_ids"], found["attention_mask"].bool()
