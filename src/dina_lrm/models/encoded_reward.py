"""A reward network with the encoders of its pipeline: prompts and images become what it reads."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dina_lrm.backbones.prompts import prompt_list
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.tensors import Latents
from dina_lrm.errors import InvalidInputError, MissingComponentError, warn_of_prompts
from dina_lrm.images import image_list
from dina_lrm.models.encoders import Encoders
from dina_lrm.models.reward_network import RewardNetwork
from dina_lrm.models.scoring import resolve_seeds
from dina_lrm.pipelines.threads import in_turn


class EncodedReward(RewardNetwork):
    """A `RewardNetwork` with a pipeline's text encoders and VAE.

    Args:
        encoders: of the pipeline; None scores latents only. The others are those of `RewardNetwork`.
    """

    def __init__(self, *args: Any, encoders: Encoders | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.encoders = encoders

    @in_turn
    def encode_prompts(self, prompts: str | Sequence[str]) -> Conditioning:
        """Conditioning with one row per prompt, from the pipeline's own text encoders; cached per prompt.

        Warns:
            PromptWarning: what the encoders do not see of a prompt, when it is encoded first.
        """
        encoders = self._need_encoders("prompts", "text_encoder")
        return encoders.encode_prompts(prompt_list(prompts), self.device, on_notes=warn_of_prompts)

    @in_turn
    def read_prompts(self, prompts: str | Sequence[str]) -> tuple[Conditioning, list[str]]:
        """What `encode_prompts` gives and `prompt_notes` says, without a warning."""
        encoders, listed = self._need_encoders("prompts", "text_encoder"), prompt_list(prompts)
        return encoders.encode_prompts(listed, self.device), encoders.prompt_notes(listed, self.device)

    @in_turn
    def prompt_notes(self, prompts: str | Sequence[str]) -> list[str]:
        """What the text encoders do not see of prompts: a note for each that is too long, and one for all
        unknown words. The prompts need not be encoded for it."""
        encoders = self._need_encoders("prompts", "text_encoder")
        return encoders.prompt_notes(prompt_list(prompts), self.device)

    def picture_size(self, height: int, width: int, name: str = "image") -> tuple[int, int]:
        """Height and width in pixels at which a picture of a given size is encoded.

        Raises:
            InvalidInputError: the picture is too small; `name` says which.
        """
        return self._need_encoders("images", "vae").picture_size(height, width, name)

    @in_turn
    def encode_images(self, images: Any, *, sample: bool = False, seed: Any = None) -> Latents:
        """Clean latents of pictures of one size, shifted and scaled: the VAE's mean, or a sample."""
        pictures = image_list(images)
        seeds = resolve_seeds(seed, len(pictures)) if sample else None
        latents = self._need_encoders("images", "vae").encode_images(pictures, self.device, seeds=seeds)
        if len({latent.shape for latent in latents}) > 1:
            sizes = sorted({"x".join(map(str, latent.shape[:0:-1])) for latent in latents})
            raise InvalidInputError(
                f"pictures give latents of different sizes ({', '.join(sizes)}): encode them size by size"
            )
        return torch.stack(latents)

    @in_turn
    def decode_latents(self, latents: Tensor) -> Float[Tensor, "batch 3 *frame height width"]:
        """Pictures in [0, 1] of clean latents, by the pipeline's VAE: the way back from `encode_images`."""
        self.backbone.check_latents(latents)
        return self._need_encoders("latents", "vae").decode_latents(latents, self.device)

    @property
    def latent_space(self) -> str | None:
        """Class and normalisation of the pipeline's VAE; None if it has none."""
        return None if self.encoders is None else self.encoders.latent_space

    def check_inputs(
        self, latents: Tensor, conditioning: Conditioning, latent_space: str | None = None
    ) -> None:
        """InvalidInputError unless latents and conditioning suit the backbone.

        Args:
            latent_space: VAE that the latents come from, where it is known; see `latent_space`.
        """
        self.backbone.check_latents(latents)
        self.backbone.check_conditioning(conditioning)
        own = self.latent_space
        if latent_space is not None and own is not None and latent_space != own:
            raise InvalidInputError(
                f"these latents are of another family: they come from {latent_space}, "
                f"the reward's pipeline has {own}"
            )

    def _need_encoders(self, what: str, component: str) -> Encoders:
        if self.encoders is None:
            raise MissingComponentError(
                f"the pipeline has only a transformer and a scheduler, no {component}, so {what} cannot be "
                f"encoded: give a complete pipeline, or use score_latents"
            )
        return self.encoders
