"""What a run needs to go on as if it had never stopped.

`training_state/` beside a checkpoint holds `tensors.safetensors` (raw weights, AdamW's two averages, the
average of the weights, the best weights so far) and `position.json` (step, seconds, best accuracy, config,
fingerprint of the data). No random-number state is among them: the batch, the noise levels, the noise and
dropout of step n are functions of (seed, n). No pickle.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dina_lrm.errors import CheckpointError
from dina_lrm.files import write_whole

__all__ = ["Position", "load_state", "replace_folder", "save_state"]

FOLDER = "training_state"


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a run is, and of which run."""

    step: int
    """Optimizer steps done."""
    seconds: float
    """Spent so far, validations included."""
    best_accuracy: float | None
    best_step: int | None
    config: dict[str, Any]
    """The resolved config."""
    data_fingerprint: str
    """Of the training pairs."""


def save_state(
    folder: Path,
    position: Position,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Any,
    average: EMAModel | None,
    best: Sequence[Tensor] | None,
) -> None:
    """Write the state into `folder`/training_state."""
    folder = folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {f"parameter.{name}": value.detach() for name, value in parameters.items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in entries.items()}
    if average is not None:
        tensors |= {f"average.{n}": value for n, value in zip(parameters, average.shadow_params, strict=True)}
    if best is not None:
        tensors |= {f"best.{name}": value for name, value in zip(parameters, best, strict=True)}
    save_file(
        {name: value.cpu().clone().contiguous() for name, value in tensors.items()},
        folder / "tensors.safetensors",
    )
    write_whole(folder / "position.json", json.dumps(asdict(position), indent=2).encode())


def load_state(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any, average: EMAModel | None
) -> tuple[Position, list[Tensor] | None]:
    """Restore weights, optimizer and average in place; returns the position and the best weights so far."""
    folder = folder / FOLDER
    try:
        tensors = load_file(folder / "tensors.safetensors")
        position = Position(**json.loads((folder / "position.json").read_text()))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no training state to resume from in {folder}: {error}") from error
    except (SafetensorError, json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the training state in {folder} is damaged: {error}") from error

    def named(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    def check(part: str, found: Mapping[str, Tensor]) -> None:
        wrong = sorted(set(parameters) ^ set(found))
        wrong += [n for n in parameters if n in found and parameters[n].shape != found[n].shape]
        if wrong:
            raise CheckpointError(f"{part} of {folder} do not fit this model, in {', '.join(wrong[:8])}")

    weights = named("parameter.")
    check("weights", weights)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])

    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in named("optimizer.").items():
        index, entry = key.split(".", 1)
        entries.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})

    if average is not None:
        shadow = named("average.")
        check("averaged weights", shadow)
        device = average.shadow_params[0].device
        average.shadow_params = [shadow[name].to(device) for name in parameters]
        average.optimization_step = position.step
    best = named("best.")
    if best:
        check("best weights", best)
    return position, [best[name] for name in parameters] if best else None


# --- a folder that appears whole or not at all -------------------------------------------------------------


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a new folder aside, flush it to disk, then put it in the place of `target`.

    If the machine stops between the two renames the old folder is left as `<target>.old`; `recover_folder`
    puts it back.
    """
    partial, old = target.with_name(target.name + ".partial"), target.with_name(target.name + ".old")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    fill(partial)
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    recover_folder(target)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Undo a replacement that was cut off: the old folder back in place, or out of the way."""
    old = target.with_name(target.name + ".old")
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)
