"""What a run trains and where it is, and how it goes on as if it had never stopped.

`training_state/` beside a checkpoint holds `tensors.safetensors` (raw weights, AdamW's two averages, the
average of the weights, the best weights so far) and `position.json` (step, seconds, best accuracy, config,
fingerprint of the data). No random-number state is among them: the batch, the noise levels, the noise and
dropout of step n are functions of (seed, n). No pickle.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dina_lrm.core.sharding import full_tensor, is_sharded, local, shard
from dina_lrm.errors import CheckpointError, InvalidInputError
from dina_lrm.files import atomic_write, json_types
from dina_lrm.runs.config import OptimizerConfig
from dina_lrm.runs.optimizer import averaged, learning_rate_factor, set_learning_rate, weight_average

__all__ = ["Position", "RunConfig", "RunState", "check_same_run", "load_state", "save_state"]

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
    """Fingerprint of what it is trained on."""


@runtime_checkable
class RunConfig(Protocol):
    """What the settings of every run have."""

    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def output(self) -> str | None: ...


class RunState:
    """The trained parameters, AdamW and the average of the weights; how far the run is, and its best weights.

    Args:
        parameters: those that are trained, by name. Where FSDP2 has sharded them, averages and best weights
            are of this process's shards.
        fingerprint: of what the run is trained on, the `data`, in words.
        unit: what one step is called in messages.
        may_change: settings that a run may change when it goes on, because they decide no numbers.
    """

    def __init__(
        self,
        config: RunConfig,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Any,
        *,
        fingerprint: str,
        data: str,
        unit: str,
        may_change: frozenset[str],
    ) -> None:
        self.config, self.parameters, self.optimizer = config, dict(parameters), optimizer
        self.fingerprint, self.data, self.unit, self.may_change = fingerprint, data, unit, may_change
        decay = config.optimizer.ema_decay
        self.average = None if decay is None else weight_average(self.shards(), decay)
        self.output = None if config.output is None else Path(config.output)
        self.step = 0
        """Optimizer steps, or updates, done."""
        self.best_step: int | None = None
        self.best_accuracy: float | None = None
        self.best_weights: list[Tensor] | None = None
        self.seconds_before = 0.0
        """Spent by earlier processes of this run."""
        self.start()

    def start(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Spent so far, by earlier processes of this run too."""
        return self.seconds_before + time.perf_counter() - self._started

    def shards(self) -> list[Any]:
        """What this process holds of each parameter: all of it, unless FSDP2 has sharded them."""
        return [local(parameter) for parameter in self.parameters.values()]

    def set_learning_rate(self, elapsed_fraction: float = 0.0) -> float:
        """Set the rate of the step to come; returns that of the last group of parameters.

        Args:
            elapsed_fraction: of a time budget.
        """
        settings = self.config.optimizer
        factor = learning_rate_factor(
            self.step,
            num_steps=self.config.num_steps,
            schedule=settings.schedule,
            warmup_steps=settings.warmup_steps,
            final_fraction=settings.final_fraction,
            elapsed_fraction=elapsed_fraction,
        )
        return set_learning_rate(self.optimizer, factor)

    def optimize(self) -> None:
        """AdamW's step on the gradients that are there, and the average's."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.step(self.shards())

    def averaged(self) -> AbstractContextManager[None]:
        """The averaged weights inside, the raw ones again after, to the last bit."""
        return averaged(self.average, self.shards())

    def kept(self) -> str:
        """What an interrupted run leaves."""
        done = f"{self.unit} {self.step} was finished"
        if self.output is None:
            return f"{done}, and nothing is kept, since the run has no output"
        return f"{done}, and {self.output / 'last'} holds it"

    def save(self, folder: Path) -> None:
        """Write `folder`/training_state; see `save_state` for runs of several processes."""
        position = Position(
            step=self.step,
            seconds=self.seconds,
            best_accuracy=self.best_accuracy,
            best_step=self.best_step,
            config=json_types(self.config),
            data_fingerprint=self.fingerprint,
        )
        save_state(folder, position, self.parameters, self.optimizer, self.average, self.best_weights)

    def resume(self) -> bool:
        """Go on from OUTPUT/last; False where there is none, since the run was stopped before its first
        checkpoint or never begun.

        Raises:
            InvalidInputError: no output, or another run's.
            CheckpointError: the state is damaged, or of another model.
        """
        if self.output is None:
            raise InvalidInputError("resume needs output: the folder of the run to go on with")
        last = self.output / "last"
        if not last.exists():
            return False
        position, best = load_state(last, self.parameters, self.optimizer, self.average)
        check_same_run(
            last,
            position,
            json_types(self.config),
            self.fingerprint,
            may_change=self.may_change,
            data=self.data,
        )
        self.step, self.seconds_before = position.step, position.seconds
        self.best_accuracy, self.best_step = position.best_accuracy, position.best_step
        self.best_weights = best
        return True


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
