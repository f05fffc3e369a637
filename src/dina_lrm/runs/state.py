"""What a run needs to go on as if it had never stopped.

`training_state/` beside a checkpoint holds `tensors.safetensors` (raw weights, AdamW's two averages, the
average of the weights, the best weights so far) and `position.json` (step, seconds, best accuracy, config,
fingerprint of the data). No random-number state is among them: the batch, the noise levels, the noise and
dropout of step n are functions of (seed, n). No pickle.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dina_lrm.core.sharding import full_tensor, is_sharded, local, shard
from dina_lrm.errors import CheckpointError, InvalidInputError
from dina_lrm.files import atomic_write

__all__ = ["Position", "check_same_run", "load_state", "save_state"]

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
    """Fingerprint of the training pairs."""


def save_state(
    folder: Path,
    position: Position,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Any,
    average: EMAModel | None,
    best: Sequence[Tensor] | None,
) -> None:
    """Write the state into `folder`/training_state.

    Where FSDP2 has sharded the parameters, `average` and `best` hold shards (`core.sharding.local`), every
    process must call this, and the main one writes.
    """
    tensors = {f"parameter.{name}": full_tensor(value) for name, value in parameters.items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": full_tensor(value) for key, value in entries.items()}
    for prefix, pieces in (("average", average and average.shadow_params), ("best", best)):
        if pieces is not None:
            tensors |= {
                f"{prefix}.{name}": full_tensor(piece, like=parameters[name])
                for name, piece in zip(parameters, pieces, strict=True)
            }
    if any(map(is_sharded, parameters.values())) and torch.distributed.get_rank() != 0:
        return
    folder = folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.clone().contiguous() for name, value in tensors.items()}, folder / "tensors.safetensors"
    )
    atomic_write(folder / "position.json", json.dumps(asdict(position), indent=2).encode())


def load_state(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any, average: EMAModel | None
) -> tuple[Position, list[Tensor] | None]:
    """Restore weights, optimizer and average in place; returns the position and the best weights so far.

    Where FSDP2 has sharded the parameters, each process reads everything and keeps its shards; the number of
    processes that saved does not matter.
    """
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
            local(parameter).copy_(local(shard(weights[name], parameter)))

    optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in named("optimizer.").items():
        index, entry = key.split(".", 1)
        cut_value = value if entry == "step" else shard(value, optimized[int(index)])
        entries.setdefault(int(index), {})[entry] = cut_value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})

    if average is not None:
        shadow = named("average.")
        check("averaged weights", shadow)
        device = average.shadow_params[0].device
        average.shadow_params = [
            local(shard(shadow[name], parameter)).to(device) for name, parameter in parameters.items()
        ]
        average.optimization_step = max((int(entry["step"]) for entry in entries.values()), default=0)
    best = named("best.")
    if best:
        check("best weights", best)
    pieces = [local(shard(best[name], parameter)) for name, parameter in parameters.items()] if best else None
    return position, pieces


def check_same_run(
    folder: Path,
    position: Position,
    config: Mapping[str, Any],
    data_fingerprint: str,
    *,
    may_change: frozenset[str],
    data: str,
) -> None:
    """Refuse to go on with another run's checkpoint.

    Args:
        may_change: settings that decide no numbers; the data are compared by their fingerprint.
        data: what the fingerprint is of, for the message.

    Raises:
        InvalidInputError: other settings, or other data.
    """
    before = position.config
    differing = [
        f"{key} was {before.get(key)!r} and is {config.get(key)!r}"
        for key in sorted(set(before) | set(config))
        if key not in may_change and before.get(key) != config.get(key)
    ]
    if differing:
        raise InvalidInputError(f"{folder} belongs to a run with other settings: {'; '.join(differing)}")
    if position.data_fingerprint != data_fingerprint:
        raise InvalidInputError(f"{folder} was trained on other {data} than those given now")
