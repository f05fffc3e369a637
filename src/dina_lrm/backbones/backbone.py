"""What every diffusion backbone offers to the reward head, and all that backbones have in common.

    arguments(latents, conditioning, timestep)   what the generator's pipeline would call its transformer with
    walk(run, **arguments)                       that transformer's own forward, block by block
    features(latents, conditioning, sigma)       the streams after the tapped blocks

A backbone is one diffusers class: an `Architecture` (the shapes, from config.json) and a `Backbone` with the
first two of these methods. Packing, position ids and timestep conventions stay inside: outside there are only
unpacked latents `(batch, channel, height, width)`, a frame axis before height for video, already shifted and
scaled, and sigma, with 0 clean and 1 pure noise. `docs/guides/backbones.md` shows how to add one.

`forward_blocks` runs blocks through `run`, so that the same lines serve a plain call, gradient checkpointing,
and the replay of what a sampling pipeline has computed already (`models/watch.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dina_lrm.backbones.architecture import Architecture, stored_dtype
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.noise import NoiseSchedule
from dina_lrm.core.tensors import Features, check_tensor
from dina_lrm.errors import InvalidInputError
from dina_lrm.pipelines.libraries import diffusers_class

if TYPE_CHECKING:
    from dina_lrm.backbones.prompts import PromptEncoder
    from dina_lrm.backbones.sharing import SharedWeights

FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Projections of an attention layer, by diffusers' names."""
TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Those of the text stream in a joint attention layer."""
RunBlock = Callable[..., Any]
"""How a block is run: `run(block, *args, **kwargs)` gives what the block puts out."""


def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The plain `RunBlock`."""
    return block(*args, **kwargs)


def checkpointed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A `RunBlock` that keeps no activations of a block and computes it again in the backward pass."""
    return checkpoint(block, *args, use_reentrant=False, **kwargs)


class Streams(NamedTuple):
    """The tokens between two blocks."""

    image: Features
    text: Features
    temb: Float[Tensor, "batch embedding"]
    text_mask: Bool[Tensor, "batch text_token"] | None = None


@dataclass(frozen=True)
class BackboneFeatures:
    """Tokens read inside the backbone, and its noise-and-text embedding."""

    image: tuple[Float[Tensor, "batch _ _"], ...]
    """One per image tap, ascending. A UNet's taps differ in tokens and width, a transformer's do not."""
    text: tuple[Float[Tensor, "batch text_token _"], ...]
    """One per text tap, ascending; empty where text is not read."""
    temb: Float[Tensor, "batch embedding"]
    """The backbone's time and pooled-text embedding, before any non-linearity."""
    text_mask: Bool[Tensor, "batch text_token"] | None = None
    """False for padding, where the backbone masks it."""


class NoisyState(NamedTuple):
    """A state of a sampling pipeline in our terms: the inverse of `Backbone.arguments`."""

    latents: Tensor
    conditioning: Conditioning
    timestep: Float[Tensor, " batch"]
    """As in the scheduler's training table."""

    def index_select(self, rows: Tensor) -> "NoisyState":
        latents, conditioning, timestep = self
        return NoisyState(latents[rows], conditioning.index_select(rows), timestep[rows])


class Backbone(nn.Module):
    """First blocks of a diffusion transformer, with taps. `backbones/sd3.py` is the shortest example.

    Args:
        parts: a truncated instance of the diffusers class (`truncated`).
        scheduler: the scheduler's config, whose training table gives the timesteps.
        guidance: what a guidance-distilled transformer is told; None for all others.
        pixels_per_latent: the VAE's spatial factor, for the backbones that are told the size of the picture.
        shared: where the parts refer to the weights of somebody else's network. They are then not registered
            as children: moving, casting or training the reward model cannot touch them, and they follow the
            network instead.
    """

    family: ClassVar[str]
    prompt_encoder: ClassVar[type["PromptEncoder"]]
    architecture_class: ClassVar[type[Architecture]]
    default_scheduler: ClassVar[Mapping[str, Any]]
    """Scheduler of the released models, for an architecture without a pipeline."""
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION
    """Adapted by name suffix."""
    lora_text_targets: ClassVar[tuple[str, ...]] = ()
    """Those of them that only the text stream needs: left out of the last kept block if it is not read."""
    reference_weight: ClassVar[str]
    """A base weight that no adapter touches, whose dtype and device are the backbone's."""
    masks_text: ClassVar[bool] = False
    """Whether padded text tokens are masked. Where not, padding is seen, so its length must be fixed."""
    generator_rounds_time: ClassVar[bool] = False
    """Whether diffusers rounds timesteps to the dtype of the tokens, which `forward_blocks` never does."""
    conditional_half: ClassVar[str | None] = None
    """Where a guided pipeline puts the conditional rows when it doubles its batch: "first" or "last".
    None: it makes two calls, the conditional one first."""

    def __init__(
        self,
        architecture: Any,
        parts: nn.Module,
        scheduler: Mapping[str, Any],
        *,
        image_taps: tuple[int, ...],
        text_taps: tuple[int, ...],
        num_blocks: int,
        guidance: float | None = None,
        pixels_per_latent: int = 8,
        shared: "SharedWeights | None" = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.scheduler = dict(scheduler)
        self.schedule = NoiseSchedule.from_config(scheduler)
        self.image_taps = tuple(sorted(image_taps))
        self.text_taps = tuple(sorted(text_taps))
        self.block_names = architecture.block_names[:num_blocks]
        self.guidance = guidance
        self.pixels_per_latent = pixels_per_latent
        self.shared = shared
        self._parts = (parts,)  # a tuple hides it from nn.Module's registry
        if shared is None:
            for name, child in parts.named_children():
                self.add_module(name, child)
            # One registry: whoever replaces a parameter here (`to`, FSDP2) replaces what `forward_blocks`
            # reads there.
            self._parameters = parts._parameters

    # ------------------------------------------------------------------------------------- per family

    def arguments(self, latents: Tensor, conditioning: Conditioning, timestep: Tensor) -> dict[str, Any]:
        """What the generator's pipeline calls its transformer with for this state."""
        raise NotImplementedError

    def forward_blocks(self, run: RunBlock, *args: Any, **kwargs: Any) -> Iterator[Streams]:
        """The transformer's forward pass: the streams before the first block, then after each block."""
        raise NotImplementedError

    def state(self, **arguments: Any) -> NoisyState:
        """The state a pipeline has called its transformer with: the inverse of `arguments`."""
        raise NotImplementedError

    def set_timesteps(self, scheduler: Any, num_steps: int, height: int, width: int) -> None:
        """Prepare a scheduler as the generator's pipeline does for latents of this size."""
        scheduler.set_timesteps(num_steps)

    # ------------------------------------------------------------------------------------- in common

    def features(
        self, noisy_latents: Tensor, conditioning: Conditioning, sigma: Tensor, *, run: RunBlock = call
    ) -> BackboneFeatures:
        """Read the taps at the levels of the schedule's table nearest to `sigma`, one row per latent."""
        timestep = self.schedule.match(sigma.to(noisy_latents.device)).timestep
        return self.features_at(noisy_latents, conditioning, timestep, run=run)

    def features_at(
        self, noisy_latents: Tensor, conditioning: Conditioning, timestep: Tensor, *, run: RunBlock = call
    ) -> BackboneFeatures:
        """The same at given timesteps, which need not be in the table: a sampler's own."""
        if self.shared is not None:
            self.shared.follow()
        weight = self.weight
        arguments = self.arguments(
            noisy_latents.to(weight), conditioning.to(weight.device, weight.dtype), timestep.to(weight.device)
        )
        images, texts = [], []
        last = max(*self.image_taps, *self.text_taps, 0)
        for depth, streams in enumerate(self.forward_blocks(run, **arguments)):
            if depth in self.image_taps:
                images.append(streams.image)
            if depth in self.text_taps:
                texts.append(streams.text)
            if depth == last:  # later blocks are never computed
                return BackboneFeatures(tuple(images), tuple(texts), streams.temb, streams.text_mask)
        raise AssertionError("a tap lies behind the last block")

    def forward(self, noisy_latents: Tensor, conditioning: Conditioning, sigma: Tensor) -> BackboneFeatures:
        """Features of already noisy latents; sigma is snapped to the schedule's table.

        A single conditioning row serves all latents.
        """
        self.check_latents(noisy_latents, finite=False)
        self.check_conditioning(conditioning, finite=False)
        rows = rows_for(len(conditioning), noisy_latents.shape[0], self.weight.device)
        return self.features(noisy_latents, conditioning.index_select(rows), sigma)

    def sampling_sigmas(self, num_steps: int, height: int, width: int) -> Float[Tensor, " num_steps"]:
        """Noise levels at which the generator's pipeline evaluates its transformer in `num_steps` steps.

        Args:
            height, width: of the latents; some schedules shift with the resolution.
        """
        kind = diffusers_class(str(self.scheduler.get("_class_name", FLOW_MATCH)))
        scheduler = kind.from_config({k: v for k, v in self.scheduler.items() if not k.startswith("_")})
        self.set_timesteps(scheduler, num_steps, height, width)
        return self.schedule.sigma_at(scheduler.timesteps.to(torch.float32))

    @property
    def parts(self) -> Any:
        """The truncated diffusers model that holds the kept parts."""
        return self._parts[0]

    @property
    def kept_blocks(self) -> list[nn.Module]:
        return [self.parts.get_submodule(name) for name in self.block_names]

    @property
    def num_blocks(self) -> int:
        return len(self.block_names)

    @property
    def run_modules(self) -> list[nn.Module]:
        """What `forward_blocks` hands to `run`, in order."""
        return self.kept_blocks

    @property
    def token_dim(self) -> int:
        return self.architecture.token_dim

    @property
    def embedding_dim(self) -> int:
        return self.architecture.embedding_dim

    @property
    def weight(self) -> Tensor:
        """A base weight, whose dtype and device are the backbone's."""
        name, _, leaf = self.reference_weight.rpartition(".")
        module = self.parts.get_submodule(name)
        return getattr(module if self.shared is None else self.shared.originals[module], leaf)

    def cast(self, dtype: torch.dtype) -> None:
        """Base weights in another precision; LoRA, and what diffusers keeps in float32, stay wide."""
        for name, tensor in self.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and ".lora_" not in name:
                tensor.data = tensor.data.to(stored_dtype(self.parts, name, dtype))

    def check_latents(self, latents: Tensor, *, finite: bool = True) -> None:
        """Raise InvalidInputError unless rank, channels, size, dtype and values suit this backbone."""
        a = self.architecture
        if a.max_latent_frames is not None and isinstance(latents, Tensor) and latents.ndim == 5:
            check_tensor(latents, "latents", 5, "(batch, channel, frame, height, width)", finite=finite)
            if latents.shape[2] > a.max_latent_frames:
                raise InvalidInputError(
                    f"latents have {latents.shape[2]} frames: this backbone takes 1 to {a.max_latent_frames}"
                )
        else:
            check_tensor(latents, "latents", 4, "(batch, channel, height, width)", finite=finite)
        channels, height, width = latents.shape[1], *latents.shape[-2:]
        if channels != a.latent_channels:
            raise InvalidInputError(
                f"latents have {channels} channels, this {self.family} backbone takes {a.latent_channels}: "
                f"latents of another family?"
            )
        if height % a.latent_multiple or width % a.latent_multiple:
            raise InvalidInputError(
                f"latents of {width}x{height}: width and height must be multiples of {a.latent_multiple}"
            )
        if a.max_latent_side is not None and max(height, width) > a.max_latent_side:
            raise InvalidInputError(
                f"latents of {width}x{height} exceed the position table: at most {a.max_latent_side} a side"
            )

    def check_conditioning(self, conditioning: Conditioning, *, finite: bool = True) -> None:
        """Raise InvalidInputError unless widths, row counts and mask suit this backbone."""
        if not isinstance(conditioning, Conditioning):
            raise InvalidInputError(
                f"conditioning must be a dina_lrm.Conditioning, not {type(conditioning).__name__}"
            )
        a = self.architecture
        embeds, pooled, mask = (
            conditioning.prompt_embeds,
            conditioning.pooled_prompt_embeds,
            conditioning.attention_mask,
        )
        check_tensor(embeds, "prompt_embeds", 3, "(prompt, token, dim)", finite=finite)
        if embeds.shape[-1] != a.prompt_dim:
            raise InvalidInputError(
                f"prompt_embeds have width {embeds.shape[-1]}, "
                f"this {self.family} backbone takes {a.prompt_dim}"
            )
        if a.pooled_dim is not None:
            if pooled is None:
                raise InvalidInputError(
                    f"this {self.family} backbone needs pooled_prompt_embeds beside prompt_embeds"
                )
            check_tensor(pooled, "pooled_prompt_embeds", 2, "(prompt, dim)", finite=finite)
            if pooled.shape[-1] != a.pooled_dim:
                raise InvalidInputError(
                    f"pooled_prompt_embeds have width {pooled.shape[-1]}, "
                    f"this {self.family} backbone takes {a.pooled_dim}"
                )
            if embeds.shape[0] != pooled.shape[0]:
                raise InvalidInputError(
                    f"{embeds.shape[0]} rows of prompt_embeds, {pooled.shape[0]} of pooled_prompt_embeds"
                )
        if mask is None:
            return
        if mask.shape != embeds.shape[:2]:
            raise InvalidInputError(
                f"attention_mask has shape {tuple(mask.shape)}: it must be {tuple(embeds.shape[:2])}, "
                f"one entry per text token"
            )
        if not self.masks_text and not bool(mask.bool().all()):
            raise InvalidInputError(
                f"{self.family} attends to all text tokens, padding included: "
                f"attention_mask must be None or all ones"
            )
        if not bool(mask.bool().any(dim=1).all()):
            raise InvalidInputError("attention_mask masks every token of a prompt")


# ----------------------------------------------------------------------------------------------------- checks


def rows_for(count: int, batch: int, device: torch.device, *, what: str = "conditioning") -> Tensor:
    """Which conditioning row each of `batch` latents reads: its own, or the only one there is."""
    if count not in (1, batch):
        raise InvalidInputError(
            f"{what} has {count} rows for {batch} latents: give one row, or one per latent"
        )
    return (
        torch.zeros(batch, dtype=torch.long, device=device)
        if count == 1
        else torch.arange(batch, device=device)
    )
