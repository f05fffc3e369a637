"""Putting a reward model together: backbone parts out of a pipeline, a head that fits, the adapter on top."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dina_lrm.core.sharding import whole
from dina_lrm.errors import CheckpointError, InvalidInputError, MissingComponentError
from dina_lrm.models.architecture import Architecture, empty_parts, load_parts, truncated
from dina_lrm.models.backbone import Backbone
from dina_lrm.models.config import RewardModelConfig
from dina_lrm.models.encoders import Encoders, encoders_for, pixels_per_latent
from dina_lrm.models.families import backbone_of, read_architecture
from dina_lrm.models.head import RewardHead
from dina_lrm.models.lora import LoraAdapter, lora_config, remove_adapter
from dina_lrm.models.source import PipelineSource
from dina_lrm.models.weights import TensorSource, from_module

if TYPE_CHECKING:
    from dina_lrm.models.checkpoint import Checkpoint
    from dina_lrm.models.reward_model import RewardModel

NUM_PROBE_VALUES = 8


def new_config(
    pipeline: Any,
    *,
    num_blocks: int | None,
    image_taps: Any,
    text_taps: Any,
    guidance: float | None,
    **settings: Any,
) -> RewardModelConfig:
    """Fill in what depends on the backbone: how many blocks, taps at thirds of those, guidance."""
    architecture, source = _architecture(pipeline)
    if num_blocks is None:
        num_blocks = architecture.default_num_blocks
    thirds = default_taps(num_blocks)
    if text_taps is None:
        text_taps = [tap for tap in thirds if architecture.text_tap_problem(tap) is None] or [0]
    return RewardModelConfig(
        backbone=backbone_of(architecture).family,  # type: ignore[arg-type]
        backbone_id=None if source is None else source.name,
        num_blocks=num_blocks,
        image_taps=tuple(thirds if image_taps is None else image_taps),
        text_taps=tuple(text_taps),
        guidance=architecture.default_guidance if guidance is None else guidance,
        **settings,
    )


def load(
    config: RewardModelConfig,
    pipeline: Any,
    checkpoint: "Checkpoint | None",
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    variant: str | None,
) -> dict[str, Any]:
    """Arguments for RewardModel: everything but the values of head and adapter.

    Base weights come from the pipeline, or from the checkpoint where it holds all of them.
    """
    architecture, source = _architecture(pipeline, variant)
    config = _for_family(config, architecture, checkpoint)
    _check_architecture(architecture, config, checkpoint)
    meta = torch.device(device).type == "meta" if device is not None else False
    network = None if source is None else source.network
    shared = False
    if meta:
        parts = empty_parts(architecture, config.num_blocks, dtype or torch.float32)
    elif source is None:
        raise MissingComponentError('an architecture alone has no weights: give a pipeline, or device="meta"')
    elif network is None:
        parts = _parts(architecture, config, source, checkpoint, device or "cpu", dtype or torch.float32)
    else:
        name, _, leaf = backbone_of(architecture).probes[0].rpartition(".")
        weight = getattr(network.get_submodule(name), leaf)
        device = torch.device(device or weight.device)
        dtype = dtype or cast(torch.dtype, weight.dtype)
        shared = config.tuning == "frozen" and (device.type, dtype) == (weight.device.type, weight.dtype)
        parts = (
            truncated(network, architecture, config.num_blocks)
            if shared
            else _parts(architecture, config, source, checkpoint, device, dtype)
        )
    backbone = _backbone(config, architecture, parts, source, shared=shared)
    if checkpoint is not None and config.tuning != "full" and not meta:
        check_fingerprint(checkpoint.fingerprint, backbone, checkpoint.origin)
    adapter = None
    if config.tuning == "lora":
        adapter = LoraAdapter(parts, lora_config(config))
    if config.tuning == "full":
        backbone.requires_grad_(True)
    if not shared:
        for block in backbone.kept_blocks[max(*config.image_taps, *config.text_taps, 0) :]:
            block.requires_grad_(False)  # after the last tap: kept for the checkpoint's sake, never computed
    text_dtype = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    encoders = (
        None if source is None else encoders_for(source, architecture, config.max_text_tokens, text_dtype)
    )
    return {
        "backbone": backbone,
        "head": _head(
            config, architecture, "meta" if meta else backbone.weight.device, backbone.weight.dtype
        ),
        "config": config,
        "adapter": adapter,
        "encoders": encoders,
    }


def attach(model: "RewardModel", pipeline: Any) -> tuple[Backbone, LoraAdapter | None]:
    """Backbone over the pipeline's own transformer, with the reward's LoRA as a named, idle adapter."""
    own, config = model.backbone, model.config
    if config.tuning == "full":
        raise InvalidInputError("this reward trained every weight of its backbone: there is nothing to share")
    if model.attached:
        raise InvalidInputError("this reward already shares a pipeline's transformer: detach it first")
    source, architecture = check_same_architecture(model, pipeline), own.architecture
    parts = truncated(source.network, architecture, config.num_blocks)
    name, adapter = None, None
    if model.adapter is not None:
        taken = {name for layer in parts.modules() for name in getattr(layer, "lora_A", {})}
        name = next(
            name
            for name in ("dina_reward", *(f"dina_reward_{i}" for i in range(2, 100)))
            if name not in taken
        )
        adapter = LoraAdapter(parts, lora_config(config), name, idle=True)
        adapter.load_state_dict(model.adapter.state_dict(), "the reward's own adapter")
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
    return _again(own, parts, shared=True, adapter=name), adapter


def check_same_architecture(model: "RewardModel", pipeline: Any) -> PipelineSource:
    """A live pipeline whose network has the architecture of the reward's backbone, or an error."""
    if isinstance(pipeline, Architecture | str | Path) or PipelineSource(pipeline).network is None:
        raise InvalidInputError("this takes a live diffusers pipeline, whose own transformer or unet is used")
    source, own = PipelineSource(pipeline), model.backbone.architecture
    architecture = read_architecture(source.network_config())
    if architecture != own:
        raise InvalidInputError(
            f"the pipeline's transformer differs from the reward's backbone (reward, pipeline): "
            f"{_differences(own, architecture)}"
        )
    return source


def detach(model: "RewardModel", pipeline: Any) -> tuple[Backbone, LoraAdapter | None]:
    """A private backbone with the same weights; the pipeline's transformer gets its plain layers back."""
    shared, config = model.backbone, model.config
    state = model.adapter.state_dict() if model.adapter is not None else None
    if shared.adapter is not None:
        remove_adapter(shared.parts, shared.adapter)
    weight = shared.weight
    parts = load_parts(
        shared.architecture,
        config.num_blocks,
        from_module(PipelineSource(pipeline).network, "the attached pipeline's transformer"),
        device=weight.device,
        dtype=weight.dtype,
    )
    backbone = _again(shared, parts, shared=False, adapter=None)
    if state is None:
        return backbone, None
    adapter = LoraAdapter(parts, lora_config(config))
    adapter.load_state_dict(state, "the reward's own adapter")
    return backbone, adapter


def live_encoders(model: "RewardModel", pipeline: Any) -> Encoders | None:
    """Encoders of a live pipeline, used where they are."""
    return encoders_for(
        PipelineSource(pipeline), model.backbone.architecture, model.config.max_text_tokens, torch.float32
    )


def _backbone(
    config: RewardModelConfig,
    architecture: Architecture,
    parts: nn.Module,
    source: PipelineSource | None,
    *,
    shared: bool,
) -> Backbone:
    kind = backbone_of(architecture)
    settings: dict[str, Any] = {}
    if source is not None and source.has("vae"):
        settings["pixels_per_latent"] = pixels_per_latent(source.config("vae", "config.json"))
    scheduler = (
        kind.default_scheduler if source is None else source.config("scheduler", "scheduler_config.json")
    )
    return kind(
        architecture,
        parts,
        scheduler,
        image_taps=config.image_taps,
        text_taps=config.text_taps,
        num_blocks=config.num_blocks,
        guidance=config.guidance,
        shared=shared,
        **settings,
    )


def _again(backbone: Backbone, parts: nn.Module, *, shared: bool, adapter: str | None) -> Backbone:
    """The same backbone over other parts."""
    return type(backbone)(
        backbone.architecture,
        parts,
        backbone.scheduler,
        image_taps=backbone.image_taps,
        text_taps=backbone.text_taps,
        num_blocks=backbone.num_blocks,
        guidance=backbone.guidance,
        pixels_per_latent=backbone.pixels_per_latent,
        shared=shared,
        adapter=adapter,
    )


def _for_family(
    config: RewardModelConfig, architecture: Architecture, checkpoint: "Checkpoint | None"
) -> RewardModelConfig:
    """The config with its family, which a published checkpoint takes from the pipeline."""
    family = backbone_of(architecture).family
    if config.backbone is None:
        return replace(config, backbone=family, guidance=architecture.default_guidance)  # type: ignore[arg-type]
    if config.backbone != family:
        origin = "the config" if checkpoint is None else checkpoint.origin
        raise CheckpointError(
            f"{origin} is a reward for another backbone: {config.backbone}, the pipeline has {family} "
            f"({architecture.diffusers_class})"
        )
    return config


def fingerprint(backbone: Backbone) -> dict[str, Any] | None:
    """Architecture and a few base weights that no adapter touches: enough to tell backbones apart."""
    if backbone.weight.device.type == "meta":
        return None
    tensors = {
        name.replace(".base_layer.", "."): tensor for name, tensor in backbone.parts.named_parameters()
    }
    probes = {name: _probe(tensors[name]) for name in backbone.probes if name in tensors}
    return {"architecture": backbone.architecture.to_dict(), "probes": probes}


def check_fingerprint(recorded: Mapping[str, Any] | None, backbone: Backbone, origin: str) -> None:
    """CheckpointError if the checkpoint was trained on other base weights than these.

    Values are compared up to the rounding of bfloat16, so the same weights in another precision pass.
    """
    present = fingerprint(backbone)
    if recorded is None or present is None:
        return
    try:
        for name, values in recorded["probes"].items():
            stored, found = torch.tensor(values), torch.tensor(present["probes"][name])
            if stored.shape != found.shape or bool((stored - found).abs().max() > 0.02 * stored.abs().max()):
                raise CheckpointError(
                    f"{origin} was trained on another backbone: same shapes, different base weights ({name})"
                )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{origin}: the recorded backbone fingerprint is damaged ({error!r})"
        ) from error


def _probe(tensor: Tensor) -> list[float]:
    flat = whole(tensor).flatten()
    return flat[:: max(1, flat.numel() // NUM_PROBE_VALUES)][:NUM_PROBE_VALUES].float().tolist()


def _architecture(pipeline: Any, variant: str | None = None) -> tuple[Architecture, PipelineSource | None]:
    if isinstance(pipeline, Architecture):
        return pipeline, None
    source = PipelineSource(pipeline, variant=variant)
    return read_architecture(source.network_config()), source


def _check_architecture(
    architecture: Architecture, config: RewardModelConfig, checkpoint: "Checkpoint | None"
) -> None:
    try:
        architecture.check_taps(config.num_blocks, config.text_taps)
        if checkpoint is None or checkpoint.fingerprint is None:
            return
        recorded = type(architecture).from_config(checkpoint.fingerprint["architecture"])
    except (InvalidInputError, KeyError, TypeError, AttributeError) as error:
        if checkpoint is None:
            raise
        raise CheckpointError(f"{checkpoint.origin} does not fit this backbone: {error}") from error
    if recorded != architecture:
        differing = _differences(recorded, architecture)
        raise CheckpointError(
            f"{checkpoint.origin} was made for another backbone (checkpoint, pipeline): {differing}"
        )


def _differences(ours: Architecture, theirs: Architecture) -> dict[str, tuple[Any, Any]]:
    a, b = ours.to_dict(), theirs.to_dict()
    if type(ours) is not type(theirs):
        return {"class": (ours.diffusers_class, theirs.diffusers_class)}
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


def _parts(
    architecture: Architecture,
    config: RewardModelConfig,
    source: PipelineSource,
    checkpoint: "Checkpoint | None",
    device: torch.device | str,
    dtype: torch.dtype,
) -> nn.Module:
    if checkpoint is not None and checkpoint.backbone is not None:
        state = checkpoint.backbone
        weights = TensorSource(f"the backbone in {checkpoint.origin}", frozenset(state), state.__getitem__)
    else:
        weights = source.network_weights()
    return load_parts(architecture, config.num_blocks, weights, device=device, dtype=dtype)


def _head(
    config: RewardModelConfig, architecture: Architecture, device: Any, dtype: torch.dtype
) -> RewardHead:
    settings = config.head
    with torch.device(device if torch.device(device).type == "meta" else "cpu"):
        head = RewardHead(
            image_dims=[architecture.image_tap_dim(tap) for tap in config.image_taps],
            text_dims=[architecture.text_tap_dim(tap) for tap in config.text_taps],
            embedding_dim=architecture.embedding_dim,
            width=settings.width,
            num_queries=settings.num_queries,
            num_attention_heads=settings.num_attention_heads,
            project_in=settings.project_in,
            dropout=settings.dropout,
        )
    return head.to(device=device, dtype=_wide_or(dtype))


def _wide_or(dtype: torch.dtype | None) -> torch.dtype:
    return torch.float32 if dtype is None else torch.promote_types(dtype, torch.float32)


def default_taps(num_blocks: int) -> Sequence[int]:
    """Thirds of the kept blocks, the paper's 4, 8, 12 of 12."""
    return sorted({max(1, round(num_blocks * part / 3)) for part in (1, 2, 3)})
