"""Putting a reward model together: backbone parts out of a pipeline, a head that fits, the adapter on top."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dina_lrm.backbones.architecture import Architecture, empty_parts, load_parts
from dina_lrm.backbones.backbone import Backbone
from dina_lrm.backbones.families import backbone_of, read_architecture
from dina_lrm.backbones.fingerprint import check_fingerprint, differing, fingerprint
from dina_lrm.backbones.lora import LoraAdapter
from dina_lrm.backbones.sharing import SharedWeights, why_not_shared
from dina_lrm.checkpoints.config import RewardModelConfig
from dina_lrm.errors import CheckpointError, InvalidInputError, MissingComponentError
from dina_lrm.models.encoders import Encoders, encoders_for, pixels_per_latent
from dina_lrm.models.head import RewardHead
from dina_lrm.pipelines.source import PipelineSource
from dina_lrm.pipelines.weights import TensorSource, from_module, listed

if TYPE_CHECKING:
    from dina_lrm.checkpoints.contents import Checkpoint
    from dina_lrm.models.reward_network import RewardNetwork


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
    shared = None
    if meta:
        parts = empty_parts(architecture, config.num_blocks, dtype or torch.float32)
    elif source is None:
        raise MissingComponentError('an architecture alone has no weights: give a pipeline, or device="meta"')
    elif network is None:
        parts = _parts(architecture, config, source, checkpoint, device or "cpu", dtype or torch.float32)
    else:
        name, _, leaf = backbone_of(architecture).reference_weight.rpartition(".")
        weight = getattr(network.get_submodule(name), leaf)
        device = torch.device(device or weight.device)
        dtype = dtype or cast(torch.dtype, weight.dtype)
        in_place = (device.type, dtype) == (weight.device.type, weight.dtype) and why_not_shared(
            network
        ) is None
        if config.tuning == "frozen" and in_place:
            shared = SharedWeights(network, architecture, config.num_blocks)
            parts = shared.parts
        else:
            parts = _parts(architecture, config, source, checkpoint, device, dtype)
    backbone = _backbone(config, architecture, parts, source, shared)
    if checkpoint is not None and config.tuning != "full":
        check_fingerprint(checkpoint.fingerprint, parts, checkpoint.origin)
    own_fingerprint = fingerprint(architecture, parts)
    adapter = None
    if config.tuning == "lora":
        adapter = LoraAdapter(parts, config.lora_config())
    if config.tuning == "full":
        backbone.requires_grad_(True)
    if shared is None:
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
        "fingerprint": own_fingerprint,
    }


def attach(model: "RewardNetwork", pipeline: Any) -> tuple[Backbone, LoraAdapter | None]:
    """Backbone over the weights of the pipeline's own transformer, and the reward's LoRA on it."""
    own, config = model.backbone, model.config
    if config.tuning == "full":
        raise InvalidInputError("this reward trained every weight of its backbone: there is nothing to share")
    source, architecture = check_same_architecture(model, pipeline), own.architecture
    shared = SharedWeights(source.network, architecture, config.num_blocks)
    changed = differing((model.fingerprint or {}).get("probes", {}), shared.parts)
    if changed:
        raise InvalidInputError(
            f"the pipeline's transformer has other base weights than the reward's backbone "
            f"({listed(changed)}): it is of another training, or a LoRA was fused into it (unfuse_lora() "
            f"takes it out). Use the reward without attach, with base weights of its own"
        )
    return _same_over(own, shared.parts, shared), _copy_of(model.adapter, shared.parts, config)


def check_same_architecture(model: "RewardNetwork", pipeline: Any) -> PipelineSource:
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


def detach(model: "RewardNetwork", pipeline: Any) -> tuple[Backbone, LoraAdapter | None]:
    """A private backbone with the same weights."""
    shared, weight = model.backbone, model.backbone.weight
    assert shared.shared is not None
    shared.shared.follow()
    parts = load_parts(
        shared.architecture,
        model.config.num_blocks,
        from_module(shared.shared.network, "the attached pipeline's transformer"),
        device=weight.device,
        dtype=weight.dtype,
    )
    return _same_over(shared, parts, None), _copy_of(model.adapter, parts, model.config)


def _copy_of(adapter: LoraAdapter | None, parts: nn.Module, config: RewardModelConfig) -> LoraAdapter | None:
    """The same LoRA, frozen, on other parts."""
    if adapter is None:
        return None
    copied = LoraAdapter(parts, config.lora_config())
    copied.load_state_dict(adapter.state_dict(), "the reward's own adapter")
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    return copied


def live_encoders(model: "RewardNetwork", pipeline: Any) -> Encoders | None:
    """Encoders of a live pipeline, used where they are."""
    return encoders_for(
        PipelineSource(pipeline), model.backbone.architecture, model.config.max_text_tokens, torch.float32
    )


def _backbone(
    config: RewardModelConfig,
    architecture: Architecture,
    parts: nn.Module,
    source: PipelineSource | None,
    shared: SharedWeights | None,
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


def _same_over(backbone: Backbone, parts: nn.Module, shared: SharedWeights | None) -> Backbone:
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
