"""`dina-lrm train RECIPE --output RUN`: a recipe plus typed overrides (`--optimizer.learning-rate 3e-4`)."""

import inspect
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dina_lrm.cli.console import (
    UsageError,
    log,
    log_validation,
    print_json,
    print_table,
    resumable,
    stderr,
    stdout,
)
from dina_lrm.cli.options import JsonFlag

if TYPE_CHECKING:
    from dina_lrm.training.config import TrainConfig
    from dina_lrm.training.result import TrainResult


def main(arguments: Sequence[str]) -> int:
    from dina_lrm.recipes import training as recipes
    from dina_lrm.training.config import TrainConfig

    if not arguments or arguments[0] in ("-h", "--help"):
        print_recipes(to_stderr=not arguments)
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name.startswith("-"):
        raise UsageError(f"the recipe comes first, as in: dina-lrm train shapes {name} ...")
    base = recipes.recipe(name)

    @dataclass(frozen=True, kw_only=True)
    class Train:
        config: Annotated[TrainConfig, tyro.conf.arg(name="")]
        as_json: JsonFlag = False
        """Print one JSON object at the end instead of a table."""

    options = tyro.cli(
        Train,
        prog=f"dina-lrm train {name}",
        description=inspect.getdoc(getattr(recipes, name.replace("-", "_"))),
        args=rest,
        default=Train(config=base),
    )
    if options.config.output is None:
        return run(options.config, as_json=options.as_json)
    with resumable(f"go on with: {resuming('train', arguments)}"):
        return run(options.config, as_json=options.as_json)


def resuming(command: str, arguments: Sequence[str]) -> str:
    """The command that goes on with an interrupted run, as it was typed.

    >>> resuming("train", ["shapes", "--output", "my run"])
    "dina-lrm train shapes --output 'my run' --resume"
    """
    again = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
    return f"dina-lrm {command} {shlex.join(again)}"


def run(config: "TrainConfig", *, as_json: bool) -> int:
    refuse_to_overwrite(config)
    from dina_lrm.build.training import run_training
    from dina_lrm.runs.distribution import is_first_process

    _, result = run_training(config, on_step=log_validation, log=log, console=stderr())
    if not is_first_process():
        return 0
    if as_json:
        print_json(summarize(config, result))
        return 0
    rows = [[label, f"{100 * accuracy:.1f}%"] for label, accuracy in result.validation.items()]
    if rows:
        print_table(["noise levels", "accuracy"], rows, title="validation pairs")
    log(f"{result.steps} steps in {result.seconds:.0f} s, stopped by {result.stopped_by.replace('_', ' ')}")
    if result.noise_levels is not None:
        log("scores by default at sigma = " + ", ".join(f"{level:g}" for level in result.noise_levels))
    if config.output is not None:
        log(f"reward: {config.output}")
        log(f"next: dina-lrm evaluate --model {shlex.quote(config.output)} {unseen_pairs(config.data.train)}")
    return 0


def unseen_pairs(train: str | None) -> str:
    """Flags of `dina-lrm evaluate` for pairs of the same kind that were not trained on."""
    if train is None or train == "shapes":
        return "--benchmark shapes"
    folder = Path(train)
    beside = folder.parent / "test"
    if folder.name == "train" and (beside / "manifest.json").is_file():
        return f"--pairs {shlex.quote(str(beside))}"
    try:
        source = json.loads((folder / "prepare.json").read_text())["source"]
    except (OSError, ValueError, KeyError):
        source = "folder" if folder.is_dir() else "jsonl"
    return f"--benchmark {source} --root {'FOLDER' if source != 'jsonl' else 'TEST_ROWS'}"


def refuse_to_overwrite(config: "TrainConfig") -> None:
    """A finished reward is never trained over by a repeated command."""
    if config.output is None or config.resume:
        return
    if (Path(config.output) / "config.json").exists():
        raise UsageError(
            f"{config.output!r} holds a trained reward; choose another --output, or go on with --resume"
        )
    if (Path(config.output) / "last").exists():
        raise UsageError(
            f"{config.output!r} holds an unfinished run; go on with --resume, or choose another --output"
        )


def summarize(config: "TrainConfig", result: "TrainResult") -> dict[str, object]:
    return {
        "output": config.output,
        "steps": result.steps,
        "seconds": result.seconds,
        "stopped_by": result.stopped_by,
        "best_step": result.best_step,
        "best_accuracy": result.best_accuracy,
        "noise_levels": None if result.noise_levels is None else list(result.noise_levels),
        "calibration_scale": result.calibration_scale,
        "uncalibrated": result.uncalibrated,
        "validation": result.validation,
    }


def print_recipes(*, to_stderr: bool) -> None:
    """All recipes with the first sentence of what they are."""
    from rich.markup import escape
    from rich.table import Table

    from dina_lrm.recipes import training as recipes

    console = stderr() if to_stderr else stdout()
    console.print("usage: dina-lrm train RECIPE [--output RUN] [overrides]\n", markup=False)
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name in recipes.recipe_names():
        text = inspect.getdoc(getattr(recipes, name.replace("-", "_"))) or ""
        summary = " ".join(text.split("\n\n")[0].split())
        table.add_row(f"[bold]{name}[/]", escape(summary))
    console.print(table)
    console.print("\ndina-lrm train RECIPE --help lists every field, its meaning and the recipe's value.")
