"""FLUX.1: diffusers' `FluxTransformer2DModel`, double-stream blocks first, then single-stream blocks.

    temb       = time MLP( sinusoid(1000 sigma) ) + text MLP( pooled ) [+ guidance MLP( sinusoid(1000 g) )]
    h_0, c_0   = Linear( packed 2 x 2 patches ),  Linear( T5 tokens );   rotary positions (0, row, column)
    c_k, h_k   = double block_k(c_{k-1}, h_{k-1}, temb)      k = 1 .. 19
    c_k, h_k   = single block_k([c_{k-1}; h_{k-1}], temb)    k = 20 .. 57, split again

Block numbers run through both kinds. FLUX attends to every T5 token, padding included, so prompts are padded
to one fixed length. The guidance-distilled [dev] models are told a guidance scale, which belongs to the
reward's config: other guidance is another reward. The pipeline's timestep is sigma itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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
from dina_lrm.backbones.packing import pack, set_shifted_timesteps, unpack
from dina_lrm.backbones.prompts import PromptEncoder
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class FluxArchitecture(TransformerArchitecture):
    """Shapes of a FLUX.1 transformer."""

    diffusers_class: ClassVar[str] = "FluxTransformer2DModel"
    embedders: ClassVar[tuple[str, ...]] = ("pos_embed", "time_text_embed", "context_embedder", "x_embedder")

    patch_size: int = 1
    in_channels: int
    out_channels: int | None = None
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    pooled_projection_dim: int
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def block_names(self) -> tuple[str, ...]:
        double = [f"transformer_blocks.{index}" for index in range(self.num_layers)]
        single = [f"single_transformer_blocks.{index}" for index in range(self.num_single_layers)]
        return (*double, *single)

    @property
    def default_num_blocks(self) -> int:
        """The double-stream blocks."""
        return self.num_layers

    @property
    def latent_channels(self) -> int:
        return self.in_channels // 4

    @property
    def predicted_channels(self) -> int | None:
        return None if self.out_channels is None else self.out_channels // 4

    @property
    def prompt_dim(self) -> int:
        return self.joint_attention_dim

    @property
    def pooled_dim(self) -> int:
        return self.pooled_projection_dim

    @property
    def default_guidance(self) -> float | None:
        """That of diffusers' pipeline."""
        return 3.5 if self.guidance_embeds else None


FLUX1_DEV = FluxArchitecture(
    in_channels=64,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
)
"""black-forest-labs/FLUX.1-dev, for counting at full size on the meta device."""


class FluxPrompts(PromptEncoder):
    """CLIP for the pooled vector, T5 for the tokens."""

    pipeline_class = "FluxPipeline"
    encoders = ("text_encoder", "text_encoder_2")
    max_tokens = 512

    def encode_batch(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditioning:
        embeds, pooled, _ = pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            device=device,
            max_sequence_length=self.limit(pipeline, "tokenizer_2"),
        )
        return Conditioning(embeds, pooled)

    def limit(self, pipeline: Any, tokenizer: str) -> int:
        return (
            pipeline.tokenizer_max_length if tokenizer == "tokenizer" else super().limit(pipeline, tokenizer)
        )


class FluxBackbone(Backbone):
    """First blocks of a FLUX.1 transformer."""

    family = "flux"
    architecture_class = FluxArchitecture
    prompt_encoder = FluxPrompts
    default_scheduler: ClassVar = {"_class_name": FLOW_MATCH, "use_dynamic_shifting": True, "shift": 3.0}
    lora_targets = (*ATTENTION, *TEXT_ATTENTION)
    lora_text_targets = TEXT_ATTENTION
    generator_rounds_time = True
    reference_weight = "x_embedder.weight"

    def __init__(self, architecture: FluxArchitecture, *args: Any, **kwargs: Any) -> None:
        super().__init__(architecture, *args, **kwargs)
        if architecture.guidance_embeds and self.guidance is None:
            raise InvalidInputError(
                "this FLUX transformer is guidance-distilled and must be told a guidance scale: "
                "set guidance (its pipeline's default is 3.5)"
            )
        if not architecture.guidance_embeds and self.guidance is not None:
            raise InvalidInputError(
                f"guidance = {self.guidance}: this FLUX transformer takes no guidance scale, leave it out"
            )

    def arguments(self, latents: Tensor, conditioning: Conditioning, timestep: Tensor) -> dict[str, Any]:
        batch, _, height, width = latents.shape
        guidance = None if self.guidance is None else timestep.new_full((batch,), self.guidance)
        return {
            "hidden_states": pack(latents),
            "encoder_hidden_states": conditioning.prompt_embeds,
            "pooled_projections": conditioning.pooled_prompt_embeds,
            "timestep": timestep / 1000,
            "img_ids": _image_ids(height // 2, width // 2).to(latents.device),
            "txt_ids": torch.zeros(conditioning.prompt_embeds.shape[1], 3, device=latents.device),
            "guidance": guidance,
        }

    def forward_blocks(
        self,
        run: RunBlock,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None,
    ) -> Iterator[Streams]:
        parts = self.parts
        image = parts.x_embedder(hidden_states)
        # diffusers rounds both to the dtype of the tokens: in bfloat16 a guidance of 3.5 would be 3504, and a
        # timestep of 978.26 be 976. Here they are float32 until they are embedded, in every precision.
        wide = torch.promote_types(image.dtype, torch.float32)
        times = [time.to(wide) * 1000 for time in (timestep, guidance) if time is not None]
        temb = parts.time_text_embed(*times, pooled_projections)
        text = parts.context_embedder(encoder_hidden_states)
        rotary = parts.pos_embed(torch.cat((txt_ids, img_ids), dim=0))
        yield Streams(image, text, temb)
        for block in self.kept_blocks:  # both kinds of block take and give both streams
            text, image = run(
                block, hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary
            )
            yield Streams(image, text, temb)

    def state(self, **arguments: Any) -> NoisyState:
        rows, columns = (int(side) + 1 for side in arguments["img_ids"].float()[..., 1:].amax(dim=-2))
        return NoisyState(
            unpack(arguments["hidden_states"], rows, columns),
            Conditioning(arguments["encoder_hidden_states"], arguments["pooled_projections"]),
            arguments["timestep"].float() * 1000,
        )

    def set_timesteps(self, scheduler: Any, num_steps: int, height: int, width: int) -> None:
        set_shifted_timesteps(scheduler, num_steps, height * width // 4)


def _image_ids(rows: int, columns: int) -> Tensor:
    """(rows x columns, 3): 0, row, column of each patch."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).float()
