"""Reading the base weights of a backbone, and only the tensors that are kept.

A truncated backbone uses the first L of many blocks; the rest is never brought into memory: not as a module
(built on the meta device) and not as tensors (read one by one, by name, from safetensors).
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dina_lrm.errors import CheckpointError, MissingComponentError

MAX_LISTED = 8
"""Names shown in an error message before it says how many more there are."""


@dataclass(frozen=True)
class TensorSource:
    """Named tensors that can be listed without being read."""

    origin: str
    """Where they come from, for messages."""
    names: frozenset[str]
    read: Callable[[str], Tensor]


def from_folder(
    folder: Path, variant: str | None = None, stem: str = "diffusion_pytorch_model"
) -> TensorSource:
    """Weights as diffusers saves them: one safetensors file, or shards with an index; plain or a variant."""
    marked = stem if variant is None else f"{stem}.{variant}"
    single = folder / f"{marked}.safetensors"
    indices = [folder / f"{stem}.safetensors.index{'' if variant is None else '.' + variant}.json"]
    indices.append(folder / f"{marked}.safetensors.index.json")
    index = next((path for path in indices if path.is_file()), None)
    if single.is_file():
        file_of = dict.fromkeys(list_safetensors(single), single)
    elif index is not None:
        file_of = {name: folder / file for name, file in _read_index(index).items()}
        for shard in sorted(set(file_of.values())):
            if not shard.is_file():
                raise CheckpointError(f"{index.name} names a shard that is not there: {shard}")
    else:
        found = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
        hint = f" (there are {found}; weights of a variant need variant=...)" if found else ""
        raise MissingComponentError(f"no safetensors weights {single.name} in {folder}{hint}")
    return TensorSource(str(folder), frozenset(file_of), lambda name: read_safetensor(file_of[name], name))


def from_module(module: nn.Module, origin: str) -> TensorSource:
    """Base weights of a live module: PEFT adapters are left out, wrapped layers keep their names."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        if ".lora_" not in name:
            tensors[name.replace(".base_layer.", ".")] = tensor
    if any(getattr(layer, "merged_adapters", None) for layer in module.modules()):
        raise CheckpointError(
            f"{origin} has adapters fused into its weights: unfuse them, so that the base is the base"
        )
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        raise CheckpointError(f"{origin} is offloaded to the meta device: load it fully, or give its folder")
    return TensorSource(origin, frozenset(tensors), lambda name: tensors[name].detach().clone())


def fill(
    module: nn.Module,
    source: TensorSource,
    *,
    ignore: Callable[[str], bool] = lambda name: False,
    dtype: Callable[[str], torch.dtype | None] = lambda name: None,
    device: torch.device | str | None = None,
) -> None:
    """Give every parameter and buffer of `module` (on meta) its tensor, read and cast one at a time.

    Args:
        ignore: names in the source that this module leaves out on purpose. Any other surplus is an error.
        dtype: of a floating tensor, by its name; None keeps the stored one.
    """
    wanted = module.state_dict()
    check_names(wanted, {name for name in source.names if name in wanted or not ignore(name)}, source.origin)
    state: dict[str, Tensor] = {}
    for name, placeholder in wanted.items():
        tensor = source.read(name)
        if tensor.shape != placeholder.shape:
            raise CheckpointError(
                f"{source.origin}: {name} has shape {tuple(tensor.shape)}, "
                f"the backbone needs {tuple(placeholder.shape)}"
            )
        state[name] = tensor.to(device=device, dtype=dtype(name) if tensor.is_floating_point() else None)
    module.load_state_dict(state, assign=True)


def check_names(wanted: Iterable[str], found: Iterable[str], origin: str) -> None:
    """CheckpointError listing what is missing and what does not belong."""
    wanted, found = set(wanted), set(found)
    problems = [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (("missing", wanted - found), ("unexpected", found - wanted))
        if names
    ]
    if problems:
        raise CheckpointError(f"{origin} does not fit this model; tensors {'; '.join(problems)}")


def check_state(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], origin: str) -> None:
    """Names, shapes and finite values of a state dict, before anything is loaded from it."""
    check_names(wanted, found, origin)
    shapes = {
        name: f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if found[name].shape != tensor.shape
    }
    if shapes:
        raise CheckpointError(
            f"{origin} was made for another model; {len(shapes)} shapes differ: {listed(shapes.values())}"
        )
    broken = [name for name, tensor in found.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"{origin} holds NaN or infinite values in {listed(broken)}")


def listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def list_safetensors(file: Path) -> list[str]:
    """Names in a safetensors file; a damaged file is a CheckpointError."""
    with _open(file) as tensors:
        return list(tensors.keys())


def read_safetensor(file: Path, name: str) -> Tensor:
    with _open(file) as tensors:
        return tensors.get_tensor(name)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """A whole file; missing or damaged is a CheckpointError that names it."""
    with _open(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}


def read_metadata(file: Path) -> dict[str, str]:
    with _open(file) as tensors:
        return tensors.metadata() or {}


def _open(file: Path):
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise CheckpointError(f"missing file {file}")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error})") from error


def _read_index(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a shard index ({error})") from error
