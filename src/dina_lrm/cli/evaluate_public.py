"""`dina-lrm evaluate --benchmark`: accuracy on a public test set."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dina_lrm.cli.console import UsageError, log, print_json, print_table
from dina_lrm.cli.evaluate_options import Evaluate, default_output, last_written, percent, refuse_to_replace
from dina_lrm.cli.options import find_device, parse_noise_levels
from dina_lrm.runs.pace import WorkProgress

if TYPE_CHECKING:
    from dina_lrm.evaluation.paired import PairedDifference
    from dina_lrm.evaluation.picture_scores import ScoreFunction
    from dina_lrm.evaluation.public import PublicResult


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
    stored = model.config.calibration_at(own.noise_levels)
    return reward_scores(model, settings, seed=options.seed), None if stored is None else stored.scale


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


def print_public(options: Evaluate, result: "PublicResult", paired: "PairedDifference | None") -> None:
    named = {"published" if options.rule == "published" else "chosen": result.published}
    rows = [
        [f"{label}: {found.rule}", percent(found.accuracy), f"{found.num_pairs:,}", f"{found.num_prompts:,}"]
        for label, found in (named | {"by pair": result.by_pair, "by prompt": result.by_prompt}).items()
    ]
    rows += [
        [
            f"strict at {setting.label}",
            percent(setting.by_pair.accuracy),
            f"{setting.by_pair.num_pairs:,}",
            "",
        ]
        for setting in result.settings[1:]
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
