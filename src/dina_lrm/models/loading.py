"""Putting a reward model together: backbone parts out of a pipeline, a head that fits, the adapter on top."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dina_lrm.core.noise import NoiseSchedule
from dina_lrm.errors import CheckpointError, InvalidInputError, MissingComponentError
from dina_lrm.models.config import RewardModelConfig
from dina_lrm.models.encoders import Encoders, encoders_for
from dina_lrm.models.head import RewardHead
from dina_lrm.models.lora import LoraAdapter, lora_config, remove_adapter
from dina_lrm.models.sd3 import SD3Architecture, SD3Backbone, check_taps, empty_parts, load_parts, share_parts
from dina_lrm.models.source import PipelineSource
from dina_lrm.models.weights import TensorSource, from_module

if TYPE_CHECKING:
    from dina_lrm.models.checkpoint import Checkpoint
    from dina_lrm.models.reward_model import RewardModel

SD3_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
"""Of every released SD3 and SD3.5, for an architecture without a pipeline."""
PROBES = ("pos_embed.proj.weight", "context_embedder.weight", "transformer_blocks.0.ff.net.0.proj.weight")
NUM_PROBE_VALUES = 8


def new_config(
    pipeline: Any, *, num_blocks: int | None, image_taps: Any, text_taps: Any, **settings: Any
) -> RewardModelConfig:
    """Fill in what depends on the backbone: half of its blocks, taps at thirds of those."""
    architecture, source = _architecture(pipeline)
    if num_blocks is None:
        num_blocks = max(1, architecture.num_layers // 2)
    thirds = default_taps(num_blocks)
    if text_taps is None:
        text_taps = [tap for tap in thirds if tap < architecture.num_layers]
    return RewardModelConfig(
        backbone_id=None if source is None else source.name,
        num_blocks=num_blocks,
        image_taps=tuple(thirds if image_taps is None else image_taps),
        text_taps=tuple(text_taps),
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
    _check_architecture(architecture, config, checkpoint)
    meta = torch.device(device).type == "meta" if device is not None else False
    live = None if source is None else source.live
    shared = False
    if meta:
        parts = empty_parts(architecture, config.num_blocks).to(dtype or torch.float32).requires_grad_(False)
    elif source is None:
        raise MissingComponentError('an architecture alone has no weights: give a pipeline, or device="meta"')
    elif live is None:
        parts = _parts(architecture, config, source, checkpoint, device or "cpu", dtype or torch.float32)
    else:
        weight = live.transformer.pos_embed.proj.weight
        device = torch.device(device or weight.device)
        dtype = dtype or cast(torch.dtype, weight.dtype)
        shared = config.tuning == "frozen" and (device.type, dtype) == (weight.device.type, weight.dtype)
        parts = (
            share_parts(live.transformer, config.num_blocks)
            if shared
            else _parts(architecture, config, source, checkpoint, device, dtype)
        )
    schedule_config = SD3_SCHEDULER if source is None else source.config("scheduler", "scheduler_config.json")
    backbone = SD3Backbone(
        architecture,
        parts,
        NoiseSchedule.from_config(schedule_config),
        image_taps=config.image_taps,
        text_taps=config.text_taps,
        shared=shared,
    )
    if checkpoint is not None and config.tuning != "full" and not meta:
        check_fingerprint(checkpoint.fingerprint, backbone, checkpoint.origin)
    adapter = None
    if config.tuning == "lora":
        adapter = LoraAdapter(
            backbone,
            lora_config(config.lora_rank, config.lora_alpha, config.num_blocks, config.adapts_last_text),
        )
    if config.tuning == "full":
        backbone.requires_grad_(True)
    if not shared:
        for block in list(backbone.blocks)[max(*config.image_taps, *config.text_taps, 0) :]:
            block.requires_grad_(False)  # after the last tap: kept for the checkpoint's sake, never computed
    text_dtype = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    encoders = (
        None if source is None else encoders_for(source, architecture, config.max_text_tokens, text_dtype)
    )
    return {
        "backbone": backbone,
        "head": _head(config, backbone, "meta" if meta else backbone.weight.device, backbone.weight.dtype),
        "config": config,
        "adapter": adapter,
        "encoders": encoders,
    }


def attach(model: "RewardModel", pipeline: Any) -> tuple[SD3Backbone, LoraAdapter | None]:
    """Backbone over the pipeline's own transformer, with the reward's LoRA as a named, idle adapter."""
    own, config = model.backbone, model.config
    architecture, source = _architecture(pipeline)
    if source is None or source.live is None:
        raise InvalidInputError("attach takes a live diffusers pipeline, whose transformer is to be shared")
    if config.tuning == "full":
        raise InvalidInputError("this reward trained every weight of its backbone: there is nothing to share")
    if model.attached:
        raise InvalidInputError("this reward already shares a pipeline's transformer: detach it first")
    if architecture != own.architecture:
        raise InvalidInputError(
            f"the pipeline's transformer differs from the reward's backbone (reward, pipeline): "
            f"{_differences(own.architecture, architecture)}"
        )
    parts = share_parts(source.live.transformer, config.num_blocks)
    name, adapter = None, None
    if model.adapter is not None:
        taken = {name for layer in parts.modules() for name in getattr(layer, "lora_A", {})}
        name = next(
            name
            for name in ("dina_reward", *(f"dina_reward_{i}" for i in range(2, 100)))
            if name not in taken
        )
        settings = lora_config(
            config.lora_rank, config.lora_alpha, config.num_blocks, config.adapts_last_text
        )
        adapter = LoraAdapter(parts, settings, name, idle=True)
        adapter.load_state_dict(model.adapter.state_dict(), "the reward's own adapter")
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
    backbone = SD3Backbone(
        architecture,
        parts,
        own.schedule,
        image_taps=own.image_taps,
        text_taps=own.text_taps,
        shared=True,
        adapter=name,
    )
    return backbone, adapter


def detach(model: "RewardModel", pipeline: Any) -> tuple[SD3Backbone, LoraAdapter | None]:
    """A private backbone with the same weights; the pipeline's transformer gets its plain layers back."""
    shared, config = model.backbone, model.config
    state = model.adapter.state_dict() if model.adapter is not None else None
    if shared.adapter is not None:
        remove_adapter(shared.parts, shared.adapter)
    weight = shared.weight
    parts = load_parts(
        shared.architecture,
        config.num_blocks,
        from_module(pipeline.transformer, "the attached pipeline's transformer"),
        device=weight.device,
        dtype=weight.dtype,
    )
    backbone = SD3Backbone(
        shared.architecture, parts, shared.schedule, image_taps=shared.image_taps, text_taps=shared.text_taps
    )
    if state is None:
        return backbone, None
    settings = lora_config(config.lora_rank, config.lora_alpha, config.num_blocks, config.adapts_last_text)
    adapter = LoraAdapter(backbone, settings)
    adapter.load_state_dict(state, "the reward's own adapter")
    return backbone, adapter


def live_encoders(model: "RewardModel", pipeline: Any) -> Encoders | None:
    """Encoders of a live pipeline, used where they are."""
    backbone = model.backbone
    return encoders_for(
        PipelineSource(pipeline), backbone.architecture, model.config.max_text_tokens, torch.float32
    )


def fingerprint(backbone: SD3Backbone) -> dict[str, Any] | None:
    """Architecture and a few base weights that no adapter touches: enough to tell backbones apart."""
    if backbone.weight.device.type == "meta":
        return None
    tensors = {
        name.replace(".base_layer.", "."): tensor for name, tensor in backbone.parts.named_parameters()
    }
    probes = {name: _probe(tensors[name]) for name in PROBES if name in tensors}
    return {"architecture": backbone.architecture.to_dict(), "probes": probes}


def check_fingerprint(recorded: Mapping[str, Any] | None, backbone: SD3Backbone, origin: str) -> None:
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
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // NUM_PROBE_VALUES)][:NUM_PROBE_VALUES].float().tolist()


def _architecture(pipeline: Any, variant: str | None = None) -> tuple[SD3Architecture, PipelineSource | None]:
    if isinstance(pipeline, SD3Architecture):
        return pipeline, None
    source = PipelineSource(pipeline, variant=variant)
    return SD3Architecture.from_config(source.config("transformer", "config.json")), source


def _check_architecture(
    architecture: SD3Architecture, config: RewardModelConfig, checkpoint: "Checkpoint | None"
) -> None:
    try:
        check_taps(architecture, config.num_blocks, config.text_taps)
        if checkpoint is None or checkpoint.fingerprint is None:
            return
        recorded = SD3Architecture.from_config(checkpoint.fingerprint["architecture"])
    except (InvalidInputError, KeyError, TypeError, AttributeError) as error:
        if checkpoint is None:
            raise
        raise CheckpointError(f"{checkpoint.origin} does not fit this backbone: {error}") from error
    if recorded != architecture:
        differing = _differences(recorded, architecture)
        raise CheckpointError(
            f"{checkpoint.origin} was made for another backbone (checkpoint, pipeline): {differing}"
        )


def _differences(ours: SD3Architecture, theirs: SD3Architecture) -> dict[str, tuple[Any, Any]]:
    a, b = ours.to_dict(), theirs.to_dict()
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


def _parts(
    architecture: SD3Architecture,
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
        weights = source.transformer_weights()
    return load_parts(architecture, config.num_blocks, weights, device=device, dtype=dtype)


def _head(config: RewardModelConfig, backbone: SD3Backbone, device: Any, dtype: torch.dtype) -> RewardHead:
    settings = config.head
    with torch.device(device if torch.device(device).type == "meta" else "cpu"):
        head = RewardHead(
            token_dim=backbone.token_dim,
            embedding_dim=backbone.embedding_dim,
            num_image_taps=len(config.image_taps),
            num_text_taps=len(config.text_taps),
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
