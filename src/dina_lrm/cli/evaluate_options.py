"""Options of `dina-lrm evaluate`."""

import json
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dina_lrm.cli.console import UsageError
from dina_lrm.cli.options import JsonFlag, ModelOptions, NoiseLevels

if TYPE_CHECKING:
    from dina_lrm.evaluation.metrics import Interval


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a reward on pairs: accuracy with intervals, noise levels, ensembles, calibration.

    On your own prepared pairs (--pairs), on a public benchmark (--benchmark NAME --root DIR), or on pairs of
    the bundled shapes domain, which is the default.
    """

    benchmark: Literal[
        "shapes",
        "shapes-generators",
        "shapes-damage",
        "shapes-style",
        "shapes-all",
        "hpdv3",
        "hpdv3++",
        "hpdv2",
        "imagereward",
        "imagerewarddb",
        "genai-bench",
        "pickapic",
        "rapidata",
        "open-image-preferences",
        "editreward",
        "folder",
        "jsonl",
    ] = "shapes"
    """shapes: pictures of the bundled generator, simulated raters whose distribution is known,
    captions that no training sees. shapes-generators, shapes-damage and shapes-style: the same with pictures
    of other generators, damaged, or drawn in another way than any that training shows; shapes-all: these four
    side by side. Any other is a set of human preferences in its original layout, under --root."""
    root: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder with the benchmark's files as published; for jsonl, also the file. Not for shapes."""
    split: str | None = None
    """The part of the benchmark; by default the one it is evaluated on. Not for shapes."""
    rule: Literal[
        "published",
        "strict",
        "strict-by-prompt",
        "inversions",
        "concordance",
        "three-way",
        "soft-labels",
        "tie-calibrated",
    ] = "published"
    """How ties count and what is averaged; published: as the benchmark's own code does it. Not for shapes."""
    tie_threshold: float = 0.0
    """Largest score difference that the rule takes for a tie. Not for shapes."""
    threshold_split: str | None = None
    """Split on which to fit that difference instead, for the rules that fit one. Not for shapes."""
    against: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Result of another model on the same comparisons, to be compared pair by pair. Not for shapes."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    scorers: tuple[str, ...] = ()
    """Several models on the same comparisons instead of --model, each NAME or NAME=LOCATION, as in: dina=RUN
    clip-score pickscore=FOLDER unified-reward=http://HOST:PORT@MODEL. Names are those of the baselines
    guide. Writes costs.html too. Not for shapes."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Receives results.json, results.md and scores.parquet. By default MODEL/evaluation/NAME where the model
    is a folder, and runs/evaluation/NAME otherwise; NAME is the benchmark or the pairs. On a public
    benchmark an interrupted run goes on where it stopped when the same command is given again."""
    pairs: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER|FILE")] = None
    """Pairs of latents: a folder of `dina-lrm prepare`, or a file (.safetensors). For a file that does not
    exist yet shapes pairs are made and kept there."""
    num_prompts: int = 1000
    """Captions that new shapes pairs are made of."""
    noise_levels: NoiseLevels = ()
    """Single levels to measure beside the model's own; auto: 0 to 0.9 for pairs of latents, none for public
    benchmarks."""
    ensembles: tuple[str, ...] | None = None
    """Lists of levels, each measured joined as tokens and as a mean of scores. By default 0.2,0.5,0.7 for
    pairs of latents, none for public benchmarks."""
    num_draws: int = 1
    """More than 1 measures the default over that many noise draws too."""
    learn_levels: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Learn on these pairs how many levels a comparison needs, and store it in the model's folder, for
    `compare --adaptive`. For shapes, or --pairs; use pairs that the reward is not tested on."""
    max_flipped: float = 0.05
    """Share of decisions that an early stop may flip; read only with --learn-levels."""
    seed: int = 0
    """Seed of the test pairs and of the noise."""
    batch_size: int = 128
    """Images per call; no effect on the result."""
    as_json: JsonFlag = False
    """Print one JSON object instead of a table."""


SHAPES_SETS = ("shapes", "shapes-generators", "shapes-damage", "shapes-style")
"""In distribution, and three ways off it."""
PUBLIC_ONLY = ("root", "split", "rule", "tie_threshold", "threshold_split", "against", "scorers")
"""Options that only a public benchmark reads."""


def refuse_to_replace(folder: Path, model: str, seed: int) -> None:
    """UsageError where the folder holds the results of another model or seed; the same are measured anew."""
    file = folder / "results.json"
    if not file.exists():
        return
    try:
        there = json.loads(file.read_bytes())
        found = there["model"], there["seed"]
    except (ValueError, TypeError, KeyError):
        raise UsageError(f"{file} is none of `dina-lrm evaluate`: choose another --output") from None
    if found != (model, seed):
        raise UsageError(
            f"{folder} holds the results of {found[0]} with seed {found[1]}: choose another --output"
        )


def refuse_ignored(options: Evaluate) -> None:
    """UsageError for an option that is not read for what is measured."""
    made = options.pairs is None or not options.pairs.exists()
    if not options.benchmark.startswith("shapes"):
        what, unread = f"--benchmark {options.benchmark}", ["pairs", "num_prompts", "learn_levels"]
        if options.scorers:
            what = "--scorers"
            unread += ["model.model", "model.pipeline", "noise_levels", "ensembles", "num_draws"]
    else:
        what = f"--pairs {options.pairs}" if options.pairs is not None else f"--benchmark {options.benchmark}"
        unread = [*PUBLIC_ONLY, *([] if made else ["num_prompts"])]
        if options.benchmark == "shapes-all":
            unread += ["pairs", "learn_levels"]
        if options.learn_levels:
            what = "--learn-levels"
            unread += ["noise_levels", "ensembles", "num_draws", "batch_size", "output"]
    if not options.learn_levels:
        unread.append("max_flipped")
    default = Evaluate()
    for name in unread:
        read = attrgetter(name)
        if read(options) != read(default):
            flag = name.rpartition(".")[2].replace("_", "-")
            reason = "goes with --learn-levels" if name == "max_flipped" else f"has no effect with {what}"
            raise UsageError(f"--{flag} {reason}")


def last_written(model: Path) -> int | None:
    """When a model's weights or config were written, in ns; None where it is no folder."""
    files = [
        file
        for file in (model.rglob("*") if model.is_dir() else ())
        if file.suffix in (".safetensors", ".pt", ".bin") or file.name == "config.json"
    ]
    return max((file.stat().st_mtime_ns for file in files), default=None)


def default_output(options: Evaluate) -> Path:
    folder, name = Path(options.model.model), str(options.benchmark)
    if options.pairs is not None:
        place = options.pairs.resolve()  # LATENTS/test and another test are told apart
        name = f"{place.parent.name}-{place.stem}" if place.stem in ("train", "test") else place.stem
    return (folder / "evaluation" if folder.is_dir() else Path("runs/evaluation")) / name


def percent(interval: "Interval | None") -> str:
    if interval is None:
        return "-"
    value, bounds = interval.percents()
    return f"{value} [{bounds.replace(' to ', ', ')}]" if interval.known else f"{value} {bounds}"
