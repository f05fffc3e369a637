"""Does stopping early pay? Accuracy against mean backbone passes, fixed ensembles and the adaptive rule.

    python benchmarks/adaptive.py --fit FIT.safetensors --test TEST.safetensors --output DIR

The plan of views, its threshold, and which fixed ensemble is best are chosen on the pairs of FIT (of which
only the first --fit-pairs are used); every figure is measured on TEST. Writes DIR/adaptive.{json,md}. Pairs
come from benchmarks/shapes_pairs.py, of seeds that the reward was not trained on.
"""

import dataclasses
import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from dina_lrm import RewardModel
from dina_lrm.core.adaptive import stopping_views
from dina_lrm.data.latents import LatentPairs
from dina_lrm.evaluation.adaptive import learn_views, view_scores, views_along
from dina_lrm.evaluation.metrics import cluster_bootstrap, pair_correctness
from dina_lrm.evaluation.noise_sweep import PairScores, Setting, score_pairs

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
FIXED = ((0.2, 0.5), (0.2, 0.5, 0.7), (0.1, 0.2, 0.3, 0.4, 0.5), LEVELS)
ERRORS = (0.005, 0.01, 0.02, 0.05)


@dataclass(frozen=True, kw_only=True)
class Options:
    fit: Path
    test: Path
    output: Path
    model: str = "bundled"
    fit_pairs: int = 1200
    note: str = ""
    """Hardware and date, for the table."""


def main(options: Options) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        fit, test = pool.starmap(
            scored, [(options.model, options.fit, options.fit_pairs), (options.model, options.test, None)]
        )
    rows: list[dict[str, Any]] = []

    def measure(name: str, passes: float, margins: dict[str, np.ndarray], **about: Any) -> None:
        values = {
            part: pair_correctness(margins[part], sets[part]["target"], ties="wrong") for part in margins
        }
        interval = cluster_bootstrap(values["test"], sets["test"]["prompts"])
        row = {"name": name, "passes": passes, "accuracy": dataclasses.asdict(interval), **about}
        rows.append(row | {"fit_accuracy": float(np.nanmean(values["fit"])), "correct": values["test"]})

    sets = {"fit": fit, "test": test}
    for index, level in enumerate(LEVELS):
        measure(f"{level:g}", 1, {p: sets[p]["views"][0, index].numpy() for p in sets}, kind="single")
    for levels in FIXED:
        index = [LEVELS.index(level) for level in levels]
        label = "+".join(f"{level:g}" for level in levels)
        averaged = {p: sets[p]["views"][0, index].mean(dim=0).numpy() for p in sets}
        measure(label, len(levels), {p: sets[p]["tokens"][levels].numpy() for p in sets}, kind="tokens")
        measure(f"mean of {label}", len(levels), averaged, kind="scores")
    target = torch.from_numpy(fit["target"])
    fixed = max(rows, key=lambda row: row["fit_accuracy"])
    several = max((row for row in rows if row["passes"] > 1), key=lambda row: row["fit_accuracy"])
    for error in ERRORS:
        learned, plan = learn_views(fit["scores"], LEVELS, target, error=error)
        margins: dict[str, np.ndarray] = {}
        views: dict[str, float] = {}
        turned: dict[str, float] = {}
        for part in sets:
            along = views_along(sets[part]["views"].double(), plan)
            taken = stopping_views(plan.certainty(along), learned.threshold)
            means = plan.means(along)
            margins[part] = means.gather(0, taken[None] - 1)[0].numpy()
            views[part] = float(taken.double().mean())
            turned[part] = float((np.sign(margins[part]) != means[-1].sign().numpy()).mean())
        measure(
            f"adaptive, at most {100 * error:g} % turned",
            views["test"],
            margins,
            kind="adaptive",
            turned=turned["test"],
            threshold=learned.threshold,
            order=list(learned.noise_levels),
        )
    for row in rows:
        gain = row["correct"] - several["correct"]
        row["minus_best_fixed"] = dataclasses.asdict(cluster_bootstrap(gain, test["prompts"]))
    for row in rows:
        del row["correct"]
    about = {
        "command": "python benchmarks/adaptive.py --fit FIT.safetensors --test TEST.safetensors --output DIR",
        "fit_pairs": len(fit["target"]),
        "test_pairs": len(test["target"]),
        "best_on_fit": fixed["name"],
        "best_ensemble_on_fit": several["name"],
        "note": options.note,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "adaptive.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    lines = [
        f"{about['fit_pairs']} pairs to learn on, {about['test_pairs']} to measure. {options.note}",
        f"Best fixed ensemble on the former: {several['name']}, {several['passes']} passes.",
        "",
        "| | passes | accuracy % | 95 % interval | minus the best fixed ensemble, points |",
        "|---|--:|--:|---|---|",
    ]
    for row in rows:
        a, d = row["accuracy"], row["minus_best_fixed"]
        lines.append(
            f"| {row['name']} ({row['kind']}) | {row['passes']:.2f} | {100 * a['value']:.1f} | "
            f"{100 * a['low']:.1f} to {100 * a['high']:.1f} | "
            f"{100 * d['value']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f}) |"
        )
    (options.output / "adaptive.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def scored(model_id: str, file: Path, num_pairs: int | None) -> dict[str, Any]:
    """Margins of all views and of the fixed token-level ensembles."""
    torch.set_num_threads(1)
    model, pairs = RewardModel.from_pretrained(model_id), LatentPairs.load(file)
    if num_pairs is not None:
        pairs = pairs.subset(torch.arange(min(num_pairs, len(pairs))))
    scores = view_scores(model, pairs, LEVELS, seed=1)
    views = torch.stack([one.chosen - one.rejected for one in scores], dim=1)

    def tokens(levels: tuple[float, ...]) -> torch.Tensor:
        found: PairScores = score_pairs(model, pairs, Setting(noise_levels=levels), seed=1)
        return found.margin

    return {
        "scores": scores,
        "views": views,
        "tokens": {levels: tokens(levels) for levels in FIXED},
        "target": pairs.target.double().numpy(),
        "prompts": pairs.prompt_index.numpy(),
    }


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
