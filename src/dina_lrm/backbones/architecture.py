"""The shapes of a diffusion network, and the truncated copy of it that a reward keeps.

An `Architecture` is read from the config.json of a diffusers model and builds that model again. A truncated
model is an instance of the same class that holds the first blocks and what comes before them: dropped blocks
are neither built in memory nor read from disk.
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from dina_lrm.errors import CheckpointError, InvalidInputError
from dina_lrm.files import json_types
from dina_lrm.pipelines.libraries import diffusers_class
from dina_lrm.pipelines.weights import TensorSource, fill

ArchitectureT = TypeVar("ArchitectureT", bound="Architecture")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The entries of a transformer's config.json that fix its shapes: one subclass per diffusers class."""

    diffusers_class: ClassVar[str]
    component: ClassVar[str] = "transformer"
    """Where a pipeline keeps it: "transformer" or "unet"."""
    embedders: ClassVar[tuple[str, ...]]
    """Modules and parameters that a truncated backbone keeps beside its blocks."""

    @classmethod
    def from_config(cls: type[ArchitectureT], config: Mapping[str, Any]) -> ArchitectureT:
        """From the transformer's config.json; another model class is an error."""
        kind = config.get("_class_name", cls.diffusers_class)
        if kind != cls.diffusers_class:
            raise CheckpointError(f"this checkpoint needs a {cls.diffusers_class}, the pipeline has a {kind}")
        values = {
            entry.name: _hashable(config[entry.name])
            for entry in dataclasses.fields(cls)
            if config.get(entry.name) is not None
        }
        try:
            architecture = cls(**values)
        except TypeError as error:
            raise CheckpointError(f"the transformer's config lacks entries: {error}") from error
        if architecture.predicted_channels not in (None, architecture.latent_channels):
            raise InvalidInputError(
                f"this {kind} takes {architecture.latent_channels} latent channels and puts out "
                f"{architecture.predicted_channels}: it is given pictures beside the noise (inpainting, "
                f"editing, image-to-video), only text-to-image and text-to-video models are supported"
            )
        return architecture

    def to_dict(self) -> dict[str, Any]:
        """As in config.json."""
        return json_types(self)

    def build(self) -> nn.Module:
        """The diffusers model at this size, with fresh weights, on the current default device."""
        return diffusers_class(self.diffusers_class)(**dataclasses.asdict(self))

    def position_tables(self) -> dict[str, nn.Module]:
        """Embedders that are computed, not stored; they are made anew where a model was built on meta."""
        return {}

    @property
    def block_names(self) -> tuple[str, ...]:
        """Blocks in the order of the forward pass, by their names in the diffusers model."""
        raise NotImplementedError

    @property
    def default_num_blocks(self) -> int:
        return max(1, len(self.block_names) // 2)

    @property
    def latent_multiple(self) -> int:
        """Height and width of a latent must be multiples of this."""
        return 2

    @property
    def picture_multiple(self) -> int:
        """What pictures are cut to before encoding, in cells of the latent."""
        return self.latent_multiple

    @property
    def max_latent_side(self) -> int | None:
        """Largest height or width that the position tables cover."""
        return None

    @property
    def max_latent_frames(self) -> int | None:
        """None: pictures only. Otherwise the frames of a video latent that the position tables cover."""
        return None

    @property
    def latent_channels(self) -> int:
        raise NotImplementedError

    @property
    def predicted_channels(self) -> int | None:
        """Latent channels that the network puts out; None: as many as it takes."""
        return None

    @property
    def token_dim(self) -> int:
        """Width of the tokens (of a UNet: of its innermost level), which the head takes unless told."""
        raise NotImplementedError

    @property
    def embedding_dim(self) -> int:
        """Width of temb."""
        return self.token_dim

    @property
    def prompt_dim(self) -> int:
        """Width of prompt_embeds."""
        raise NotImplementedError

    @property
    def pooled_dim(self) -> int | None:
        """Width of pooled_prompt_embeds; None: the backbone takes none."""
        return None

    @property
    def default_guidance(self) -> float | None:
        """What a guidance-distilled transformer is told unless the config says otherwise."""
        return None

    def image_tap_dim(self, tap: int) -> int:
        return self.token_dim

    def text_tap_dim(self, tap: int) -> int:
        return self.token_dim

    def text_tap_problem(self, tap: int) -> str | None:
        """Why text cannot be read after this block, or None."""
        return None

    def check_taps(self, num_blocks: int, text_taps: tuple[int, ...]) -> None:
        """A request this transformer cannot meet is an error before anything is loaded."""
        total = len(self.block_names)
        if num_blocks > total:
            raise InvalidInputError(f"num_blocks = {num_blocks}, but the transformer has {total} blocks")
        for tap in text_taps:
            problem = self.text_tap_problem(tap)
            if problem is not None:
                raise InvalidInputError(f"text tap {tap} {problem}")


class TransformerArchitecture(Architecture):
    """An `Architecture` of one list of equal blocks on latents, by the names that diffusers' configs use."""

    block_list: ClassVar[str] = "transformer_blocks"
    in_channels: int
    out_channels: int | None
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(f"{self.block_list}.{index}" for index in range(self.num_layers))

    @property
    def latent_channels(self) -> int:
        return self.in_channels

    @property
    def predicted_channels(self) -> int | None:
        return self.out_channels

    @property
    def token_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


def truncated(transformer: nn.Module, architecture: Architecture, num_blocks: int) -> nn.Module:
    """An instance of the same class that holds only the kept parts of a transformer, by reference."""
    view: Any = copy.copy(transformer)
    view._modules, view._parameters, view._buffers = {}, {}, {}
    view.__dict__.pop("peft_config", None)  # PEFT's record of adapters stays the whole transformer's own
    for name in architecture.embedders:
        value = getattr(transformer, name, None)
        if isinstance(value, nn.Parameter):
            view.register_parameter(name, value)
        elif isinstance(value, nn.Module):
            view.add_module(name, value)
    for name in architecture.block_names[:num_blocks]:
        head, _, index = name.partition(".")
        block = transformer.get_submodule(name)
        if not index:
            view.add_module(head, block)
            continue
        if head not in view._modules:
            view.add_module(head, nn.ModuleList())
        view._modules[head].append(block)
    return view


def empty_parts(architecture: Architecture, num_blocks: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The kept parts on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        parts = truncated(architecture.build(), architecture, num_blocks)
    for name, parameter in parts.named_parameters():
        parameter.data = parameter.data.to(stored_dtype(parts, name, dtype))
    return parts.requires_grad_(False).eval()


def load_parts(
    architecture: Architecture,
    num_blocks: int,
    source: TensorSource,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The kept parts with their weights; dropped blocks and the output layers are never read."""
    with torch.device("meta"):
        whole = architecture.build()
    parts = truncated(whole, architecture, num_blocks)
    dropped = set(whole.state_dict()) - set(parts.state_dict())
    fill(
        parts,
        source,
        ignore=dropped.__contains__,
        device=device,
        dtype=lambda name: stored_dtype(parts, name, dtype),
    )
    for name, table in architecture.position_tables().items():
        parts.add_module(name, table.to(device))
    return parts.requires_grad_(False).eval()


def stored_dtype(parts: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, but never half precision for what diffusers keeps in float32 for this class."""
    wide = set(getattr(parts, "_keep_in_fp32_modules", None) or ())
    return dtype if wide.isdisjoint(name.split(".")) else torch.promote_types(dtype, torch.float32)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
