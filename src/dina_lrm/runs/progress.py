"""What a run tells while it goes on: metrics.jsonl, TensorBoard, a progress bar, the caller."""

import hashlib
import importlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from dina_lrm.errors import InvalidInputError
from dina_lrm.files import atomic_write
from dina_lrm.runs.pace import Pace

__all__ = ["Reporter", "StepMetrics", "Window"]

CURVES = ("loss", "accuracy", "learning_rate", "gradient_norm", "pairs_per_second", "data_wait_fraction")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One line of metrics.jsonl: means since the last line, or a validation."""

    step: int
    seconds: float
    """Since the start of the run, stops not counted."""
    loss: float | None = None
    accuracy: float | None = None
    """Accuracy on training pairs, at the noise levels drawn."""
    learning_rate: float | None = None
    gradient_norm: float | None = None
    """Before clipping, of the last step."""
    pairs_per_second: float | None = None
    data_wait_fraction: float | None = None
    """Share of the time of training, spent waiting for the next batch to be read."""
    epoch: float | None = None
    validation: dict[str, float] | None = None
    """Accuracy of each candidate, "0.4" or "0.2+0.5+0.7", with averaged weights; set on validations only."""


class Window:
    """Loss and accuracy since the last line of metrics, without waiting for the device at every step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._open()

    def _open(self) -> None:
        self.sums = torch.zeros(5, device=self.device)
        self.started = time.perf_counter()

    def add(self, loss: Tensor, margin: Tensor, target: Tensor) -> None:
        """One part of a batch."""
        counted = target != 0.5
        right = ((margin > 0) == (target > 0.5)) & (margin != 0) & counted
        one = loss.new_tensor(1.0)
        self.sums += torch.stack([loss, one, right.sum(), counted.sum(), one * len(margin)])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not training time."""
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    def close(self, accelerator: Accelerator) -> tuple[float, float, float, float]:
        """Mean loss, accuracy, pairs, seconds; starts the next window."""
        sums: Any = accelerator.reduce(self.sums, reduction="sum")
        loss, parts, right, counted, pairs = sums.tolist()
        seconds = max(time.perf_counter() - self.started, 1e-9)
        self._open()
        return loss / parts, right / max(counted, 1.0), pairs, seconds


class Reporter:
    """Keeps the history of a run and passes every line of it on.

    Args:
        output: folder of metrics.jsonl and tensorboard/; None writes nothing.
        total: optimizer steps, for the bar, which is drawn on terminals only.
        tensorboard: write TensorBoard files, when it is installed.
        wandb: project on Weights & Biases, and the config to show there; None: not told.
        on_step: called with every line.
    """

    def __init__(
        self,
        output: Path | None,
        total: int,
        *,
        tensorboard: bool,
        wandb: tuple[str, dict[str, Any]] | None,
        console: Console,
        on_step: Callable[[StepMetrics], None] | None,
    ) -> None:
        self.history: list[StepMetrics] = []
        self.log_file = None if output is None else output / "metrics.jsonl"
        self.on_step = on_step
        self.board = _board(output) if tensorboard and output is not None else None
        self.wandb = None if wandb is None or output is None else _wandb_run(output, *wandb)
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.total = total
        self.training = self.validation = ""

    def start(self, step: int) -> None:
        """Begin the log at `step`: lines of an earlier attempt that go beyond it are taken back."""
        # Made here, so that steps that were found done count neither into the rate nor into the time left.
        self.task = self.progress.add_task("", total=self.total, completed=step, status="")
        self.pace = Pace(self.total, found=step)
        if self.log_file is None or not self.log_file.exists():
            return
        lines = self.log_file.read_text(encoding="utf-8").splitlines() if step > 0 else []
        self.history = [metrics for line in lines if (metrics := _read(line)) and metrics.step <= step]
        atomic_write(self.log_file, "".join(_line(metrics) for metrics in self.history).encode())

    def __enter__(self) -> None:
        self.progress.start()

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()

    def step_done(self, step: int, batch_size: int) -> None:
        """After every step: where no bar is drawn, a line now and then."""
        if self.progress.console.is_terminal or not self.pace.due(step):
            return
        rate = f"{batch_size * self.pace.rate(step):.3g} pairs/s"
        parts = [f"step {step:,} of {self.total:,}", self.training, rate, self.pace.left(step)]
        line = escape(", ".join(filter(None, parts)))
        self.progress.console.print(f"  {line}", soft_wrap=True, highlight=False)

    def tell(self, metrics: StepMetrics) -> None:
        """One line, everywhere."""
        self.history.append(metrics)
        if self.log_file is not None:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(_line(metrics))
        values = {
            f"train/{key}": value
            for key in CURVES
            if (value := getattr(metrics, key)) is not None and metrics.loss is not None
        }
        values |= {
            f"validation/accuracy at {key}": value for key, value in (metrics.validation or {}).items()
        }
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(key, value, metrics.step)
        if self.wandb is not None:
            self.wandb.log(values, step=metrics.step)
        if metrics.loss is not None and metrics.accuracy is not None:
            self.training = f"loss {metrics.loss:.4f}, accuracy {metrics.accuracy:.1%}"
        if metrics.validation:
            label, accuracy = max(metrics.validation.items(), key=lambda item: item[1])
            self.validation = f"  validation {accuracy:.1%} at {label}"
        self.progress.update(self.task, completed=metrics.step, status=self.training + self.validation)
        if self.on_step is not None:
            self.on_step(metrics)


def _line(metrics: StepMetrics) -> str:
    return json.dumps({key: value for key, value in asdict(metrics).items() if value is not None}) + "\n"


def _read(line: str) -> StepMetrics | None:
    """None for a line that was being written when the run was killed."""
    try:
        return StepMetrics(**json.loads(line))
    except (json.JSONDecodeError, TypeError):
        return None


def _wandb_run(output: Path, project: str, config: dict[str, Any]) -> Any:
    """The run of this folder: one that is resumed goes on in the same curves."""
    try:
        wandb: Any = importlib.import_module("wandb")  # an extra
    except ImportError as error:
        raise InvalidInputError("wandb is not installed: pip install 'dina-lrm[track]'") from error
    name = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:12]
    return wandb.init(
        project=project, name=output.name, id=name, resume="allow", dir=str(output), config=config
    )


def _board(output: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # an extra
    except ImportError:
        return None
    return SummaryWriter(str(output / "tensorboard"))
