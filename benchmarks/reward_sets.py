"""How near to the best possible reward are rewards in distribution and off it, and how do they differ?

    python benchmarks/reward_sets.py --models OLD bundled --pairs PAIRS --results benchmarks/results

Four sets of pairs of simulated raters, with captions that training has not seen (`dina-lrm evaluate
--benchmark shapes-all`). What is counted is the expected agreement with fresh raters over that of the best
possible reward; intervals resample captions, the same ones for both sides of a difference. Each model's
default levels come first."""

import multiprocessing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
import tyro
from record import shown, write_results

from dina_lrm import RewardModel
from dina_lrm.build.pairs import shapes_pairs, unseen_pairs
from dina_lrm.data.latents import LatentPairs
from dina_lrm.evaluation.adaptive import joined_scores
from dina_lrm.evaluation.metrics import Interval, cluster_bootstrap, expected_correctness
from dina_lrm.training.validation import levels_label

Part = Literal["shapes", "generators", "damage", "style"]
PARTS: tuple[Part, ...] = get_args(Part)
LEVELS = (0.0, 0.2, 0.4, 0.5, 0.7)


@dataclass(frozen=True, kw_only=True)
class Options:
    models: tuple[str, ...] = ("bundled",)
    """Folders of rewards; differences are the last one's minus each other's."""
    pairs: Path
    """Folder of the four sets; those that are missing are made."""
    results: Path
    """Folder of the table."""
    name: str = "reward_sets"
    """Of the two files of the result."""
    num_prompts: int = 1000
    """Captions of a set that is made."""
    seed: int = 9001
    """Of a set that is made."""
    noise_seed: int = 0
    processes: int = 2
    """Sets at the same time, each on one thread."""


def main(options: Options) -> None:
    options.pairs.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        measured = dict(zip(PARTS, pool.imap(partial(measure, options), PARTS), strict=True))
    rows = [row for part in PARTS for row in measured[part]]
    text = "\n".join(table(options, rows))
    print(text)
    content = {"models": list(options.models), "rows": rows}
    write_results(options.results, options.name, content, text, seeds=[options.seed, options.noise_seed])


def measure(options: Options, part: Part) -> list[dict[str, Any]]:
    """Rows of one set."""
    torch.set_num_threads(1)
    models = {name: RewardModel.from_pretrained(name) for name in options.models}
    file = options.pairs / f"{part}.safetensors"
    if not file.exists():
        encoder = next(iter(models.values()))
        settings: dict[str, Any] = {"num_prompts": options.num_prompts, "seed": options.seed}
        if part == "shapes":
            made = shapes_pairs(encoder, part="test", **settings)
        else:
            made = unseen_pairs(encoder, part, **settings)
        made.save(file)
    pairs = LatentPairs.load(file)
    bayes = cast("torch.Tensor", pairs.bayes).double().numpy()
    best, captions = np.maximum(bayes, 1 - bayes), pairs.prompt_index.numpy()
    right: dict[tuple[str, str], np.ndarray] = {}
    for name, model in models.items():
        levels = model.config.noise_levels
        ensembles = (levels, *((level,) for level in LEVELS))
        scores = joined_scores(model, pairs, ensembles, seed=options.noise_seed)
        for label, margin in zip(
            ("default", *(f"{level:g}" for level in LEVELS)), scores.chosen - scores.rejected, strict=True
        ):
            right[name, label] = expected_correctness(margin.numpy(), bayes)
    rows: list[dict[str, Any]] = []
    for (name, label), values in right.items():
        row: dict[str, Any] = {"set": part, "model": name, "levels": label, "captions": pairs.num_prompts}
        row["default"] = list(models[name].config.noise_levels)
        row["pairs"], row["best_accuracy"] = len(pairs), float(best.mean())
        row["share"] = plain(cluster_bootstrap(values, captions, reference=best))
        if name != options.models[-1]:
            change = right[options.models[-1], label] - values
            row["last_minus_this"] = plain(cluster_bootstrap(change, captions, reference=best))
        rows.append(row)
    return rows


def plain(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def table(options: Options, rows: list[dict[str, Any]]) -> list[str]:
    labels = ("default", *(f"{level:g}" for level in LEVELS))
    by = {(row["set"], row["model"], row["levels"]): row for row in rows}
    lines = [
        "Expected agreement with fresh raters, in % of the best possible reward's, with 95 % intervals over "
        "captions.",
        "",
        "| set | pairs | reward | " + " | ".join(labels) + " |",
        "|---|--:|---|" + "--:|" * len(labels),
    ]
    for part in PARTS:
        for name in options.models:
            first = by[part, name, "default"]
            levels = levels_label(first["default"])
            cells = [shown(by[part, name, label]["share"], "{:.1f}") for label in labels]
            lines.append(f"| {part} | {first['pairs']} | {name} ({levels}) | " + " | ".join(cells) + " |")
    last = options.models[-1]
    for name in options.models[:-1]:
        lines += ["", f"{last} minus {name}, in points:", ""]
        lines += ["| set | " + " | ".join(labels) + " |", "|---|" + "--:|" * len(labels)]
        for part in PARTS:
            cells = [shown(by[part, name, label]["last_minus_this"], "{:+.1f}") for label in labels]
            lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
