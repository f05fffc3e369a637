"""Does stopping early pay? Accuracy against mean backbone passes, fixed ensembles and the adaptive rule.

    python benchmarks/adaptive.py --fit FIT.safetensors --test TEST.safetensors --output DIR

FIT gives everything that is chosen: half of its prompts the order of the levels, the other half when to stop,
both which fixed ensemble is the best. Every figure is measured on TEST. Two adaptive rules: one whose levels
are learned too, and one over the levels of the default ensemble. Writes DIR/adaptive.{json,md}. Pairs come
from benchmarks/shapes_pairs.py, of seeds that the reward was not trained on.
"""

import multiprocessing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from record import write_results

from dina_lrm import RewardModel
from dina_lrm.data.latents import LatentPairs
from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.adaptive import (
    NUM_LEVELS,
    LevelOrder,
    joined_scores,
    order_levels,
    stop_early,
    stopping_rule,
)
from dina_lrm.evaluation.metrics import cluster_bootstrap, pair_correctness

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
FIXED = ((0.2, 0.5), (0.2, 0.5, 0.7), (0.1, 0.2, 0.3, 0.4, 0.5), LEVELS)
ERRORS = (0.005, 0.01, 0.02, 0.05)
DEFAULT = (0.2, 0.5, 0.7)
"""Levels of the bundled reward's own ensemble."""
SEED = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    fit: Path
    test: Path
    output: Path
    model: str = "bundled"


def main(options: Options) -> None:
    fit, test = LatentPairs.load(options.fit), LatentPairs.load(options.test)
    first, second = fit.split_by_prompt(0.5, seed=SEED)
    parts = test.split_by_prompt(0.5, seed=SEED)
    test = LatentPairs.concatenate(parts)
    fixed = [*((level,) for level in LEVELS), *FIXED]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        model = options.model
        jobs = {"learned": (LEVELS, NUM_LEVELS), "default": (DEFAULT, len(DEFAULT))}
        ordering = {name: pool.apply_async(ordered, (model, first, *job)) for name, job in jobs.items()}
        scoring = [pool.apply_async(margins, (model, part, fixed)) for part in (fit, *parts)]
        orders = {name: job.get() for name, job in ordering.items()}
        orders["learned"] = orders["learned"].until_most_likely()
        plans = orders["learned"].ensembles + orders["default"].ensembles
        planned = [pool.apply_async(margins, (model, part, plans)) for part in (second, fit, *parts)]
        fixed_fit, *fixed_test = [job.get() for job in scoring]
        control, plan_fit, *plan_test = [job.get() for job in planned]
    sets = {
        "fit": (fit, fixed_fit, plan_fit),
        "test": (test, torch.cat(fixed_test, dim=1), torch.cat(plan_test, dim=1)),
    }
    num_learned = len(orders["learned"].noise_levels)
    rows_of = {"learned": slice(0, num_learned), "default": slice(num_learned, len(plans))}
    rows: list[dict[str, Any]] = []

    def measure(name: str, kind: str, passes: float, found: dict[str, torch.Tensor], **about: Any) -> None:
        right = {
            part: pair_correctness(
                found[part].double().numpy(), sets[part][0].target.double().numpy(), ties="wrong"
            )
            for part in found
        }
        row = {"name": name, "kind": kind, "passes": passes, **about}
        row["accuracy"] = asdict(cluster_bootstrap(right["test"], test.prompt_index.numpy()))
        rows.append(row | {"fit_accuracy": float(np.nanmean(right["fit"])), "right": right["test"]})

    for index, levels in enumerate(fixed):
        joined = {part: sets[part][1][index] for part in sets}
        measure(named(levels), "tokens" if len(levels) > 1 else "single", len(levels), joined)
        if len(levels) > 1:
            members = [LEVELS.index(level) for level in levels]
            averaged = {part: sets[part][1][members].mean(dim=0) for part in sets}
            measure(f"mean of {named(levels)}", "scores", len(levels), averaged)
    for index, levels in enumerate(orders["learned"].ensembles[1:], 1):
        joined = {part: sets[part][2][index] for part in sets}
        measure(f"first {len(levels)} learned: {named(levels)}", "tokens", len(levels), joined)
    references = {
        f"minus_{size}_passes": max(
            (row for row in rows if row["passes"] == size and row["kind"] != "single"),
            key=lambda row: row["fit_accuracy"],
        )
        for size in sorted({row["passes"] for row in rows} - {1})
    }
    best = max((row for row in rows if row["passes"] > 1), key=lambda row: row["fit_accuracy"])
    references["minus_best"] = best
    references["minus_default"] = next(row for row in rows if row["name"] == named(DEFAULT))
    for which, order in orders.items():
        own = rows_of[which]
        for error in ERRORS:
            try:
                levels = stopping_rule(order, control[own], error=error)
            except InvalidInputError as refusal:
                print(refusal)
                continue
            early = {part: stop_early(levels, sets[part][2][own]) for part in sets}
            taken, stopped = early["test"]
            measure(
                f"adaptive {which}, at most {100 * error:g} % flipped",
                "adaptive",
                float(taken.double().mean()),
                {part: early[part][1] for part in sets},
                flipped=float((stopped.sign() != sets["test"][2][own][-1].sign()).double().mean()),
                levels=asdict(levels),
                shares=[float((taken == level + 1).double().mean()) for level in range(own.stop - own.start)],
            )
    for row in rows:
        for name, reference in references.items():
            gain = row["right"] - reference["right"]
            row[name] = asdict(cluster_bootstrap(gain, test.prompt_index.numpy()))
    for row in rows:
        del row["right"]
    about = {
        "fit_pairs": len(fit),
        "test_pairs": len(test),
        "orders": {name: list(order.noise_levels) for name, order in orders.items()},
        "nats": {name: list(order.nats) for name, order in orders.items()},
        "best_ensemble_on_fit": best["name"],
        "best_on_fit_by_passes": {name: reference["name"] for name, reference in references.items()},
    }
    page = table(about, rows, references)
    write_results(options.output, "adaptive", {**about, "rows": rows}, page, seeds=[SEED])
    print(page)


def table(about: dict[str, Any], rows: list[dict[str, Any]], references: dict[str, dict[str, Any]]) -> str:
    """All rows against the best fixed ensemble; then the adaptive ones against the best of every size."""
    orders = "; ".join(f"{name} {', '.join(map(str, order))}" for name, order in about["orders"].items())
    lines = [
        f"{about['fit_pairs']} pairs to learn on, {about['test_pairs']} to measure.",
        f"Orders of levels: {orders}. Best fixed ensemble on the former: {about['best_ensemble_on_fit']}.",
        "",
        f"| | passes | accuracy % | 95 % interval | minus the best fixed ensemble, points | "
        f"minus the default ({named(DEFAULT)}), points | flipped % |",
        "|---|--:|--:|---|---|---|--:|",
    ]
    for row in rows:
        a = row["accuracy"]
        flipped = f"{100 * row['flipped']:.2f}" if "flipped" in row else ""
        lines.append(
            f"| {row['name']} ({row['kind']}) | {row['passes']:.2f} | {100 * a['value']:.1f} | "
            f"{100 * a['low']:.1f} to {100 * a['high']:.1f} | {points(row['minus_best'])} | "
            f"{points(row['minus_default'])} | {flipped} |"
        )
    sizes = [name for name in references if name.endswith("_passes")]
    heads = [f"{references[name]['name']} ({references[name]['passes']})" for name in sizes]
    lines += [
        "",
        "Minus the best fixed ensemble of each size (passes), points; below it, the share of its passes.",
        "",
        f"| | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
    ]
    for row in rows:
        if row["kind"] == "adaptive":
            lines.append(f"| {row['name']} | {' | '.join(points(row[name]) for name in sizes)} |")
            shares = [f"{100 * row['passes'] / references[name]['passes']:.0f} %" for name in sizes]
            lines.append(f"| {row['passes']:.2f} passes | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def points(found: dict[str, float]) -> str:
    return f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def named(levels: tuple[float, ...]) -> str:
    return "+".join(f"{level:g}" for level in levels)


def ordered(model_id: str, pairs: LatentPairs, levels: tuple[float, ...], num_levels: int) -> LevelOrder:
    torch.set_num_threads(1)
    model = RewardModel.from_pretrained(model_id)
    return order_levels(model, pairs, levels=levels, num_levels=num_levels, seed=SEED)


def margins(model_id: str, pairs: LatentPairs, ensembles: list[tuple[float, ...]]) -> torch.Tensor:
    """(ensemble, pair)."""
    torch.set_num_threads(1)
    scores = joined_scores(RewardModel.from_pretrained(model_id), pairs, ensembles, seed=SEED)
    return scores.chosen - scores.rejected


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
