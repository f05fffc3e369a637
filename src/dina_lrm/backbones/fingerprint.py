"""A few values of every base weight: enough to tell trainings of one architecture apart.

They go into a checkpoint by the weight's name, so that a reward is never read with the features of another
backbone: a fine-tuned one, or one that a LoRA has been fused into, which changes attention weights alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dina_lrm.backbones.architecture import Architecture
from dina_lrm.errors import CheckpointError
from dina_lrm.pipelines.weights import listed

NUM_VALUES = 4
"""Values per weight. Checkpoints may record more or fewer, of some weights or of all."""


def fingerprint(architecture: Architecture, parts: nn.Module) -> dict[str, Any] | None:
    """What a checkpoint records of its backbone; None for a backbone without weights (meta)."""
    if any(tensor.device.type == "meta" for tensor in parts.parameters()):
        return None
    return {"architecture": architecture.to_dict(), "probes": sampled_values(parts)}


def check_fingerprint(recorded: Mapping[str, Any] | None, parts: nn.Module, origin: str) -> None:
    """CheckpointError if a checkpoint was trained on other base weights than these.

    Values are compared up to the rounding of bfloat16, so the same weights in another precision pass.
    """
    if recorded is None or any(tensor.device.type == "meta" for tensor in parts.parameters()):
        return
    try:
        names = differing(recorded["probes"], parts)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{origin}: the recorded backbone fingerprint is damaged ({error!r})"
        ) from error
    if names:
        raise CheckpointError(
            f"{origin} was trained on another backbone: same shapes, different base weights "
            f"({listed(names)}); these are of another training, or a LoRA was fused into them"
        )


def is_base_of(recorded: Mapping[str, Any] | None, architecture: Architecture, network: nn.Module) -> bool:
    """Are these the base weights that a checkpoint was trained on, as far as it says?"""
    if recorded is None:
        return True
    try:
        check_fingerprint(recorded, network, "")
    except CheckpointError:
        return False
    return recorded.get("architecture") == architecture.to_dict()


@torch.no_grad()
def sampled_values(parts: nn.Module) -> dict[str, list[float]]:
    """`NUM_VALUES` values of every weight, in float32, by its name without what PEFT puts around it."""
    views = {name: _values(tensor, NUM_VALUES) for name, tensor in _weights(parts) if is_plain(tensor)}
    if not views:
        return {}
    joined = torch.cat([view.float() for view in views.values()]).cpu()  # one transfer for all
    numbers = (float(str(value)) for value in joined.numpy())  # the shortest decimals that read back the same
    return {name: [next(numbers) for _ in view] for name, view in views.items()}


@torch.no_grad()
def differing(
    recorded: Mapping[str, list[float]], parts: nn.Module, *, rounding: torch.dtype | None = torch.bfloat16
) -> list[str]:
    """Weights whose values are not the recorded ones, up to rounding; quantised ones cannot be compared.

    Args:
        rounding: the coarsest dtype that the weights may have been rounded to since; None: only their own.
    """
    weights = dict(_weights(parts))
    names = [name for name in recorded if is_plain(weights[name])]
    if not names:
        return []
    views = [_values(weights[name], len(recorded[name])) for name in names]
    found = torch.cat([view.float() for view in views]).cpu().split([len(view) for view in views])
    changed = []
    for name, now in zip(names, found, strict=True):
        then = torch.tensor(recorded[name], dtype=torch.float32)
        # A value w + d that was rounded twice: of the same size as w, or small beside its neighbours.
        unit = torch.finfo(weights[name].dtype if rounding is None else rounding).eps
        allowed = unit * (then.abs() + 0.1 * then.abs().max())
        if then.shape != now.shape or not bool(((then - now).abs() <= allowed).all()):
            changed.append(name)
    return changed


def is_plain(tensor: Tensor) -> bool:
    """Are these floating numbers as they are, and not codes of a quantisation?"""
    kind = type(tensor) in (Tensor, nn.Parameter)
    return kind and tensor.is_floating_point() and tensor.element_size() > 1


def _weights(parts: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Base weights by their plain names."""
    for name, tensor in parts.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), tensor


def _values(tensor: Tensor, count: int) -> Tensor:
    """Every n-th value in the order of rows, whatever the layout in memory."""
    step = max(1, tensor.numel() // max(1, count))
    if tensor.is_contiguous():
        return tensor.detach().view(-1)[::step][:count]
    places = torch.arange(0, tensor.numel(), step, device=tensor.device)[:count]
    return tensor.detach()[torch.unravel_index(places, tensor.shape)]
