"""Wan 2.1 (and Wan 2.2 with one transformer): diffusers' `WanTransformer3DModel`, a video model.

    temb       = time MLP( sinusoid(1000 sigma) )
    h_0        = Conv3d patches of every frame;   c = MLP( UMT5 tokens ), the same for all blocks
    h_k        = block_k(h_{k-1}, c, temb)        self-attention over all frames, cross-attention to c

A picture is a video of one frame: latents may be (batch, channel, height, width) or have a frame axis before
height. Text enters by cross-attention only, so the one text tap is 0. The pipeline pads a prompt with zeros
to a fixed number of tokens, and the blocks attend to all of them. Timestep = 1000 sigma.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dina_lrm.backbones.architecture import TransformerArchitecture
from dina_lrm.backbones.backbone import Backbone, NoisyState, RunBlock, Streams
from dina_lrm.backbones.prompts import PromptEncoder
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class WanArchitecture(TransformerArchitecture):
    """Shapes of a Wan transformer."""

    diffusers_class: ClassVar[str] = "WanTransformer3DModel"
    block_list: ClassVar[str] = "blocks"
    embedders: ClassVar[tuple[str, ...]] = ("rope", "patch_embedding", "condition_embedder")

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int | None
    text_dim: int
    freq_dim: int = 256
    ffn_dim: int
    num_layers: int
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    def __post_init__(self) -> None:
        if self.image_dim is not None or self.added_kv_proj_dim is not None:
            raise InvalidInputError("an image-to-video Wan transformer: only text-to-video is supported")

    def position_tables(self) -> dict[str, nn.Module]:
        from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

        return {"rope": WanRotaryPosEmbed(self.attention_head_dim, self.patch_size, self.rope_max_seq_len)}

    @property
    def latent_multiple(self) -> int:
        return self.patch_size[1]

    @property
    def max_latent_side(self) -> int:
        return self.rope_max_seq_len * self.patch_size[1]

    @property
    def max_latent_frames(self) -> int:
        return self.rope_max_seq_len * self.patch_size[0]

    @property
    def prompt_dim(self) -> int:
        return self.text_dim

    def text_tap_problem(self, tap: int) -> str | None:
        if tap == 0:
            return None
        return "cannot be read: Wan's blocks leave the text as it is, use text tap 0 or none"


WAN21_1B = WanArchitecture(
    num_attention_heads=12,
    attention_head_dim=128,
    in_channels=16,
    out_channels=16,
    text_dim=4096,
    ffn_dim=8960,
    num_layers=30,
)
"""Wan-AI/Wan2.1-T2V-1.3B-Diffusers, for counting at full size on the meta device."""


class WanPrompts(PromptEncoder):
    """UMT5, cut to the prompt's own tokens and padded with zeros by the pipeline."""

    pipeline_class = "WanPipeline"
    encoders = ("text_encoder",)
    max_tokens = 512

    def encode_batch(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(
            prompt=prompts,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.limit(pipeline, "tokenizer"),
        )
        return Conditioning(embeds)


class WanBackbone(Backbone):
    """First blocks of a Wan transformer."""

    family = "wan"
    architecture_class = WanArchitecture
    prompt_encoder = WanPrompts
    default_scheduler: ClassVar = {
        "_class_name": "UniPCMultistepScheduler",
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": 3.0,
    }
    reference_weight = "patch_embedding.weight"

    def arguments(self, latents: Tensor, conditioning: Conditioning, timestep: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": latents.unsqueeze(2) if latents.ndim == 4 else latents,
            "encoder_hidden_states": conditioning.prompt_embeds,
            "timestep": timestep,
        }

    def forward_blocks(
        self, run: RunBlock, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> Iterator[Streams]:
        parts = self.parts
        rotary = parts.rope(hidden_states)
        image = parts.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        temb, modulation, text, _ = parts.condition_embedder(timestep, encoder_hidden_states)
        modulation = modulation.unflatten(1, (6, -1))
        yield Streams(image, text, temb)
        for block in self.kept_blocks:
            image = run(block, image, text, modulation, rotary)
            yield Streams(image, text, temb)

    def state(self, **arguments: Any) -> NoisyState:
        timestep = arguments["timestep"]
        if timestep.ndim != 1:
            raise InvalidInputError("this Wan pipeline gives every token its own timestep (expand_timesteps)")
        conditioning = Conditioning(arguments["encoder_hidden_states"])
        return NoisyState(arguments["hidden_states"], conditioning, timestep.float())
