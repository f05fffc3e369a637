"""Z-Image: diffusers' `ZImageTransformer2DModel`, one stream after a short refinement of each.

    temb       = time MLP( sinusoid(1000 (1 - sigma)) )
    x, c       = noise refiner( Linear( 2 x 2 patches ), temb ),  context refiner( Linear( text tokens ) )
    u_0        = [x; c]                                            image first, then text
    u_k        = layer_k(u_{k-1}, temb)                            image tap k = x part, text tap k = c part

Both parts are filled up to multiples of 32 with learned pad tokens, which the layers attend to; they depend
on the row's own length only. What pads rows to a common length is masked, in the layers and in the head, so
a prompt scores the same in any batch. Block numbers count the main layers; the refiners belong to tap 0.
The pipeline's timestep runs the other way: 1 - sigma.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dina_lrm.backbones.architecture import Architecture
from dina_lrm.backbones.backbone import FLOW_MATCH, Backbone, NoisyState, RunBlock, Streams
from dina_lrm.backbones.packing import set_shifted_timesteps
from dina_lrm.backbones.prompts import PromptEncoder
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class ZImageArchitecture(Architecture):
    """Shapes of a Z-Image transformer."""

    diffusers_class: ClassVar[str] = "ZImageTransformer2DModel"
    embedders: ClassVar[tuple[str, ...]] = (
        "all_x_embedder",
        "x_pad_token",
        "noise_refiner",
        "cap_embedder",
        "cap_pad_token",
        "context_refiner",
        "t_embedder",
    )

    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    in_channels: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int
    siglip_feat_dim: int | None = None
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...]
    axes_lens: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.siglip_feat_dim is not None:
            raise InvalidInputError(
                "this Z-Image transformer takes reference pictures (siglip_feat_dim): "
                "only the text-to-image model is supported"
            )

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(f"layers.{index}" for index in range(self.n_layers))

    @property
    def latent_channels(self) -> int:
        return self.in_channels

    @property
    def latent_multiple(self) -> int:
        return self.all_patch_size[0]

    @property
    def max_latent_side(self) -> int:
        return min(self.axes_lens[1:]) * self.all_patch_size[0]

    @property
    def token_dim(self) -> int:
        return self.dim

    @property
    def embedding_dim(self) -> int:
        return min(self.dim, 256)

    @property
    def prompt_dim(self) -> int:
        return self.cap_feat_dim


Z_IMAGE = ZImageArchitecture(
    in_channels=16,
    dim=3840,
    n_layers=30,
    n_refiner_layers=2,
    n_heads=30,
    n_kv_heads=30,
    cap_feat_dim=2560,
    axes_dims=(32, 48, 48),
    axes_lens=(1536, 512, 512),
)
"""Tongyi-MAI/Z-Image-Turbo and Z-Image, for counting at full size on the meta device."""


class ZImagePrompts(PromptEncoder):
    """Qwen3's second-to-last hidden states of the prompt in a chat template, without padding."""

    pipeline_class = "ZImagePipeline"
    encoders = ("text_encoder",)
    max_tokens = 512

    def encode_batch(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditioning:
        rows, _ = pipeline.encode_prompt(
            prompt=list(prompts),  # it writes the template into the list
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.limit(pipeline, "tokenizer"),
        )
        return _padded(rows)

    def limit(self, pipeline: Any, tokenizer: str) -> int:
        return self.max_text_tokens or self.max_tokens


class ZImageBackbone(Backbone):
    """First layers of a Z-Image transformer."""

    family = "z_image"
    architecture_class = ZImageArchitecture
    prompt_encoder = ZImagePrompts
    default_scheduler: ClassVar = {"_class_name": FLOW_MATCH, "shift": 3.0}
    reference_weight = "cap_embedder.1.weight"
    masks_text = True
    conditional_half = "first"

    def arguments(self, latents: Tensor, conditioning: Conditioning, timestep: Tensor) -> dict[str, Any]:
        embeds, mask = conditioning.prompt_embeds, conditioning.attention_mask
        rows = (
            list(embeds)
            if mask is None
            else [row[keep.bool()] for row, keep in zip(embeds, mask, strict=True)]
        )
        return {"x": list(latents.unsqueeze(2)), "t": (1000 - timestep) / 1000, "cap_feats": rows}

    def forward_blocks(
        self, run: RunBlock, x: list[Tensor], t: Tensor, cap_feats: list[Tensor]
    ) -> Iterator[Streams]:
        parts, device = self.parts, x[0].device
        patch = self.architecture.all_patch_size[0]
        temb = parts.t_embedder(t * parts.t_scale).type_as(x[0])
        num_patches = x[0].shape[-2] * x[0].shape[-1] // patch**2
        num_words = [len(row) for row in cap_feats]
        patches, words, _, image_ids, text_ids, image_pad, text_pad = parts.patchify_and_embed(
            x, cap_feats, patch, 1
        )

        image_lengths, text_lengths = ([len(row) for row in rows] for rows in (patches, words))
        image = parts.all_x_embedder[f"{patch}-1"](torch.cat(patches)).split(image_lengths)
        image, image_rotary, image_mask, *_ = parts._prepare_sequence(
            list(image), image_ids, image_pad, parts.x_pad_token, device=device
        )
        for layer in parts.noise_refiner:
            image = run(layer, image, image_mask, image_rotary, temb)

        text = parts.cap_embedder(torch.cat(words)).split(text_lengths)
        text, text_rotary, text_mask, *_ = parts._prepare_sequence(
            list(text), text_ids, text_pad, parts.cap_pad_token, device=device
        )
        for layer in parts.context_refiner:
            text = run(layer, text, text_mask, text_rotary)

        joint, rotary, mask, _ = parts._build_unified_sequence(
            x=image, x_freqs=image_rotary, x_seqlens=image_lengths, x_noise_mask=None,
            cap=text, cap_freqs=text_rotary, cap_seqlens=text_lengths, cap_noise_mask=None,
            siglip=None, siglip_freqs=None, siglip_seqlens=None, siglip_noise_mask=None,
            omni_mode=False, device=device,
        )  # fmt: skip
        real = (
            torch.arange(max(text_lengths), device=device) < torch.tensor(num_words, device=device)[:, None]
        )

        def streams(joint: Tensor) -> Streams:
            return Streams(joint[:, :num_patches], joint[:, image_lengths[0] :], temb, real)

        yield streams(joint)
        for block in self.kept_blocks:
            joint = run(block, joint, mask, rotary, temb)
            yield streams(joint)

    def state(self, **arguments: Any) -> NoisyState:
        if isinstance(arguments["x"][0], list):
            raise InvalidInputError("this Z-Image pipeline works on several pictures at once (omni mode)")
        latents = torch.stack(list(arguments["x"])).squeeze(2)
        return NoisyState(latents, _padded(arguments["cap_feats"]), 1000 - 1000 * arguments["t"].float())

    def set_timesteps(self, scheduler: Any, num_steps: int, height: int, width: int) -> None:
        set_shifted_timesteps(scheduler, num_steps, height * width // 4)

    @property
    def run_modules(self) -> list[nn.Module]:
        return [*self.parts.noise_refiner, *self.parts.context_refiner, *self.kept_blocks]


def _padded(rows: list[Tensor]) -> Conditioning:
    """Rows of different length as one tensor, zeros behind each, and the mask that says so."""
    embeds = pad_sequence(list(rows), batch_first=True)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return Conditioning(embeds, attention_mask=mask.to(embeds.device))
