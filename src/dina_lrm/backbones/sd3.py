"""SD3-Medium, SD3.5-Medium and SD3.5-Large: diffusers' `SD3Transformer2DModel`.

    temb       = time MLP( sinusoid(timestep) ) + text MLP( pooled )
    h_0, c_0   = patches + centred position table,  context projection of the text tokens
    c_k, h_k   = block_k(c_{k-1}, h_{k-1}, temb)          image tap k = h_k, text tap k = c_k

The blocks are diffusers' own; only the walk through them is here.
SD3 lets image tokens attend to every text token, padding included, so there is no attention mask: prompts
are padded to 77 CLIP tokens and to a fixed number of T5 tokens.
Timestep = 1000 sigma, unrounded: the table row that the schedule matches.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dina_lrm.backbones.architecture import TransformerArchitecture
from dina_lrm.backbones.backbone import (
    ATTENTION,
    FLOW_MATCH,
    TEXT_ATTENTION,
    Backbone,
    NoisyState,
    RunBlock,
    Streams,
)
from dina_lrm.backbones.packing import linear_shift
from dina_lrm.backbones.prompts import PromptEncoder
from dina_lrm.core.conditioning import Conditioning


@dataclass(frozen=True, kw_only=True)
class SD3Architecture(TransformerArchitecture):
    """Shapes of an SD3 transformer."""

    diffusers_class: ClassVar[str] = "SD3Transformer2DModel"
    embedders: ClassVar[tuple[str, ...]] = ("pos_embed", "time_text_embed", "context_embedder")

    sample_size: int
    patch_size: int
    in_channels: int
    out_channels: int | None = None
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    caption_projection_dim: int
    pooled_projection_dim: int
    pos_embed_max_size: int
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @property
    def latent_multiple(self) -> int:
        return self.patch_size

    @property
    def max_latent_side(self) -> int:
        return self.pos_embed_max_size * self.patch_size

    @property
    def prompt_dim(self) -> int:
        return self.joint_attention_dim

    @property
    def pooled_dim(self) -> int:
        return self.pooled_projection_dim

    def text_tap_problem(self, tap: int) -> str | None:
        if tap != self.num_layers:
            return None
        return (
            "is the transformer's very last block, which puts out no text tokens: "
            f"use text taps up to {self.num_layers - 1}"
        )


SD35_MEDIUM = SD3Architecture(
    sample_size=128,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=24,
    attention_head_dim=64,
    num_attention_heads=24,
    joint_attention_dim=4096,
    caption_projection_dim=1536,
    pooled_projection_dim=2048,
    pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)),
    qk_norm="rms_norm",
)
"""stabilityai/stable-diffusion-3.5-medium, for counting at full size on the meta device."""


SD35_LARGE = replace(
    SD35_MEDIUM,
    num_layers=38,
    num_attention_heads=38,
    caption_projection_dim=2432,
    pos_embed_max_size=192,
    dual_attention_layers=(),
)
"""stabilityai/stable-diffusion-3.5-large."""


class SD3Prompts(PromptEncoder):
    """Two CLIPs, padded to their 77 tokens, and T5, which may be left out."""

    pipeline_class = "StableDiffusion3Pipeline"
    encoders = ("text_encoder", "text_encoder_2")
    optional_encoders = ("text_encoder_3",)
    max_tokens = 256

    def encode_batch(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditioning:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.limit(pipeline, "tokenizer_3"),
        )
        return Conditioning(embeds, pooled)

    def limit(self, pipeline: Any, tokenizer: str) -> int:
        if tokenizer != "tokenizer_3":
            return pipeline.tokenizer_max_length
        return super().limit(pipeline, tokenizer)

    def prepare(self, pipeline: Any) -> None:
        if pipeline.text_encoder_3 is None:  # then it asks the transformer for the width of the zeros
            width = self.architecture.joint_attention_dim
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))


class SD3Backbone(Backbone):
    """First blocks of an SD3 transformer."""

    family = "sd3"
    architecture_class = SD3Architecture
    prompt_encoder = SD3Prompts
    default_scheduler: ClassVar = {"_class_name": FLOW_MATCH, "shift": 3.0, "num_train_timesteps": 1000}
    lora_targets = (*ATTENTION, *TEXT_ATTENTION)
    lora_text_targets = TEXT_ATTENTION
    reference_weight = "pos_embed.proj.weight"
    conditional_half = "last"

    def arguments(self, latents: Tensor, conditioning: Conditioning, timestep: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": conditioning.prompt_embeds,
            "pooled_projections": conditioning.pooled_prompt_embeds,
            "timestep": timestep,
        }

    def forward_blocks(
        self,
        run: RunBlock,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
    ) -> Iterator[Streams]:
        parts = self.parts
        image = parts.pos_embed(hidden_states).contiguous()
        temb = parts.time_text_embed(timestep, pooled_projections)
        text = parts.context_embedder(encoder_hidden_states)
        yield Streams(image, text, temb)
        for block in self.kept_blocks:
            text, image = run(block, hidden_states=image, encoder_hidden_states=text, temb=temb)
            yield Streams(image, text, temb)

    def state(self, **arguments: Any) -> NoisyState:
        conditioning = Conditioning(arguments["encoder_hidden_states"], arguments["pooled_projections"])
        return NoisyState(arguments["hidden_states"], conditioning, arguments["timestep"].float())

    def set_timesteps(self, scheduler: Any, num_steps: int, height: int, width: int) -> None:
        shift = {}
        if self.scheduler.get("use_dynamic_shifting"):
            shift["mu"] = linear_shift(self.scheduler, height * width // self.architecture.patch_size**2)
        scheduler.set_timesteps(num_steps, **shift)
