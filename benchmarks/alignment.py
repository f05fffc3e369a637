"""Does alignment make better pictures? Every algorithm on the bundled generator, judged by gold, over seeds.

    python benchmarks/alignment.py --output RUNS --results benchmarks/results

The base samples in four steps without guidance, which leaves it room to improve. The reward is the bundled
one; the gold score is the judge's utility of 200 held-out captions at fixed seeds, the same for every run.
One run is one process on one thread; finished runs are not repeated, stopped ones go on. Writes
RUNS/ALGORITHM-SEED/ (LoRA, report.html, curves) and alignment.{json,md,png} in the folder of results.
"""

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from record import write_results

from dina_lrm.alignment.config import AlignConfig
from dina_lrm.alignment.gold import paired_gain
from dina_lrm.build.alignment import run_alignment
from dina_lrm.recipes.alignment import alignment_recipe
from dina_lrm.reporting import figures

ALGORITHMS = ("refl", "grpo", "dpo", "step-dpo")
TITLES = {"refl": "ReFL", "grpo": "Flow-GRPO", "dpo": "Diffusion-DPO", "step-dpo": "step-level DPO"}


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path
    results: Path | None = None
    """Folder of the table and the figure; by default OUTPUT."""
    algorithms: tuple[str, ...] = ALGORITHMS
    seeds: tuple[int, ...] = (0, 1, 2)
    held_out: int = 200
    """Held-out captions."""
    processes: int = 2
    """Runs at the same time."""


def config_of(options: Options, algorithm: str, seed: int) -> AlignConfig:
    base = alignment_recipe(algorithm, "shapes")
    return replace(
        base,
        output=str(options.output / f"{algorithm}-{seed}"),
        seed=seed,
        resume=True,
        cpu=True,
        monitor=replace(base.monitor, num_prompts=options.held_out),
    )


def run(options: Options, job: tuple[str, int]) -> str:
    algorithm, seed = job
    torch.set_num_threads(1)
    config = config_of(options, algorithm, seed)
    assert config.output is not None
    file = Path(config.output) / "result.json"
    if file.exists():
        return f"{config.output} (there already)"
    _, result = run_alignment(config)
    record = {
        "algorithm": algorithm,
        "seed": seed,
        "seconds": result.seconds,
        "steps": result.steps,
        "stopped_by": result.stopped_by,
        "evaluations": [asdict(one) for one in result.evaluations],
    }
    file.write_text(json.dumps(record))
    gain = gains(record, "judge")[-1]
    return f"{config.output}: {result.seconds:.0f} s, gold {gain[0]:+.3f} ({gain[1]:+.3f} to {gain[2]:+.3f})"


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    jobs = [(name, seed) for seed in options.seeds for name in options.algorithms]
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        for line in pool.imap_unordered(partial(run, options), jobs, chunksize=1):
            print(line, flush=True)
    summarize(options)


def gains(record: dict[str, Any], name: str) -> list[tuple[float, float, float]]:
    """Of every evaluation over the first, paired over captions."""

    def scores(evaluation: dict[str, Any]) -> Sequence[float]:
        return evaluation["proxy"] if name == "proxy" else evaluation["gold"][name]

    first = record["evaluations"][0]
    return [paired_gain(scores(one), scores(first)) for one in record["evaluations"]]


def summarize(options: Options) -> None:
    rows = []
    records = {}
    for algorithm in options.algorithms:
        for seed in options.seeds:
            record = json.loads((options.output / f"{algorithm}-{seed}" / "result.json").read_text())
            records[algorithm, seed] = record
            gold, proxy = gains(record, "judge"), gains(record, "proxy")
            best = max(range(len(gold)), key=lambda index: gold[index][0])
            overoptimised = [one["step"] for one in record["evaluations"] if one["overoptimised"] is not None]
            rows.append(
                {
                    "algorithm": algorithm,
                    "seed": seed,
                    "updates": record["steps"],
                    "seconds": record["seconds"],
                    "base_gold": float(np.mean(record["evaluations"][0]["gold"]["judge"])),
                    "gold_gain": gold[-1],
                    "proxy_gain": proxy[-1],
                    "best_gold_gain": gold[best][0],
                    "best_at": record["evaluations"][best]["step"],
                    "overoptimised_at": overoptimised[0] if overoptimised else None,
                    "distance": record["evaluations"][-1]["distance"],
                    "diversity": [record["evaluations"][at]["diversity"] for at in (0, -1)],
                    "curve": {
                        "step": [one["step"] for one in record["evaluations"]],
                        "gold": gold,
                        "proxy": proxy,
                    },
                }
            )
    folder = options.results or options.output
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "held_out": options.held_out,
    }
    write_results(folder, "alignment", {**about, "rows": rows}, table(about, rows), seeds=options.seeds)
    figures.save_png(curves(options, rows), folder / "alignment.png")
    print(table(about, rows))


def table(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"Gold is the judge's utility, in [0, 1], mean of {about['held_out']} held-out captions; the "
        f"base has {rows[0]['base_gold']:.3f}. Gains are paired, with 95 % intervals over captions. "
        "",
        "| | seed | updates | minutes | gold gain | proxy gain | best gold gain (update) | parted at "
        "| distance | diversity, before and after |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        mean, low, high = row["gold_gain"]
        cells = [
            TITLES[row["algorithm"]],
            str(row["seed"]),
            str(row["updates"]),
            f"{row['seconds'] / 60:.1f}",
            f"{mean:+.3f} ({low:+.3f} to {high:+.3f})",
            f"{row['proxy_gain'][0]:+.2f}",
            f"{row['best_gold_gain']:+.3f} ({row['best_at']})",
            "-" if row["overoptimised_at"] is None else str(row["overoptimised_at"]),
            f"{row['distance']:.3f}",
            "{:.2f}, {:.2f}".format(*row["diversity"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@figures.figure_style()
def curves(options: Options, rows: Sequence[dict[str, Any]]) -> Any:
    """Gold and proxy over updates, a panel an algorithm, a line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0 * len(options.algorithms), 5.4), layout="constrained")
    axes = figure.subplots(2, len(options.algorithms), sharey="row", squeeze=False)
    for column, algorithm in enumerate(options.algorithms):
        for number, row in enumerate(one for one in rows if one["algorithm"] == algorithm):
            colour = figures.SERIES[number % len(figures.SERIES)]
            for panel, name in zip(axes[:, column], ("gold", "proxy"), strict=True):
                steps, found = row["curve"]["step"], np.array(row["curve"][name])
                panel.plot(steps, found[:, 0], color=colour, marker="o", markersize=3, label=str(row["seed"]))
                panel.fill_between(steps, found[:, 1], found[:, 2], color=colour, alpha=0.12, linewidth=0)
        axes[0, column].set_title(TITLES[algorithm], fontsize=11)
        axes[1, column].set_xlabel("update")
        for panel in axes[:, column]:
            panel.axhline(0, color=figures.RULE, linewidth=1)
    axes[0, 0].set_ylabel("gain of gold (judge)")
    axes[1, 0].set_ylabel("gain of proxy (reward)")
    axes[0, 0].legend(loc="best", title="seed")
    return figure


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
