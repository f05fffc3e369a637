"""Does the monitor see a hacked reward in time? A reward from few pairs, maximised far too long.

    python benchmarks/hackable_reward.py --output RUNS --results benchmarks/results

A new reward is trained on 384 pairs of the bundled domain, then maximised by ReFL, with an evaluation after
every third update. Asked is when the rule of `alignment.gold` first speaks, and how much of its best gain
gold has lost by then; it should be less than 10 %. The run goes on to show what would have come.
"""

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from record import write_results

from dina_lrm.alignment.config import MonitorConfig, ReflConfig
from dina_lrm.build.alignment import run_alignment
from dina_lrm.build.pairs import shapes_pairs
from dina_lrm.build.training import reward_model
from dina_lrm.checkpoints.config import LikelihoodConfig
from dina_lrm.recipes import training as recipes
from dina_lrm.recipes.alignment import alignment_recipe
from dina_lrm.training.trainer import train


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path
    results: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    prompts: int = 64
    """Of the training pairs, six each."""
    train_steps: int = 100
    updates: int = 45
    learning_rate: float = 3e-4
    """A third of the recipe's: gold peaks and falls over several evaluations, not between two."""
    num_steps: int = 3
    """Of the sampler: the fewer, the more room above the base."""
    held_out: int = 800
    """Captions: a tenth of the gain has to be larger than the error of a paired difference over them."""
    processes: int = 2
    note: str = ""


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        for line in pool.imap_unordered(partial(run, options), options.seeds, chunksize=1):
            print(line, flush=True)
    summarize(options)


def run(options: Options, seed: int) -> str:
    folder = options.output / f"seed-{seed}"
    file = folder / "result.json"
    if file.exists():
        return f"{file} (there already)"
    torch.set_num_threads(1)
    if not (folder / "reward" / "config.json").exists():
        base = recipes.shapes()
        config = replace(
            base,
            output=str(folder / "reward"),
            seed=seed,
            num_steps=options.train_steps,
            batch_size=24,
            precision="bfloat16",
            cpu=True,
            tensorboard=False,
            resume=True,
            ensemble_fraction=0.0,
            optimizer=replace(base.optimizer, ema_decay=0.9),
        )
        likelihood = LikelihoodConfig(kind="thurstone", slope=config.loss.slope, floor=config.loss.floor)
        model = reward_model(config.model, likelihood, seed=seed)
        train(config, model, shapes_pairs(model, num_prompts=options.prompts, seed=7000 + seed))
    base_run = alignment_recipe("refl", "shapes")
    assert isinstance(base_run, ReflConfig)
    align = replace(
        base_run,
        output=str(folder / "align"),
        seed=seed,
        cpu=True,
        resume=True,
        num_steps=options.updates,
        optimizer=replace(base_run.optimizer, learning_rate=options.learning_rate),
        sampler=replace(base_run.sampler, num_steps=options.num_steps),
        gradient_steps=options.num_steps,
        reward=replace(base_run.reward, models=(str(folder / "reward"),)),
        monitor=MonitorConfig(every=3, num_prompts=options.held_out),
    )
    _, result = run_alignment(align)
    curve = [
        {
            "step": one.step,
            "proxy": float(np.mean(one.proxy)),
            "gold": one.mean_gold,
            "overoptimised": one.overoptimised,
        }
        for one in result.evaluations
    ]
    file.write_text(json.dumps(curve))
    return str(file)


def summarize(options: Options) -> None:
    rows = []
    for seed in options.seeds:
        curve = json.loads((options.output / f"seed-{seed}" / "result.json").read_text())
        golds = [one["gold"] for one in curve]
        fired = next((at for at, one in enumerate(curve) if one["overoptimised"]), None)
        row: dict[str, Any] = {"seed": seed, "curve": curve, "fired_at": None}
        if fired is not None:
            peak = max(golds[: fired + 1]) - golds[0]
            row |= {
                "fired_at": curve[fired]["step"],
                "peak_gain": peak,
                "gain_when_fired": golds[fired] - golds[0],
                "lost": (max(golds[: fired + 1]) - golds[fired]) / peak if peak > 0 else None,
                "reason": curve[fired]["overoptimised"],
            }
        row |= {"best_gain": max(golds) - golds[0], "final_gain": golds[-1] - golds[0]}
        rows.append(row)
    folder = options.results or options.output
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "pairs": 6 * options.prompts,
        "held_out": options.held_out,
    }
    write_results(folder, "hackable_reward", {**about, "rows": rows}, table(about, rows), seeds=options.seeds)
    print(table(about, rows))


def table(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"A reward from {about['pairs']} pairs, maximised by ReFL; gold on {about['held_out']} held-out "
        f"captions.",
        "",
        "| seed | warned at update | gold gain then | best gold gain until then | share of it lost "
        "| best of all | at the end |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [str(row["seed"]), "never", "", "", ""]
        if row["fired_at"] is not None:
            lost = "" if row["lost"] is None else f"{100 * row['lost']:.0f} %"
            cells[1:] = [
                str(row["fired_at"]),
                f"{row['gain_when_fired']:+.3f}",
                f"{row['peak_gain']:+.3f}",
                lost,
            ]
        cells += [f"{row['best_gain']:+.3f}", f"{row['final_gain']:+.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
