"""Weights from a hub id or a local folder, and errors that say what is missing from them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dina_lrm.errors import CheckpointError, DinaError

__all__ = ["check_names", "fill", "load_part", "loading", "own_or", "read_state", "weights_file"]

_SHOWN = 5
_CONTAINERS = ("state_dict", "model")
"""Keys under which training scripts put the tensors."""


@contextmanager
def loading(what: str, location: str) -> Iterator[None]:
    """Whatever goes wrong inside is a `CheckpointError` that names what was loaded and from where."""
    try:
        yield
    except DinaError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError, UnpicklingError, hub errors, ...
        raise CheckpointError(f"cannot load {what} from {location}: {error}") from error


def load_part(part: Any, location: str | Path, **settings: Any) -> Any:
    """`part.from_pretrained`, refusing a model of which any weight would stay random.

    Raises:
        CheckpointError: nothing there, damaged, or weights missing.
    """
    name = part.__name__
    _check_folder(name, location)
    report = {"output_loading_info": True} if _is_module(part) else {}
    with loading(name, str(location)):
        loaded = part.from_pretrained(location, **report, **settings)
    if not report:
        return loaded
    model, info = loaded
    if info["missing_keys"]:
        raise CheckpointError(f"{location} lacks weights of {name}: {_some(info['missing_keys'])}")
    return model.eval()


def own_or(location: str | Path, file: str, otherwise: str) -> str:
    """`location` if it is a folder that holds `file`, else the hub id the publishers use."""
    return str(location) if (Path(location) / file).is_file() else otherwise


def weights_file(location: str | Path, file: str) -> Path:
    """The path of `file`: `location` itself, inside the folder `location`, or fetched from the hub id.

    Raises:
        CheckpointError: there is no such file.
    """
    path = Path(location)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / file).is_file():
            raise CheckpointError(f"{path} has no {file}")
        return path / file
    _check_folder(file, location)
    from huggingface_hub import hf_hub_download

    with loading(file, str(location)):
        return Path(hf_hub_download(str(location), file))


def read_state(path: Path) -> dict[str, Tensor]:
    """Named tensors of a .safetensors file, or of a torch file without a single pickled object.

    Raises:
        CheckpointError: damaged, or holds anything but tensors.
    """
    with loading("weights", str(path)):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    for key in _CONTAINERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} does not hold a state dict")
    return dict(state)


def check_names(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights of another architecture.

    Raises:
        CheckpointError: missing, unexpected or differently shaped tensors, which it lists.
    """
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "of another shape": shapes,
    }
    found = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names)
    if found:
        raise CheckpointError(f"weights in {source} do not fit: {found}")


def fill(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load every tensor of `state` into `module`, see `check_names`."""
    check_names(module.state_dict(), state, source)
    module.load_state_dict(state)


def _is_module(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, nn.Module)


def _check_folder(what: str, location: str | Path) -> None:
    """A path that is no hub id must exist: asking the hub for it would only give a confusing answer."""
    text = str(location)
    is_hub_id = text.count("/") <= 1 and not text.startswith((".", "/", "~"))
    if not is_hub_id and not Path(location).exists():
        raise CheckpointError(f"cannot load {what}: there is nothing at {location}")


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")
