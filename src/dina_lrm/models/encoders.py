"""From prompts and pictures to what a backbone reads, over the parts of a diffusers pipeline.

    z0 = (VAE mean (or sample) - shift_factor) * scaling_factor

Departures from the paper's code: the VAE's mean is the default, so a picture has one latent; a missing part
is an error that names it, at the moment it is needed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dina_lrm.errors import MissingComponentError
from dina_lrm.models.backbone import Conditioning
from dina_lrm.models.images import as_pictures, fit
from dina_lrm.models.source import PipelineSource
from dina_lrm.models.text import PromptEncoder, quiet_loading

PICTURES_PER_CALL = 8


class Encoders:
    """Text encoders and VAE of a pipeline, each loaded when first used.

    Parts of a live pipeline are used where they are, and never moved or cast. Parts loaded here follow the
    device asked for; the VAE stays in float32, since it is small and its mean decides everything after it.

    Args:
        patch_size, max_latent_side: limits of the backbone that will read the latents.
        max_pixels: pictures with more are shrunk; None: only the backbone's position table limits them.
    """

    def __init__(
        self,
        source: PipelineSource,
        *,
        patch_size: int,
        max_latent_side: int,
        max_text_tokens: int | None = None,
        max_pixels: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source = source
        self.patch_size = patch_size
        self.max_latent_side = max_latent_side
        self.max_pixels = max_pixels
        self.text = PromptEncoder(source, max_text_tokens=max_text_tokens, dtype=dtype)
        self._vae: Any = None

    def encode_prompts(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        """One row per prompt."""
        return self.text.encode(prompts, device)

    def encode_images(
        self, images: Any, device: torch.device, *, seeds: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Latents (channel, height, width) per picture, shifted and scaled, each of its own size.

        Args:
            seeds: None takes the mean of the VAE's posterior; otherwise one sample per picture from its seed.
        """
        vae = self._load_vae(device)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        pictures = [
            fit(
                picture,
                multiple=factor * self.patch_size,
                max_side=factor * self.max_latent_side,
                max_pixels=self.max_pixels,
                name=f"image {index}",
            )
            for index, picture in enumerate(as_pictures(images))
        ]
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents: dict[int, Tensor] = {}
        for rows in _same_shape(pictures):
            batch = torch.stack([pictures[row] for row in rows]).to(vae.device, vae.dtype)
            with torch.set_grad_enabled(torch.is_grad_enabled() and batch.requires_grad):
                posterior = vae.encode(batch * 2 - 1).latent_dist
                encoded = posterior.mean
                if seeds is not None:
                    draws = [
                        torch.randn(encoded.shape[1:], generator=torch.Generator().manual_seed(seeds[row]))
                        for row in rows
                    ]
                    encoded = encoded + posterior.std * torch.stack(draws).to(encoded)
                scaled = (encoded.float() - shift) * vae.config.scaling_factor
            latents |= dict(zip(rows, scaled.to(device), strict=True))
        return [latents[row] for row in range(len(pictures))]

    def _load_vae(self, device: torch.device) -> Any:
        if self._vae is None:
            if not self.source.has("vae"):
                raise MissingComponentError(
                    f"pipeline {self.source.name} has no vae, so pictures cannot be encoded: "
                    f"give a pipeline that has it, or use score_latents"
                )
            if self.source.live is not None:
                self._vae = self.source.live.vae
            else:
                from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

                with quiet_loading():
                    vae = AutoencoderKL.from_pretrained(self.source.path("vae"), variant=self.source.variant)
                self._vae = vae.float().requires_grad_(False)
        return self._vae if self.source.live is not None else self._vae.to(device)


def encoders_for(
    source: PipelineSource, architecture: Any, max_text_tokens: int | None, dtype: torch.dtype
) -> Encoders | None:
    """Encoders, or None for a pipeline that holds only a transformer and a scheduler."""
    if not any(source.has(part) for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")):
        return None
    return Encoders(
        source,
        patch_size=architecture.patch_size,
        max_latent_side=architecture.max_latent_side,
        max_text_tokens=max_text_tokens,
        dtype=dtype,
    )


def _same_shape(pictures: list[Tensor]) -> list[list[int]]:
    """Indices of pictures of equal size, in batches small enough for the VAE."""
    groups: dict[torch.Size, list[int]] = {}
    for index, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(index)
    return [
        rows[i : i + PICTURES_PER_CALL]
        for rows in groups.values()
        for i in range(0, len(rows), PICTURES_PER_CALL)
    ]
