"""SD3 and SD3.5: the first L blocks of diffusers' `SD3Transformer2DModel`, read at taps.

    temb       = time MLP( sinusoid(timestep) ) + text MLP( pooled )
    h_0, c_0   = patches + centred position table,  context projection of the text tokens
    c_k, h_k   = block_k(c_{k-1}, h_{k-1}, temb)          image tap k = h_k, text tap k = c_k

The blocks are diffusers' own; only the walk through them is here. Blocks after the last tap are not computed.
SD3 lets image tokens attend to every text token, padding included, so there is no attention mask.
Timestep = 1000 sigma, unrounded: the table row that the schedule matches.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dina_lrm.core.noise import NoiseSchedule
from dina_lrm.errors import CheckpointError, InvalidInputError
from dina_lrm.models.backbone import (
    BackboneFeatures,
    Conditioning,
    EmbeddedConditioning,
    check_tensor,
    rows_for,
)
from dina_lrm.models.lora import borrowed
from dina_lrm.models.weights import TensorSource, fill


@dataclass(frozen=True, kw_only=True, slots=True)
class SD3Architecture:
    """The entries of a transformer's config.json that fix its shapes."""

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
    def token_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def max_latent_side(self) -> int:
        """Largest height or width of a latent that the position table covers."""
        return self.pos_embed_max_size * self.patch_size

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "SD3Architecture":
        """From the transformer's config.json; another model class is an error."""
        kind = config.get("_class_name", "SD3Transformer2DModel")
        if kind != "SD3Transformer2DModel":
            raise CheckpointError(
                f"this checkpoint needs an SD3Transformer2DModel, the pipeline has a {kind}"
            )
        names = [entry.name for entry in dataclasses.fields(cls)]
        values: dict[str, Any] = {name: config[name] for name in names if name in config}
        values["dual_attention_layers"] = tuple(values.get("dual_attention_layers") or ())
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(f"the transformer's config lacks entries: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "dual_attention_layers": list(self.dual_attention_layers)}


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


class SD3Backbone(nn.Module):
    """First blocks of an SD3 transformer, with taps.

    Args:
        parts: pos_embed, time_text_embed, context_embedder and transformer_blocks, all diffusers modules.
        shared: the parts belong to the caller's transformer. They are then not registered as children, so
            that moving, casting or training the reward model cannot touch them, and every pass puts their
            adapters and gradient flags back as they were.
        adapter: name of the reward's PEFT adapter on shared parts, switched on only while scoring.
    """

    def __init__(
        self,
        architecture: SD3Architecture,
        parts: nn.Module,
        schedule: NoiseSchedule,
        *,
        image_taps: tuple[int, ...],
        text_taps: tuple[int, ...],
        shared: bool = False,
        adapter: str | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.schedule = schedule
        self.image_taps = tuple(sorted(image_taps))
        self.text_taps = tuple(sorted(text_taps))
        self.shared = shared
        self.adapter = adapter
        if shared:
            self._borrowed_parts = (parts,)  # a tuple hides it from nn.Module's registry
        else:
            for name, child in parts.named_children():
                self.add_module(name, child)

    @property
    def parts(self) -> nn.Module:
        """The module that holds the diffusers parts: this one, or the one sharing the caller's."""
        return self._borrowed_parts[0] if self.shared else self

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.parts.transformer_blocks)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def token_dim(self) -> int:
        return self.architecture.token_dim

    @property
    def embedding_dim(self) -> int:
        return self.architecture.token_dim

    @property
    def weight(self) -> Tensor:
        """A base weight, whose dtype and device are the backbone's."""
        return cast(Tensor, cast(nn.Module, cast(nn.Module, self.parts.pos_embed).proj).weight)

    def embed(self, conditioning: Conditioning) -> EmbeddedConditioning:
        """Text projection, independent of noise: once per prompt, whatever it is used for."""
        weight = self.weight
        pooled = conditioning.pooled_prompt_embeds
        assert pooled is not None
        with self._in_use():
            context = cast(nn.Module, self.parts.context_embedder)(conditioning.prompt_embeds.to(weight))
        return EmbeddedConditioning(context, pooled.to(weight))

    def features(
        self, noisy_latents: Tensor, embedded: EmbeddedConditioning, sigma: Tensor
    ) -> BackboneFeatures:
        """Walk the blocks up to the last tap."""
        noisy_latents = noisy_latents.to(self.weight)
        timestep = self.schedule.match(sigma.to(noisy_latents.device)).timestep
        with self._in_use():
            temb = cast(nn.Module, self.parts.time_text_embed)(timestep, embedded.pooled)
            image = cast(nn.Module, self.parts.pos_embed)(noisy_latents).contiguous()
            text = embedded.context
            images, texts = [], []
            last = max(*self.image_taps, *self.text_taps, 0)
            for depth in range(last + 1):
                if depth > 0:
                    text, image = self.blocks[depth - 1](
                        hidden_states=image, encoder_hidden_states=text, temb=temb
                    )
                if depth in self.image_taps:
                    images.append(image)
                if depth in self.text_taps:
                    texts.append(text)
        return BackboneFeatures(tuple(images), tuple(texts), temb)

    def forward(self, noisy_latents: Tensor, conditioning: Conditioning, sigma: Tensor) -> BackboneFeatures:
        """Features of already noisy latents; sigma is snapped to the schedule's table."""
        self.check_latents(noisy_latents, finite=False)
        self.check_conditioning(conditioning, finite=False)
        rows = rows_for(len(conditioning), noisy_latents.shape[0], self.weight.device)
        return self.features(noisy_latents, self.embed(conditioning).index_select(rows), sigma)

    def check_latents(self, latents: Tensor, *, finite: bool = True) -> None:
        """Rank, channels, size against patch and position table, dtype, NaN."""
        check_tensor(latents, "latents", 4, "(batch, channel, height, width)", finite=finite)
        a, (channels, height, width) = self.architecture, latents.shape[1:]
        if channels != a.in_channels:
            raise InvalidInputError(f"latents have {channels} channels, this backbone takes {a.in_channels}")
        if height % a.patch_size or width % a.patch_size:
            raise InvalidInputError(
                f"latent height {height} and width {width} must be multiples of the patch size {a.patch_size}"
            )
        if max(height, width) > a.max_latent_side:
            raise InvalidInputError(
                f"latents of {height} x {width} exceed the position table: at most {a.max_latent_side} a side"
            )

    def check_conditioning(self, conditioning: Conditioning, *, finite: bool = True) -> None:
        """Widths of the text tensors, equal row counts, no mask with holes."""
        if not isinstance(conditioning, Conditioning):
            raise InvalidInputError(
                f"conditioning must be a dina_lrm.Conditioning, not {type(conditioning).__name__}"
            )
        embeds, pooled = conditioning.prompt_embeds, conditioning.pooled_prompt_embeds
        check_tensor(embeds, "prompt_embeds", 3, "(prompt, token, dim)", finite=finite)
        if pooled is None:
            raise InvalidInputError("an SD3 backbone needs pooled_prompt_embeds beside prompt_embeds")
        check_tensor(pooled, "pooled_prompt_embeds", 2, "(prompt, dim)", finite=finite)
        wanted = (self.architecture.joint_attention_dim, self.architecture.pooled_projection_dim)
        if (embeds.shape[-1], pooled.shape[-1]) != wanted:
            raise InvalidInputError(
                f"prompt_embeds have width {embeds.shape[-1]} and pooled_prompt_embeds {pooled.shape[-1]}; "
                f"this backbone takes {wanted[0]} and {wanted[1]}"
            )
        if embeds.shape[0] != pooled.shape[0]:
            raise InvalidInputError(
                f"{embeds.shape[0]} rows of prompt_embeds, {pooled.shape[0]} of pooled_prompt_embeds"
            )
        mask = conditioning.attention_mask
        if mask is not None and not bool(mask.bool().all()):
            raise InvalidInputError("SD3 attends to all text tokens: attention_mask must be None or all ones")

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        if not self.shared:
            yield
            return
        with borrowed(self.parts, self.adapter):
            yield


def check_taps(architecture: SD3Architecture, num_blocks: int, text_taps: tuple[int, ...]) -> None:
    """A request this transformer cannot meet is an error before anything is loaded."""
    if num_blocks > architecture.num_layers:
        raise InvalidInputError(
            f"num_blocks = {num_blocks}, but the transformer has {architecture.num_layers} blocks"
        )
    if architecture.num_layers in text_taps:
        raise InvalidInputError(
            f"text tap {architecture.num_layers} is the transformer's very last block, which puts out no "
            f"text tokens: use text taps up to {architecture.num_layers - 1}"
        )


def empty_parts(architecture: SD3Architecture, num_blocks: int) -> nn.Module:
    """The kept parts on the meta device: names and shapes, no memory.

    The last block of a whole transformer is built without a text output, so a truncated one is built one
    block too long and cut.
    """
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    config: dict[str, Any] = architecture.to_dict() | {
        "num_layers": min(num_blocks + 1, architecture.num_layers)
    }
    config["dual_attention_layers"] = architecture.dual_attention_layers
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**config)
    return share_parts(transformer, num_blocks)


def share_parts(transformer: Any, num_blocks: int) -> nn.Module:
    """A module holding the kept parts of a transformer by reference."""
    parts = nn.Module()
    parts.pos_embed = transformer.pos_embed
    parts.time_text_embed = transformer.time_text_embed
    parts.context_embedder = transformer.context_embedder
    parts.transformer_blocks = nn.ModuleList(list(transformer.transformer_blocks)[:num_blocks])
    return parts


def load_parts(
    architecture: SD3Architecture,
    num_blocks: int,
    source: TensorSource,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The kept parts with their weights; dropped blocks and the output layer are never read."""
    dropped = tuple(f"transformer_blocks.{index}." for index in range(num_blocks, architecture.num_layers))
    parts = empty_parts(architecture, num_blocks)
    fill(
        parts,
        source,
        ignore=lambda name: name.startswith(("norm_out.", "proj_out.", *dropped)),
        device=device,
        dtype=dtype,
    )
    return parts.requires_grad_(False).eval()
