"""`dina-lrm evaluate`: accuracy with intervals, share of the Bayes-optimal, calibration; table and files."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dina_lrm.cli.console import UsageError, WorkProgress, log, print_json, print_table
from dina_lrm.cli.options import JsonFlag, ModelOptions, NoiseLevels, find_device, parse_noise_levels

if TYPE_CHECKING:
    from dina_lrm import RewardModel
    from dina_lrm.data.shards.read import PairSet
    from dina_lrm.evaluation.benchmarks import EvaluationResult
    from dina_lrm.evaluation.metrics import Interval
    from dina_lrm.evaluation.paired import PairedDifference
    from dina_lrm.evaluation.picture_scores import ScoreFunction
    from dina_lrm.evaluation.public import PublicResult

TEST_STREAM = 7
"""Sets the test captions' seed apart from those of training and validation pairs."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a reward on pairs: accuracy with intervals, noise levels, ensembles, calibration.

    On your own prepared pairs (--pairs), on a public benchmark (--benchmark NAME --root DIR), or on pairs of
    the bundled shapes domain, which is the default.
    """

    benchmark: Literal[
        "shapes",
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
    """shapes: pictures of the bundled generator, simulated raters whose law is known. Any other is a set of
    human preferences in its original layout, under --root."""
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
    num_prompts: int = 700
    """Captions that new shapes pairs are made of."""
    noise_levels: NoiseLevels = ()
    """Single levels to measure beside the model's own; auto: 0 to 0.9 for pairs of latents, none for public
    benchmarks."""
    ensembles: tuple[str, ...] | None = None
    """Lists of levels, each measured joined as tokens and as a mean of scores. By default 0.2,0.5,0.7 for
    pairs of latents, none for public benchmarks."""
    num_draws: int = 1
    """More than 1 measures the default over that many noise draws too."""
    learn_views: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Learn on these pairs how many views a comparison needs, and store it in the model's folder, for
    `compare --adaptive`. For shapes, or --pairs; use pairs that the reward is not tested on."""
    max_turned: float = 0.05
    """Share of decisions that an early stop may turn; read only with --learn-views."""
    seed: int = 0
    """Seed of the test pairs and of the noise."""
    batch_size: int = 128
    """Images per call; no effect on the result."""
    as_json: JsonFlag = False
    """Print one JSON object instead of a table."""


PUBLIC_ONLY = ("root", "split", "rule", "tie_threshold", "threshold_split", "against", "scorers")
"""Options that only a public benchmark reads."""


def main(arguments: Sequence[str]) -> int:
    options = tyro.cli(Evaluate, prog="dina-lrm evaluate", args=arguments)
    for name in ("num_prompts", "num_draws", "batch_size"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is at least 1; got {getattr(options, name)}")
    if not 0 < options.max_turned < 1:
        raise UsageError(f"--max-turned is between 0 and 1; got {options.max_turned:g}")
    refuse_ignored(options)
    if options.benchmark != "shapes":
        if options.root is None:
            raise UsageError(f"--benchmark {options.benchmark} needs --root DIR, the folder of its files")
        return evaluate_public(options)
    if options.learn_views and not Path(options.model.model).is_dir():
        raise UsageError("--learn-views stores what it learns in the model's folder: give --model FOLDER")
    ensembles = [
        parse_noise_levels(levels)
        for levels in (("0.2,0.5,0.7",) if options.ensembles is None else options.ensembles)
    ]
    output = options.output or default_output(options)
    if not options.learn_views:
        refuse_to_replace(output, options.model.model, options.seed)
    model = options.model.load()

    from dina_lrm.evaluation.benchmarks import SWEEP_LEVELS, evaluate_latent_pairs
    from dina_lrm.reporting.evaluation import pairs_page

    pairs = latent_pairs_of(options, model)
    if options.learn_views:
        return learn_views(options, model, pairs)
    with WorkProgress() as progress:
        result = evaluate_latent_pairs(
            model,
            pairs,
            noise_levels=options.noise_levels or SWEEP_LEVELS,
            ensembles=ensembles,
            num_draws=options.num_draws,
            seed=options.seed,
            batch_size=options.batch_size,
            benchmark=options.benchmark if options.pairs is None else str(options.pairs),
            model_name=options.model.model,
            on_progress=lambda done, total: progress.tell("passes", done, total=total),
        )
    folder = result.save(output)
    pairs_page(result, folder)
    if options.as_json:
        print_json({"model": options.model.model, "output": str(folder), **result.to_dict()})
        return 0
    print_result(result)
    log(f"{folder}: results.html, results.md, results.json, scores.parquet  ({result.seconds:.0f} s)")
    return 0


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
    if options.benchmark != "shapes":
        what, unread = f"--benchmark {options.benchmark}", ["pairs", "num_prompts", "learn_views"]
        if options.scorers:
            what = "--scorers"
            unread += ["model.model", "model.pipeline", "noise_levels", "ensembles", "num_draws"]
    else:
        what = f"--pairs {options.pairs}" if options.pairs is not None else "--benchmark shapes"
        unread = [*PUBLIC_ONLY, *([] if made else ["num_prompts"])]
        if options.learn_views:
            what = "--learn-views"
            unread += ["noise_levels", "ensembles", "num_draws", "batch_size", "output"]
    if not options.learn_views:
        unread.append("max_turned")
    default = Evaluate()
    for name in unread:
        read = attrgetter(name)
        if read(options) != read(default):
            flag = name.rpartition(".")[2].replace("_", "-")
            reason = "goes with --learn-views" if name == "max_turned" else f"has no effect with {what}"
            raise UsageError(f"--{flag} {reason}")


def latent_pairs_of(options: Evaluate, model: "RewardModel") -> "PairSet":
    """The pairs of --pairs; new shapes pairs without it, and for a file that does not exist yet."""
    from dina_lrm.build.training import open_shards, shapes_pairs
    from dina_lrm.core.seeds import mix_seeds
    from dina_lrm.data.latents import LatentPairs

    given = options.pairs
    if given is not None and given.is_dir():
        return open_shards(given, model)
    if given is not None and given.exists():
        return LatentPairs.load(given)
    if given is not None and given.suffix != ".safetensors":
        raise UsageError(f"no folder of prepared pairs at {given}")
    log(f"making shapes pairs of {options.num_prompts} captions")
    pairs = shapes_pairs(model, num_prompts=options.num_prompts, seed=mix_seeds(options.seed, TEST_STREAM))
    if given is not None:
        pairs.save(given)
    return pairs


def learn_views(options: Evaluate, model: "RewardModel", pairs: "PairSet") -> int:
    """Learn the order of the levels and when to stop, store it, say what it saves."""
    from dataclasses import replace

    from dina_lrm.evaluation import adaptive

    with WorkProgress() as progress:
        learned, found = adaptive.learn_views(
            model,
            pairs,
            error=options.max_turned,
            seed=options.seed,
            on_progress=lambda done, total: progress.tell("images", done, total=total),
        )
    model.config = replace(model.config, adaptive=learned)
    model.save_pretrained(options.model.model)
    if options.as_json:
        print_json({"model": options.model.model, "noise_levels": list(learned.noise_levels), **found})
        return 0
    order = ", ".join(f"{level:g}" for level in learned.noise_levels)
    rows = [
        ["views in order, sigma", order],
        ["all views", f"{100 * found['accuracy_all']:.1f} % right"],
        ["stopping early", f"{100 * found['accuracy']:.1f} % right, {found['views']:.2f} views on average"],
        ["decisions turned", f"{100 * found['turned']:.1f} % (allowed {100 * options.max_turned:g} %)"],
    ]
    print_table(["", "found"], rows, title=f"{options.model.model}: learned on {len(pairs):,} pairs")
    log(f'next: dina-lrm compare --adaptive --model {options.model.model} "PROMPT" A B')
    return 0


def evaluate_public(options: Evaluate) -> int:
    """Human preferences, by the benchmark's own rule; one model, or several side by side."""
    from dina_lrm.evaluation.public import as_json
    from dina_lrm.evaluation.rules import DEFAULT_RULE, RULES
    from dina_lrm.reporting.evaluation import cost_page, public_page

    rule = DEFAULT_RULE[options.benchmark] if options.rule == "published" else options.rule
    fits = RULES[rule].fits_threshold
    if options.threshold_split is not None and not fits:
        raise UsageError(f"--threshold-split: rule {rule} fits no threshold")
    if fits and options.threshold_split is None and options.tie_threshold == 0:
        log(
            f"rule {rule} fits a threshold on other pairs (--threshold-split); without, only equal scores tie"
        )
    output = options.output or default_output(options)
    results: list[Any] = []
    folders: list[Path] = []
    functions = score_functions(options)
    places = {name: output / name if options.scorers else output for name in functions}
    for name, folder in places.items():
        refuse_to_replace(folder, name, options.seed)
    for name, (place, load) in functions.items():
        folder = places[name]
        score, scale = load()
        result = measure_public(options, rule, name, place, score, scale, folder)
        del score  # the next model is measured without this one in memory
        folders.append(result.save(folder))
        public_page(result, options.benchmark, folder)
        results.append(result)
        paired = None if options.against is None else result.against(options.against)
        if options.as_json:
            record = {"model": name, "output": str(folder), **result.to_dict()}
            print_json(record if paired is None else record | {"against": as_json(paired)})
        else:
            print_public(options, result, paired)
            listed = ", rejects.jsonl" if result.rejects else ""
            log(f"{folder}: results.html, results.md, results.json, scores.parquet{listed}")
    if options.scorers:
        cost_page(results, options.benchmark, output)
        log(f"{output / 'costs.html'}: accuracy against FLOPs, seconds and memory")
    for folder in folders:  # all at the end, so that no model is scored again when a later one is stopped
        for part in folder.glob("scores-*.part.jsonl"):
            part.unlink()
    return 0


def score_functions(
    options: Evaluate,
) -> "dict[str, tuple[str, Callable[[], tuple[ScoreFunction, float | None]]]]":
    """Where each model that is measured comes from and what loads it, by its name; a reward brings its
    calibration."""
    if not options.scorers:
        return {options.model.model: (options.model.model, lambda: reward_function(options))}
    loads: dict[str, Any] = {}
    for given in options.scorers:
        name, _, location = given.partition("=")
        again = sum(other.partition("=")[0] == name for other in options.scorers) > 1
        label = f"{name} {Path(location).name}" if again and location else name
        if label in loads:
            raise UsageError(f"--scorers: two models would be called {label!r}")
        loads[label] = location or name, partial(scorer_function, options, name, location or None)
    return loads


def reward_function(options: Evaluate) -> "tuple[ScoreFunction, float | None]":
    """The reward at its own levels, and at those asked for; noise draws where asked for."""
    from dina_lrm.evaluation.noise_sweep import Setting
    from dina_lrm.evaluation.picture_scores import reward_scores

    model = options.model.load().requires_grad_(False)
    own = Setting(noise_levels=tuple(model.config.noise_levels))
    settings = [own, *(Setting(noise_levels=(level,)) for level in options.noise_levels)]
    for levels in map(parse_noise_levels, options.ensembles or ()):
        settings += [Setting(noise_levels=levels, combine=way) for way in ("tokens", "scores")]
    if options.num_draws > 1:
        settings.append(Setting(noise_levels=own.noise_levels, num_draws=options.num_draws))
    stored = model.config.calibration
    fits = stored is not None and sorted(stored.noise_levels) == sorted(own.noise_levels)
    return reward_scores(model, settings, seed=options.seed), stored.scale if fits and stored else None


def scorer_function(
    options: Evaluate, name: str, location: str | None
) -> "tuple[ScoreFunction, float | None]":
    import torch

    from dina_lrm.evaluation.baselines import load_scorer

    device = find_device(options.model.device)
    dtype = getattr(torch, options.model.dtype)
    more: dict[str, Any] = {}
    if location is not None and location.startswith("http"):
        location, _, more["model"] = location.partition("@")
    scorer = load_scorer(name, location=location, device=device, dtype=dtype, **more)
    return lambda prompts, images: {name: scorer.score(prompts, images)}, None


def measure_public(
    options: Evaluate,
    rule: str,
    name: str,
    place: str,
    score: "ScoreFunction",
    scale: float | None,
    folder: Path,
) -> "PublicResult":
    from dina_lrm.data.sources.registry import read_source, source_length
    from dina_lrm.evaluation.picture_scores import PartFile
    from dina_lrm.evaluation.public import evaluate_comparisons
    from dina_lrm.evaluation.rules import best_threshold

    def measure(split: str | None, threshold: float) -> "PublicResult":
        assert options.root is not None
        scored_with = {
            "benchmark": options.benchmark,
            "root": str(options.root.resolve()),
            "split": split,
            "scorer": [name, place, last_written(Path(place))],
            "pipeline": options.model.pipeline,
            "dtype": options.model.dtype,
            "noise_levels": options.noise_levels,
            "ensembles": options.ensembles,
            "num_draws": options.num_draws,
            "seed": options.seed,
        }
        part = PartFile(folder / f"scores-{split or 'default'}.part.jsonl", scored_with)
        total = source_length(options.benchmark, options.root, split=split)
        if part.path.exists():
            log(f"going on from {part.path}")
        with WorkProgress({"pairs": total}) as progress:
            return evaluate_comparisons(
                score,
                read_source(options.benchmark, options.root, split=split),
                rule=rule,
                model=name,
                calibration_scale=scale,
                threshold=threshold,
                seed=options.seed,
                batch_size=options.batch_size,
                part=part,
                on_progress=partial(progress.tell, "pairs"),
            )

    threshold = options.tie_threshold
    if options.threshold_split is not None:
        fitted_on = measure(options.threshold_split, 0.0)
        ties = [item.tie for item in fitted_on.comparisons]
        threshold = best_threshold(rule, fitted_on.score_chosen - fitted_on.score_rejected, ties)
        log(f"threshold {threshold:.4g}, fitted on {len(ties):,} comparisons of {options.threshold_split}")
    return measure(options.split, threshold)


def last_written(model: Path) -> int | None:
    """When a model's weights or config were written, in ns; None where it is no folder."""
    files = [
        file
        for file in (model.rglob("*") if model.is_dir() else ())
        if file.suffix in (".safetensors", ".pt", ".bin") or file.name == "config.json"
    ]
    return max((file.stat().st_mtime_ns for file in files), default=None)


def print_public(options: Evaluate, result: "PublicResult", paired: "PairedDifference | None") -> None:
    named = {"published" if options.rule == "published" else "chosen": result.published}
    rows = [
        [f"{label}: {found.rule}", percent(found.accuracy), f"{found.num_pairs:,}", f"{found.num_prompts:,}"]
        for label, found in (named | {"by pair": result.by_pair, "by prompt": result.by_prompt}).items()
    ]
    rows += [
        [f"strict at {one.label}", percent(one.by_pair.accuracy), f"{one.by_pair.num_pairs:,}", ""]
        for one in result.settings[1:]
    ]
    title = f"{result.model} on {options.benchmark}: {len(result.comparisons):,} comparisons, "
    title += f"scores at {result.settings[0].label}"
    print_table(["rule", "accuracy %", "pairs", "prompts"], rows, title=title)
    ties = f"{result.published.num_rater_ties:,} rater ties, {result.published.num_score_ties:,} score ties"
    log(f"{ties}; {result.counts()}")
    for name, value in (("Kendall's tau-b", result.kendall), ("Spearman's rho", result.spearman)):
        if not math.isnan(value.value):
            log(f"{name}, mean over prompts: {value}")
    for one in result.settings:
        if one.draw_agreement is not None:
            log(f"two noise draws agree on {100 * one.draw_agreement:.1f} % of the comparisons ({one.label})")
    cost = result.cost
    flops = "" if cost.flops is None else f", {cost.flops / 1e9:.3g} GFLOP"
    ways = "a score" if len(result.settings) == 1 else f"a picture in all {len(result.settings)} ways"
    log(f"{ways} took {1000 * cost.seconds:.1f} ms{flops}; peak memory {cost.peak_memory_bytes / 1e9:.2f} GB")
    if paired is not None:
        log(
            f"minus {options.against}: {percent(paired.difference)} points; {paired.only_first} pairs "
            f"better, {paired.only_second} worse (McNemar p = {paired.p_value:.2g})"
        )


def default_output(options: Evaluate) -> Path:
    folder, name = Path(options.model.model), str(options.benchmark)
    if options.pairs is not None:
        place = options.pairs.resolve()  # LATENTS/test and another test are told apart
        name = f"{place.parent.name}-{place.stem}" if place.stem in ("train", "test") else place.stem
    return (folder / "evaluation" if folder.is_dir() else Path("runs/evaluation")) / name


def print_result(result: "EvaluationResult") -> None:
    """The table a person reads: each setting, what it costs, how good it is."""
    title = f"{result.benchmark}: {result.num_pairs:,} pairs of {result.num_prompts:,} prompts"
    if result.num_rater_ties:
        title += f", {result.num_rater_ties:,} of them ties of the raters"
    known = result.bayes is not None
    if result.bayes is not None:
        title += f"; Bayes-optimal accuracy {percent(result.bayes.accuracy)}"
    rows = [
        [
            item.setting.label + (" (default)" if item is result.default else ""),
            str(item.setting.passes),
            percent(item.accuracy),
            *([percent(item.bayes_share)] if known else []),
            f"{100 * item.reliability.expected_calibration_error:.1f}",
        ]
        for item in result.settings
    ]
    headers = ["noise levels", "passes", "accuracy %", *(["% of Bayes"] if known else []), "ECE %"]
    print_table(headers, rows, title=title)


def percent(interval: "Interval | None") -> str:
    if interval is None:
        return "-"
    value, bounds = interval.percents()
    return f"{value} [{bounds.replace(' to ', ', ')}]" if interval.known else f"{value} {bounds}"
