"""Qwen-Image: diffusers' `QwenImageTransformer2DModel`.

    temb       = time MLP( sinusoid(1000 sigma) )
    h_0, c_0   = Linear( packed 2 x 2 patches ),  Linear( RMSNorm( text tokens ) )
    c_k, h_k   = block_k(c_{k-1}, h_{k-1}, temb; mask)        rotary positions, centred on the picture

Padded text tokens are masked, in the blocks and in the head, so a prompt scores the same in any batch. The
VAE is that of a video model: its latents are normalised channel by channel, and have a frame axis of length
one that is not part of ours. The pipeline's timestep is sigma itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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
from dina_lrm.backbones.packing import pack, set_shifted_timesteps, unpack
from dina_lrm.backbones.prompts import PromptEncoder
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class QwenImageArchitecture(TransformerArchitecture):
    """Shapes of a Qwen-Image transformer."""

    diffusers_class: ClassVar[str] = "QwenImageTransformer2DModel"
    embedders: ClassVar[tuple[str, ...]] = ("pos_embed", "time_text_embed", "txt_norm", "img_in", "txt_in")

    patch_size: int = 2
    in_channels: int
    out_channels: int | None = None
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False

    def __post_init__(self) -> None:
        special = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
        used = [name for name in special if getattr(self, name)]
        if used:
            raise InvalidInputError(
                f"this Qwen-Image transformer is one for editing or layers ({', '.join(used)}): "
                f"only the text-to-image model is supported"
            )

    def position_tables(self) -> dict[str, nn.Module]:
        from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

        return {"pos_embed": QwenEmbedRope(theta=10000, axes_dim=list(self.axes_dims_rope), scale_rope=True)}

    @property
    def latent_channels(self) -> int:
        return self.in_channels // 4

    @property
    def max_latent_side(self) -> int:
        return 4096

    @property
    def prompt_dim(self) -> int:
        return self.joint_attention_dim


QWEN_IMAGE = QwenImageArchitecture(
    in_channels=64,
    out_channels=16,
    num_layers=60,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=3584,
)
"""Qwen/Qwen-Image, for counting at full size on the meta device."""


class QwenImagePrompts(PromptEncoder):
    """Qwen2.5-VL's last hidden states behind the pipeline's own template.

    Prompts go in one by one: that pipeline pads to the longest of a batch, which would let neighbours change
    the last bits of a prompt's embedding.
    """

    pipeline_class = "QwenImagePipeline"
    encoders = ("text_encoder",)
    max_tokens = 512
    prompts_per_call = 1

    def encode_batch(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditioning:
        embeds, mask = pipeline.encode_prompt(
            prompt=prompts, device=device, max_sequence_length=self.limit(pipeline, "tokenizer")
        )
        if mask is None:  # every token is real
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return Conditioning(embeds, attention_mask=mask)

    def limit(self, pipeline: Any, tokenizer: str) -> int:
        return self.max_text_tokens or self.max_tokens


class QwenImageBackbone(Backbone):
    """First blocks of a Qwen-Image transformer."""

    family = "qwen_image"
    architecture_class = QwenImageArchitecture
    prompt_encoder = QwenImagePrompts
    default_scheduler: ClassVar = {
        "_class_name": FLOW_MATCH,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    }
    lora_targets = (*ATTENTION, *TEXT_ATTENTION)
    lora_text_targets = TEXT_ATTENTION
    generator_rounds_time = True
    reference_weight = "img_in.weight"
    masks_text = True

    def arguments(self, latents: Tensor, conditioning: Conditioning, timestep: Tensor) -> dict[str, Any]:
        batch, _, height, width = latents.shape
        return {
            "hidden_states": pack(latents),
            "encoder_hidden_states": conditioning.prompt_embeds,
            "encoder_hidden_states_mask": _effective(conditioning.attention_mask),
            "timestep": timestep / 1000,
            "img_shapes": [[(1, height // 2, width // 2)]] * batch,
        }

    def forward_blocks(
        self,
        run: RunBlock,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        timestep: Tensor,
        img_shapes: list[list[tuple[int, int, int]]],
    ) -> Iterator[Streams]:
        parts = self.parts
        image = parts.img_in(hidden_states)
        text = parts.txt_in(parts.txt_norm(encoder_hidden_states))
        # Not rounded to the dtype of the tokens, as diffusers does: in bfloat16 978.26 would be 976.
        temb = parts.time_text_embed(timestep.to(torch.promote_types(image.dtype, torch.float32)), image)
        rotary = parts.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=image.device)
        mask = None if encoder_hidden_states_mask is None else encoder_hidden_states_mask.bool()
        yield Streams(image, text, temb, mask)
        for block in self.kept_blocks:
            text, image = run(
                block,
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=mask,
                temb=temb,
                image_rotary_emb=rotary,
            )
            yield Streams(image, text, temb, mask)

    def state(self, **arguments: Any) -> NoisyState:
        _, rows, columns = arguments["img_shapes"][0][0]
        mask = arguments.get("encoder_hidden_states_mask")
        return NoisyState(
            unpack(arguments["hidden_states"], rows, columns),
            Conditioning(arguments["encoder_hidden_states"], attention_mask=mask),
            arguments["timestep"].float() * 1000,
        )

    def set_timesteps(self, scheduler: Any, num_steps: int, height: int, width: int) -> None:
        set_shifted_timesteps(scheduler, num_steps, height * width // 4)


def _effective(mask: Tensor | None) -> Tensor | None:
    """A mask without holes is no mask: attention without one is faster, and the pipeline does the same."""
    if mask is None or (mask.device.type != "meta" and bool(mask.bool().all())):
        return None
    return mask.bool()
