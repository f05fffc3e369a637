"""What a run tells: lines that survive a kill, and a tracker that is asked for by name."""

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dina_lrm.errors import InvalidInputError
from dina_lrm.runs import pace
from dina_lrm.runs.progress import Reporter, StepMetrics


def reporter(output: Path, wandb: tuple[str, dict[str, Any]] | None = None) -> Reporter:
    console = Console(quiet=True)
    return Reporter(output, 10, tensorboard=False, wandb=wandb, console=console, on_step=None)


def test_a_line_that_was_being_written_is_left_out(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "seconds": 1.0, "loss": 0.5}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "sec')
    told = reporter(tmp_path)
    told.start(2)
    assert [metrics.step for metrics in told.history] == [1, 2]
    told.tell(StepMetrics(step=3, seconds=2.0, loss=0.25))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_wandb_is_told_and_a_resumed_run_is_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(("log", (step, values)))

        def finish(self) -> None:
            calls.append(("finish", None))

    module = types.ModuleType("wandb")
    module.init = lambda **settings: calls.append(("init", settings)) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for _ in range(2):
        told = reporter(tmp_path, ("alignment", {"seed": 0}))
        told.start(0)
        with told:
            told.tell(StepMetrics(step=1, seconds=1.0, loss=0.5, accuracy=0.75))
            told.tell(StepMetrics(step=1, seconds=1.0, validation={"0.4": 0.8}))
    first, second = (settings for name, settings in calls if name == "init")
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("alignment", tmp_path.name, "allow")
    logged = [values for name, values in calls if name == "log"]
    assert logged[0] == (1, {"train/loss": 0.5, "train/accuracy": 0.75})
    assert logged[1] == (1, {"validation/accuracy at 0.4": 0.8})
    assert calls[-1] == ("finish", None)


def test_wandb_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InvalidInputError, match="wandb is not installed"):
        reporter(tmp_path, ("alignment", {}))


def test_off_a_terminal_a_line_comes_every_twentieth_and_every_half_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 steps of 8 pairs, a second each, 100 of them done by an earlier run."""
    clock = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock[0])
    shown = io.StringIO()
    told = Reporter(tmp_path, 200, tensorboard=False, wandb=None, console=Console(file=shown), on_step=None)
    told.start(100)
    assert told.progress.tasks[0].completed == 100  # which the bar does not take for this run's work
    for step in range(101, 112):
        clock[0] += 1
        told.step_done(step, 8)
    assert shown.getvalue() == "  step 110 of 200, 8 pairs/s, 2 min left\n"
    told.tell(StepMetrics(step=111, seconds=1.0, loss=0.5, accuracy=0.75))
    clock[0] += 30
    told.step_done(112, 8)
    assert "step 112 of 200, loss 0.5000, accuracy 75.0%, " in shown.getvalue().splitlines()[1]
