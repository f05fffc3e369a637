"""`dina-lrm evaluate`: accuracy with intervals, share of the Bayes-optimal, calibration; table and files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from dina_lrm.cli.console import UsageError, log, print_json, print_table
from dina_lrm.cli.evaluate_options import (
    SHAPES_SETS,
    Evaluate,
    default_output,
    percent,
    refuse_ignored,
    refuse_to_replace,
)
from dina_lrm.cli.evaluate_public import evaluate_public
from dina_lrm.cli.options import parse_noise_levels
from dina_lrm.core.seeds import Stream
from dina_lrm.runs.pace import WorkProgress

if TYPE_CHECKING:
    from dina_lrm import RewardModel
    from dina_lrm.data.shards.read import PairSet
    from dina_lrm.evaluation.benchmarks import EvaluationResult


def main(arguments: Sequence[str]) -> int:
    options = tyro.cli(Evaluate, prog="dina-lrm evaluate", args=arguments)
    for name in ("num_prompts", "num_draws", "batch_size"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is at least 1; got {getattr(options, name)}")
    if not 0 < options.max_flipped < 1:
        raise UsageError(f"--max-flipped is between 0 and 1; got {options.max_flipped:g}")
    refuse_ignored(options)
    if not options.benchmark.startswith("shapes"):
        if options.root is None:
            raise UsageError(f"--benchmark {options.benchmark} needs --root DIR, the folder of its files")
        return evaluate_public(options)
    if options.learn_levels and not Path(options.model.model).is_dir():
        raise UsageError("--learn-levels stores what it learns in the model's folder: give --model FOLDER")
    ensembles = [
        parse_noise_levels(levels)
        for levels in (("0.2,0.5,0.7",) if options.ensembles is None else options.ensembles)
    ]
    names = SHAPES_SETS if options.benchmark == "shapes-all" else (options.benchmark,)
    outputs = {
        name: (options.output or default_output(options)) / (name if len(names) > 1 else "") for name in names
    }
    if not options.learn_levels:
        for output in outputs.values():
            refuse_to_replace(output, options.model.model, options.seed)
    model = options.model.load()

    from dina_lrm.evaluation.benchmarks import SWEEP_LEVELS, evaluate_latent_pairs
    from dina_lrm.reporting.evaluation import pairs_page

    results: list[EvaluationResult] = []
    for name, output in outputs.items():
        pairs = latent_pairs_of(options, model, name)
        if options.learn_levels:
            return learn_levels(options, model, pairs)
        with WorkProgress() as progress:
            result = evaluate_latent_pairs(
                model,
                pairs,
                noise_levels=options.noise_levels or SWEEP_LEVELS,
                ensembles=ensembles,
                num_draws=options.num_draws,
                seed=options.seed,
                batch_size=options.batch_size,
                benchmark=name if options.pairs is None else str(options.pairs),
                model_name=options.model.model,
                on_progress=lambda done, total, progress=progress: progress.tell("passes", done, total=total),
            )
        folder = result.save(output)
        pairs_page(result, folder)
        results.append(result)
        if options.as_json:
            print_json({"model": options.model.model, "output": str(folder), **result.to_dict()})
            continue
        print_result(result)
        log(f"{folder}: results.html, results.md, results.json, scores.parquet  ({result.seconds:.0f} s)")
    if len(results) > 1 and not options.as_json:
        print_side_by_side(results)
    return 0


def latent_pairs_of(options: Evaluate, model: "RewardModel", name: str) -> "PairSet":
    """The pairs of --pairs; new pairs of a shapes set without it, and for a file that does not exist yet."""
    from dina_lrm.build.pairs import open_shards, shapes_pairs, unseen_pairs
    from dina_lrm.core.seeds import mix_seeds
    from dina_lrm.data.latents import LatentPairs

    given = options.pairs
    if given is not None and given.is_dir():
        return open_shards(given, model)
    if given is not None and given.exists():
        return LatentPairs.load(given)
    if given is not None and given.suffix != ".safetensors":
        raise UsageError(f"no folder of prepared pairs at {given}")
    log(f"making pairs of {options.num_prompts} captions: {name}")
    seed = mix_seeds(options.seed, Stream.TEST_PAIRS)
    if name == "shapes":
        pairs = shapes_pairs(model, num_prompts=options.num_prompts, seed=seed, part="test")
    else:
        kind = name.removeprefix("shapes-")
        pairs = unseen_pairs(model, kind, num_prompts=options.num_prompts, seed=seed)  # type: ignore[arg-type]
    if given is not None:
        pairs.save(given)
    return pairs


def learn_levels(options: Evaluate, model: "RewardModel", pairs: "PairSet") -> int:
    """Learn the order of the levels and when to stop, store it, say what it saves."""
    from dataclasses import replace

    from dina_lrm.evaluation import adaptive

    with WorkProgress() as progress:
        learned, found = adaptive.learn_levels(
            model,
            pairs,
            error=options.max_flipped,
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
        ["levels in order, sigma", order],
        ["all levels", f"{100 * found['accuracy_all']:.1f} % right"],
        [
            "stopping early",
            f"{100 * found['accuracy']:.1f} % right, {found['num_levels']:.2f} levels on average",
        ],
        ["decisions flipped", f"{100 * found['flipped']:.1f} % (allowed {100 * options.max_flipped:g} %)"],
    ]
    print_table(["", "found"], rows, title=f"{options.model.model}: learned on {len(pairs):,} pairs")
    log(f'next: dina-lrm compare --adaptive --model {options.model.model} "PROMPT" A B')
    return 0


def print_side_by_side(results: "Sequence[EvaluationResult]") -> None:
    """Share of what the best reward reaches: a row for each setting, a column for each set."""
    columns = [
        {item.setting.label: item.expected_bayes_share for item in result.settings} for result in results
    ]
    rows = [
        [label, *(percent(column[label]) if column.get(label) else "" for column in columns)]
        for label in columns[0]
    ]
    headers = ["noise levels", *(result.benchmark for result in results)]
    print_table(headers, rows, title="% of what the best reward agrees with fresh raters")


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
            *([percent(item.expected_bayes_share)] if known else []),
            f"{100 * item.reliability.expected_calibration_error:.1f}",
        ]
        for item in result.settings
    ]
    headers = ["noise levels", "passes", "accuracy %", *(["% of Bayes"] if known else []), "ECE %"]
    print_table(headers, rows, title=title)
