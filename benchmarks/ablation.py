"""Does the paper's ablation hold on the shapes domain? Rewards trained alike but for one thing, over seeds.

    python benchmarks/ablation.py --output RUNS

Every reward sees the same pairs, as many steps and batches of the same size; the seed decides new weights,
order, noise levels and noise. All are measured on the same held-out pairs of simulated raters whose
distribution is known, so accuracy is given as a share of what the best possible reward reaches. One run is
one process on one thread; a finished run is not repeated, so an interrupted command goes on where it stopped.
Writes RUNS/VARIANT-SEED.json, and the table DIR/ablation.{json,md} with --results DIR.
"""

import dataclasses
import json
import multiprocessing
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from dina_lrm.build.pairs import shapes_pairs
from dina_lrm.build.training import reward_model
from dina_lrm.checkpoints.config import LikelihoodConfig
from dina_lrm.data.latents import LatentPairs
from dina_lrm.evaluation.benchmarks import evaluate_latent_pairs
from dina_lrm.evaluation.metrics import cluster_bootstrap, pair_correctness
from dina_lrm.recipes import training as recipes
from dina_lrm.training.config import TrainConfig
from dina_lrm.training.trainer import train

LEVELS = (0.0, 0.2, 0.4, 0.5, 0.7)
ENSEMBLE = (0.2, 0.5, 0.7)
SETTINGS = ("0", "0.2", "0.4", "0.5", "0.7", "0.2+0.5+0.7", "mean(0.2, 0.5, 0.7)")
MEASURE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path
    """Folder of the pairs and of one file a run."""
    results: Path | None = None
    """Folder of the table; by default OUTPUT."""
    seeds: tuple[int, ...] = (0, 1, 2)
    num_steps: int = 250
    train_prompts: int = 1200
    """Captions of the training pairs, six pairs each."""
    test_prompts: int = 350
    processes: int = 2
    """Runs at the same time, each on one thread."""
    note: str = ""
    """Hardware and date, for the table."""


def variants() -> dict[str, TrainConfig]:
    """What is compared: the method, and the method with one thing changed."""
    base = replace(recipes.shapes(), ensemble_fraction=0.0)
    return {
        "noise-calibrated": base,
        "constant variance": replace(recipes.shapes_constant_variance(), ensemble_fraction=0.0),
        "sigma = 0 only": recipes.shapes_clean(),
        "Bradley-Terry": replace(recipes.shapes_bradley_terry(), ensemble_fraction=0.0),
        "frozen backbone": replace(recipes.shapes_frozen(), ensemble_fraction=0.0),
        "levels concatenated": recipes.shapes(),
    }


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    sets = {"train": (options.train_prompts, 9001), "test": (options.test_prompts, 9002)}
    runs = [(name, seed) for seed in options.seeds for name in variants()]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for line in pool.imap(partial(make_pairs, options.output), [(k, *v) for k, v in sets.items()]):
            print(line, flush=True)
        for line in pool.imap_unordered(partial(run, options), runs):
            print(line, flush=True)
    summarize(options)


def make_pairs(output: Path, job: tuple[str, int, int]) -> str:
    part, num_prompts, seed = job
    file = output / f"{part}.safetensors"
    if not file.exists():
        torch.set_num_threads(1)
        model = reward_model(recipes.shapes().model)  # its encoders are used, its weights are not
        shapes_pairs(model, num_prompts=num_prompts, seed=seed).save(file)
    return str(file)


def run(options: Options, job: tuple[str, int]) -> str:
    """Train and measure one reward."""
    name, seed = job
    file = options.output / f"{name}-{seed}.json"
    if file.exists():
        return f"{file} (there already)"
    torch.set_num_threads(1)
    base = variants()[name]
    config = replace(
        base,
        output=None,
        seed=seed,
        num_steps=options.num_steps,
        precision="bfloat16",
        cpu=True,
        tensorboard=False,
        optimizer=replace(base.optimizer, ema_decay=0.98),  # a short run: an average over its last 50 steps
    )
    likelihood = LikelihoodConfig(
        kind=config.loss.likelihood, slope=config.loss.slope, floor=config.loss.floor
    )
    model = reward_model(config.model, likelihood, seed=seed)
    trained = train(config, model, LatentPairs.load(options.output / "train.safetensors"))
    test = LatentPairs.load(options.output / "test.safetensors")
    measured = evaluate_latent_pairs(
        model, test, noise_levels=LEVELS, ensembles=(ENSEMBLE,), seed=MEASURE_SEED
    )
    margins = {label: scores.margin.tolist() for label, scores in measured.scores.items()}
    record = {
        "variant": name,
        "seed": seed,
        "steps": trained.steps,
        "seconds": trained.seconds,
        "loss": [line.loss for line in trained.history if line.loss is not None],
        "margins": {label: margins[label] for label in SETTINGS},
    }
    aside = file.with_suffix(".partial")
    aside.write_text(json.dumps(record))
    aside.replace(file)
    return f"{file}: {trained.seconds:.0f} s"


def summarize(options: Options) -> None:
    """Share of Bayes by variant and setting: mean over seeds, range over seeds, interval over prompts."""
    test = LatentPairs.load(options.output / "test.safetensors")
    assert test.bayes is not None
    target, prompts = test.target.double().numpy(), test.prompt_index.numpy()
    optimal = pair_correctness(test.bayes.double().numpy() - 0.5, target, ties="half")

    def correct(name: str, label: str) -> np.ndarray:
        """(seed, pair)"""
        files = [options.output / f"{name}-{seed}.json" for seed in options.seeds]
        margins = [json.loads(file.read_text())["margins"][label] for file in files]
        return np.stack([pair_correctness(np.array(margin), target, ties="wrong") for margin in margins])

    rows: list[dict[str, Any]] = []
    for name in variants():
        for label in SETTINGS:
            of_seeds = correct(name, label)
            counted = ~np.isnan(optimal)
            shares = [float(one[counted].sum() / optimal[counted].sum()) for one in of_seeds]
            pooled = cluster_bootstrap(of_seeds.mean(axis=0), prompts, reference=optimal)
            gain = of_seeds.mean(axis=0) - correct("noise-calibrated", label).mean(axis=0)
            rows.append(
                {
                    "variant": name,
                    "setting": label,
                    "share_of_bayes": dataclasses.asdict(pooled),
                    "by_seed": shares,
                    "minus_noise_calibrated": dataclasses.asdict(cluster_bootstrap(gain, prompts)),
                }
            )
    folder = options.results or options.output
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "command": "python benchmarks/ablation.py --output RUNS",
        "steps": options.num_steps,
        "train_pairs": 6 * options.train_prompts,
        "test_pairs": int((~np.isnan(optimal)).sum()),
        "bayes_accuracy": float(np.nanmean(optimal)),
        "note": options.note,
    }
    (folder / "ablation.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    (folder / "ablation.md").write_text("\n".join(table(about, rows)) + "\n")
    print((folder / "ablation.md").read_text())


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> Iterable[str]:
    yield f"{about['train_pairs']} training pairs, {about['steps']} steps, {about['test_pairs']} test pairs, "
    yield f"Bayes-optimal accuracy {100 * about['bayes_accuracy']:.1f} %. {about['note']}"
    yield ""
    yield "Share of the Bayes-optimal accuracy in %, mean over seeds (smallest to largest seed):"
    yield ""
    yield "| | " + " | ".join(SETTINGS) + " |"
    yield "|---|" + "--:|" * len(SETTINGS)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["variant"], []).append(row)
    for name, cells in by_name.items():
        means = [100 * cell["share_of_bayes"]["value"] for cell in cells]
        spans = [(100 * min(cell["by_seed"]), 100 * max(cell["by_seed"])) for cell in cells]
        shown = [
            f"{mean:.1f} ({low:.1f} to {high:.1f})" for mean, (low, high) in zip(means, spans, strict=True)
        ]
        yield f"| {name} | " + " | ".join(shown) + " |"
    yield ""
    yield "Accuracy minus noise-calibrated at the same setting, in points, 95 % interval over prompts:"
    yield ""
    yield "| | " + " | ".join(SETTINGS) + " |"
    yield "|---|" + "--:|" * len(SETTINGS)
    for name, cells in list(by_name.items())[1:]:
        shown = [
            f"{100 * d['value']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f})"
            for d in (c["minus_noise_calibrated"] for c in cells)
        ]
        yield f"| {name} | " + " | ".join(shown) + " |"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
