"""`dina-lrm align ALGORITHM RECIPE`: a reward and a generator to an aligned LoRA, watched by a gold score."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import tyro

from dina_lrm.cli.console import UsageError, log, print_json, print_table, resumable, stderr, stdout
from dina_lrm.cli.options import JsonFlag
from dina_lrm.cli.train import resuming

if TYPE_CHECKING:
    from dina_lrm.alignment.config import AlignConfig
    from dina_lrm.alignment.record import RunResult


def main(arguments: Sequence[str]) -> int:
    from dina_lrm.recipes import alignment as recipes

    if not arguments or arguments[0] in ("-h", "--help"):
        print_recipes(to_stderr=not arguments)
        return 0 if arguments else 2
    algorithms, generators = get_args(recipes.AlgorithmName), get_args(recipes.GeneratorName)
    if arguments[0] not in algorithms:
        raise UsageError(f"unknown algorithm {arguments[0]!r}; there are {', '.join(algorithms)}")
    if len(arguments) > 1 and arguments[1] in ("-h", "--help"):
        log(f"recipes: {', '.join(generators)}; the values below are those of {generators[0]}")
        arguments = [arguments[0], generators[0], "--help"]
    if len(arguments) < 2 or arguments[1] not in generators:
        given = arguments[1] if len(arguments) > 1 else ""
        raise UsageError(
            f"the recipe comes after the algorithm, as in: dina-lrm align {arguments[0]} shapes; "
            f"got {given!r}, there are {', '.join(generators)}"
        )
    algorithm, generator, rest = arguments[0], arguments[1], arguments[2:]
    base = recipes.alignment_recipe(algorithm, generator)
    kind: Any = type(base)

    @dataclass(frozen=True, kw_only=True)
    class Align:
        config: Annotated[kind, tyro.conf.arg(name="")]  # pyright: ignore[reportInvalidTypeForm]
        rewards: Annotated[tuple[str, ...], tyro.conf.arg(name="reward", metavar="RUN")] = ()
        """Short for --reward.models."""
        as_json: JsonFlag = False
        """Print one JSON object at the end instead of a table."""

    options = tyro.cli(
        Align,
        prog=f"dina-lrm align {algorithm} {generator}",
        description=inspect.getdoc(kind),
        args=rest,
        default=Align(config=base),
    )
    config = options.config
    if options.rewards:
        config = replace(config, reward=replace(config.reward, models=options.rewards))
    if config.output is None:
        config = replace(config, output=f"runs/{algorithm}-{generator}")
    with resumable(f"go on with: {resuming('align', arguments)}"):
        return run(config, as_json=options.as_json)


def run(config: "AlignConfig", *, as_json: bool) -> int:
    assert config.output is not None
    output = Path(config.output)
    if not config.resume and any((output / name).exists() for name in ("last", "align_config.json")):
        raise UsageError(f"{config.output!r} holds a run; go on with --resume, or choose another --output")
    from dina_lrm.alignment.gold import missing_since
    from dina_lrm.build.alignment import run_alignment
    from dina_lrm.runs.distribution import is_first_process

    if is_first_process():
        log(f"watch it: {output / 'report.html'}")
    _, result = run_alignment(config, log=log)
    if not is_first_process():
        return 0
    if as_json:
        print_json(summary(config, result))
        return 0
    found = gains(result)
    rows = [[name, f"{mean:+.4g}", f"{low:+.4g} to {high:+.4g}"] for name, (mean, low, high) in found.items()]
    print_table(["score", "gain", "95 % interval"], rows, title=f"{result.steps} updates, held-out prompts")
    for name, (since, reason) in missing_since(result.evaluations).items():
        log(f"the gold score {name} is missing since update {since}; its gain is that of before: {reason}")
    log(f"{result.seconds:.0f} s, stopped by {result.stopped_by}")
    log(f"LoRA: {output}  (pipeline.load_lora_weights({config.output!r}))")
    if (output / "best").exists():
        log(f"LoRA of the best gold score: {output / 'best'}")
    return 0


def gains(result: "RunResult") -> dict[str, tuple[float, float, float]]:
    """Gain of the last evaluation that has a score over the first one, by score: mean and 95 % interval."""
    from dina_lrm.alignment.gold import curves, paired_gain

    return {
        name: paired_gain(curve[-1][1], curve[0][1]) for name, curve in curves(result.evaluations).items()
    }


def summary(config: "AlignConfig", result: "RunResult") -> dict[str, Any]:
    from dina_lrm.alignment.gold import missing_since

    return {
        "output": config.output,
        "steps": result.steps,
        "seconds": result.seconds,
        "stopped_by": result.stopped_by,
        "gains": {
            name: {"mean": m, "low": low, "high": high} for name, (m, low, high) in gains(result).items()
        },
        "missing": {
            name: {"since": since, "reason": reason}
            for name, (since, reason) in missing_since(result.evaluations).items()
        },
        "overoptimised_at": [
            evaluation.step for evaluation in result.evaluations if evaluation.overoptimised is not None
        ],
    }


def print_recipes(*, to_stderr: bool) -> None:
    """Algorithms and recipes."""
    from rich.markup import escape
    from rich.table import Table

    from dina_lrm.recipes import alignment as recipes

    console = stderr() if to_stderr else stdout()
    console.print(
        "usage: dina-lrm align ALGORITHM RECIPE --reward RUN [--output RUN2] [overrides]\n", markup=False
    )
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, config in recipes.CONFIGS.items():
        line = (inspect.getdoc(config) or "").split("\n\n")[0].replace("\n", " ")
        table.add_row(f"[bold]{name}[/]", escape(line))
    console.print(table)
    console.print(f"\nrecipes: {', '.join(get_args(recipes.GeneratorName))}")
    console.print(
        "dina-lrm align ALGORITHM RECIPE --help lists every field, its meaning and the recipe's value."
    )
