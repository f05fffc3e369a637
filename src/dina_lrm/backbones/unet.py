"""Stable Diffusion 1.5 and SDXL: diffusers' `UNet2DConditionModel`, with variance-preserving noise.

    temb       = time MLP( sinusoid(t) ) [+ MLP( pooled; sinusoids of the picture's size and crop ): SDXL]
    h_0        = conv_in(latents)
    h_k        = down blocks (k = 1 .. n), mid block (n + 1), up blocks (n + 2 .. 2 n + 1)

A block's output is read at its own resolution and width, one token per cell: after block k of an SDXL at 1024
pixels, 64 x 64, 32 x 32, 32 x 32 and so on. Down blocks are read behind their downsampling. Keeping down and
mid blocks only (the default) leaves the whole decoder out. Text enters by cross-attention, so the one text
tap is 0: the text encoder's own tokens. CLIP's 77 tokens are all attended to, padding included.
Timestep = the row t of the table with sigma = sqrt(1 - abar_t).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dina_lrm.backbones.architecture import Architecture
from dina_lrm.backbones.backbone import Backbone, NoisyState, RunBlock, Streams
from dina_lrm.backbones.prompts import PromptEncoder
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.errors import InvalidInputError

UNSUPPORTED = (
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
    "time_embedding_act_fn",
    "timestep_post_act",
    "center_input_sample",
    "dual_cross_attention",
    "only_cross_attention",
    "cross_attention_norm",
    "attention_type",
)
"""Entries that change what the network computes; only their defaults are supported."""


@dataclass(frozen=True, kw_only=True)
class UNetArchitecture(Architecture):
    """Shapes of a UNet."""

    diffusers_class: ClassVar[str] = "UNet2DConditionModel"
    component: ClassVar[str] = "unet"
    embedders: ClassVar[tuple[str, ...]] = (
        "conv_in",
        "time_proj",
        "time_embedding",
        "add_time_proj",
        "add_embedding",
    )

    sample_size: int | None = None
    in_channels: int
    out_channels: int
    down_block_types: tuple[str, ...]
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: int | tuple[int, ...] = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    cross_attention_dim: int
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    act_fn: str = "silu"
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "UNetArchitecture":
        architecture = super().from_config(config)
        used = [name for name in UNSUPPORTED if config.get(name) not in (None, False, "default")]
        if used or architecture.addition_embed_type not in (None, "text_time"):
            used += [] if used else [f"addition_embed_type = {architecture.addition_embed_type}"]
            raise InvalidInputError(
                f"this UNet is neither of Stable Diffusion 1.5 nor of SDXL: "
                f"{', '.join(used)} is not supported"
            )
        return architecture

    @property
    def is_xl(self) -> bool:
        return self.addition_embed_type == "text_time"

    @property
    def block_names(self) -> tuple[str, ...]:
        down = [f"down_blocks.{index}" for index in range(len(self.down_block_types))]
        up = [f"up_blocks.{index}" for index in range(len(self.up_block_types))]
        return (*down, "mid_block", *up)

    @property
    def default_num_blocks(self) -> int:
        """The encoder: down blocks and the mid block."""
        return len(self.down_block_types) + 1

    @property
    def latent_channels(self) -> int:
        return self.in_channels

    @property
    def predicted_channels(self) -> int | None:
        return self.out_channels

    @property
    def latent_multiple(self) -> int:
        """Any size will do, see `upsample_size` in the walk."""
        return 1

    @property
    def picture_multiple(self) -> int:
        """Every downsampling divides evenly."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def token_dim(self) -> int:
        return self.block_out_channels[-1]

    @property
    def embedding_dim(self) -> int:
        return 4 * self.block_out_channels[0]

    @property
    def prompt_dim(self) -> int:
        return self.cross_attention_dim

    @property
    def pooled_dim(self) -> int | None:
        if not self.is_xl:
            return None
        size_dim = 6 * (self.addition_time_embed_dim or 0)
        return (self.projection_class_embeddings_input_dim or 0) - size_dim

    def image_tap_dim(self, tap: int) -> int:
        widths = self.block_out_channels
        return (widths[0], *widths, widths[-1], *reversed(widths))[tap]

    def text_tap_dim(self, tap: int) -> int:
        return self.cross_attention_dim

    def text_tap_problem(self, tap: int) -> str | None:
        if tap == 0:
            return None
        return "cannot be read: a UNet leaves the text as it is, use text tap 0 or none"


SD15 = UNetArchitecture(
    sample_size=64,
    in_channels=4,
    out_channels=4,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    block_out_channels=(320, 640, 1280, 1280),
    cross_attention_dim=768,
)
"""stable-diffusion-v1-5/stable-diffusion-v1-5, for counting at full size on the meta device."""
SDXL = UNetArchitecture(
    sample_size=128,
    in_channels=4,
    out_channels=4,
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
"""stabilityai/stable-diffusion-xl-base-1.0, for counting at full size on the meta device."""


class UNetPrompts(PromptEncoder):
    """One CLIP, or SDXL's two, padded to their 77 tokens."""

    def __init__(self, source: Any, architecture: UNetArchitecture, **settings: Any) -> None:
        super().__init__(source, architecture, **settings)
        self.pipeline_class = "StableDiffusionXLPipeline" if architecture.is_xl else "StableDiffusionPipeline"
        self.encoders = ("text_encoder", "text_encoder_2") if architecture.is_xl else ("text_encoder",)

    def encode_batch(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditioning:
        embeds, _, *pooled = pipeline.encode_prompt(
            prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditioning(embeds, pooled[0] if pooled else None)

    def encode_empty(self, device: torch.device) -> Conditioning:
        row = super().encode_empty(device)
        if not getattr(self._pipeline.config, "force_zeros_for_empty_prompt", False):
            return row
        pooled = row.pooled_prompt_embeds
        return Conditioning(
            torch.zeros_like(row.prompt_embeds), None if pooled is None else torch.zeros_like(pooled)
        )


class UNetBackbone(Backbone):
    """First blocks of a UNet."""

    family = "unet"
    architecture_class = UNetArchitecture
    prompt_encoder = UNetPrompts
    default_scheduler: ClassVar = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
    }
    reference_weight = "conv_in.weight"
    conditional_half = "last"

    def arguments(self, latents: Tensor, conditioning: Conditioning, timestep: Tensor) -> dict[str, Any]:
        added = None
        if self.architecture.is_xl:  # a picture of the latent's own size, not cropped
            size = [side * self.pixels_per_latent for side in latents.shape[-2:]]
            ids = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=latents.device)
            ids = ids.expand(len(latents), -1)
            added = {"text_embeds": conditioning.pooled_prompt_embeds, "time_ids": ids}
        return {
            "sample": latents,
            "timestep": timestep,
            "encoder_hidden_states": conditioning.prompt_embeds,
            "added_cond_kwargs": added,
        }

    def forward_blocks(
        self,
        run: RunBlock,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None,
    ) -> Iterator[Streams]:
        parts, text = self.parts, encoder_hidden_states
        temb = parts.time_embedding(parts.get_time_embed(sample, timestep))
        if added_cond_kwargs is not None:
            temb = temb + parts.get_aug_embed(temb, text, added_cond_kwargs)

        def streams(cells: Tensor) -> Streams:
            return Streams(cells.flatten(2).transpose(1, 2), text, temb)

        cells = parts.conv_in(sample)
        skips = [cells]
        yield streams(cells)
        block: Any
        for name, block in zip(self.block_names, self.kept_blocks, strict=True):
            reads_text = getattr(block, "has_cross_attention", False)
            context = {"encoder_hidden_states": text} if reads_text else {}
            if name.startswith("down_blocks"):
                cells, made = run(block, hidden_states=cells, temb=temb, **context)
                skips += made
            elif name == "mid_block":
                cells = run(block, cells, temb, **context)
            else:
                count = len(block.resnets)
                skips, taken = skips[:-count], tuple(skips[-count:])
                size = skips[-1].shape[2:] if skips else None  # where a downsampling did not divide evenly
                cells = run(
                    block,
                    hidden_states=cells,
                    temb=temb,
                    res_hidden_states_tuple=taken,
                    upsample_size=size,
                    **context,
                )
            yield streams(cells)

    def state(self, **arguments: Any) -> NoisyState:
        sample, added = arguments["sample"], arguments.get("added_cond_kwargs")
        timestep = torch.as_tensor(arguments["timestep"], dtype=torch.float32, device=sample.device)
        pooled = None if added is None else added["text_embeds"]
        return NoisyState(
            sample, Conditioning(arguments["encoder_hidden_states"], pooled), timestep.expand(len(sample))
        )
