"""Do the paper's ablations hold, in distribution and off it? Rewards trained alike but for one thing, over
seeds.

    python benchmarks/ablation.py --output RUNS --results benchmarks/results

Every reward sees the same pairs, as many steps and batches of the same size; the seed decides new weights,
order, noise levels and noise. All are measured on four sets of pairs of simulated raters, with captions that
training has not seen: pictures like those of training, of other generators, damaged, and in another style
(`dina-lrm evaluate --benchmark shapes-all`). What is counted is the expected agreement with fresh raters,
over that of the best possible reward; intervals resample captions and seeds together, the seeds of all
variants alike. One run is one process on one thread; what is done is not done again, so an interrupted
command goes on."""

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
import tyro
from record import shown, write_results

from dina_lrm import RewardModel
from dina_lrm.build.pairs import shapes_pairs, unseen_pairs
from dina_lrm.build.training import reward_model
from dina_lrm.checkpoints.config import LikelihoodConfig
from dina_lrm.data.latents import LatentPairs
from dina_lrm.evaluation.adaptive import joined_scores
from dina_lrm.evaluation.metrics import expected_correctness
from dina_lrm.recipes import training as recipes
from dina_lrm.training.config import NoiseConfig, TrainConfig
from dina_lrm.training.trainer import train
from dina_lrm.training.validation import levels_label

SETS = ("shapes", "generators", "damage", "style")
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PAPER = (0.2, 0.5, 0.7)
GROWING = (0.4, 0.2, 0.6, 0.3, 0.5, 0.1, 0.7, 0.8, 0.9)
"""Its first k are the ensemble of k levels."""
SHOWN = ((0.0,), (0.2,), (0.4,), (0.5,), (0.7,), PAPER)
"""What every reward is scored at."""
ENSEMBLES = (*((level,) for level in LEVELS), PAPER, *(GROWING[:count] for count in range(2, 10)))
"""What the rewards of `BASE` are scored at."""
BASE = "calibrated"
PAIRS_SEED, MEASURE_SEED, RESAMPLES = 9001, 0, 2000


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path
    """Folder of the pairs and of one folder a reward."""
    results: Path | None = None
    """Folder of the table; by default OUTPUT."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    variants: tuple[str, ...] = ()
    """By default all."""
    num_steps: int = 400
    batch_size: int = 48
    train_prompts: int = 1800
    """Captions of the training pairs, six pairs each."""
    test_prompts: int = 1000
    """Captions of each test set."""
    scored_prompts: int = 600
    """Of each test set, the first so many captions are scored, in bfloat16."""
    draws: int = 3
    """Noise draws at level 0.4, of the rewards of the method."""
    processes: int = 2
    """Runs at the same time, each on one thread."""


def variants() -> dict[str, TrainConfig]:
    """What is compared: the method, and the method with one thing changed."""
    base = replace(recipes.shapes(), ensemble_fraction=0.0)
    constant = replace(recipes.shapes_constant_variance(), ensemble_fraction=0.0)
    logistic = replace(recipes.shapes_bradley_terry(), ensemble_fraction=0.0)
    return {
        BASE: base,
        "constant variance": constant,
        "sigma = 0": recipes.shapes_clean(),
        "sigma = 0.4": replace(base, noise=NoiseConfig(distribution="constant", level=0.4)),
        "Bradley-Terry": logistic,
        "calibrated, log-likelihood": replace(base, loss=replace(base.loss, loss="log_likelihood")),
        "constant variance, log-likelihood": replace(
            constant, loss=replace(constant.loss, loss="log_likelihood")
        ),
        "Bradley-Terry, fidelity": replace(logistic, loss=replace(logistic.loss, loss="fidelity")),
        "frozen backbone": replace(recipes.shapes_frozen(), ensemble_fraction=0.0),
        "levels concatenated": recipes.shapes(),
    }


TRIO = "0.2+0.5+0.7"
CLAIMS: dict[str, tuple[tuple[int, str, str], ...]] = {
    "calibrated over constant variance": ((1, BASE, "0.4"), (-1, "constant variance", "0.4")),
    "the same, three levels": ((1, BASE, TRIO), (-1, "constant variance", TRIO)),
    "noise in training over sigma = 0": ((1, BASE, "0.4"), (-1, "sigma = 0", "0")),
    "uniform sigma over sigma = 0.4": ((1, BASE, "0.4"), (-1, "sigma = 0.4", "0.4")),
    "three levels over one": ((1, BASE, TRIO), (-1, BASE, "0.4")),
    "the same, trained on several levels": (
        (1, "levels concatenated", TRIO),
        (-1, "levels concatenated", "0.4"),
    ),
    "gain of three levels, calibrated over constant variance": (
        (1, BASE, TRIO),
        (-1, BASE, "0.4"),
        (-1, "constant variance", TRIO),
        (1, "constant variance", "0.4"),
    ),
    "level 0.4 over level 0": ((1, BASE, "0.4"), (-1, BASE, "0")),
    "level 0.4 over level 0.8": ((1, BASE, "0.4"), (-1, BASE, "0.8")),
    "LoRA over a frozen backbone": ((1, BASE, "0.4"), (-1, "frozen backbone", "0.4")),
    "Thurstone over Bradley-Terry": ((1, BASE, "0.4"), (-1, "Bradley-Terry, fidelity", "0.4")),
    "fidelity over log-likelihood": ((1, BASE, "0.4"), (-1, "calibrated, log-likelihood", "0.4")),
}
"""Differences in the share of the possible, as (sign, variant, levels); fixed before anything was trained."""


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    names = options.variants or tuple(variants())
    runs = [(name, seed) for seed in options.seeds for name in names]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for line in pool.imap(partial(make_pairs, options), ("train", *SETS)):
            print(line, flush=True)
        for line in pool.imap_unordered(partial(run, options), runs):
            print(line, flush=True)
    summarize(options, names)


def make_pairs(options: Options, name: str) -> str:
    file = options.output / f"{name}.safetensors"
    if not file.exists():
        torch.set_num_threads(1)
        model = reward_model(recipes.shapes().model)  # its encoders are used, its weights are not
        if name == "train":
            pairs = shapes_pairs(model, num_prompts=options.train_prompts, seed=PAIRS_SEED, part="train")
        elif name == "shapes":
            pairs = shapes_pairs(model, num_prompts=options.test_prompts, seed=PAIRS_SEED, part="test")
        else:
            pairs = unseen_pairs(model, name, num_prompts=options.test_prompts, seed=PAIRS_SEED)  # type: ignore[arg-type]
        pairs.save(file)
    return str(file)


def run(options: Options, job: tuple[str, int]) -> str:
    """Train one reward, and score all sets with it."""
    name, seed = job
    torch.set_num_threads(1)
    folder = options.output / f"{name}-{seed}"
    if not (folder / "training.json").exists():
        train_reward(options, name, seed, folder)
    model: RewardModel | None = None
    for part in SETS:
        file = folder / f"{part}.npz"
        if file.exists():
            continue
        model = model or RewardModel.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
        pairs = test_pairs(options, part)
        margins = margins_of(model, pairs, ensembles_of(name), MEASURE_SEED)
        draws = [margins[ensembles_of(name).index((0.4,))]]
        for draw in range(1, options.draws if name == BASE else 1):
            draws += list(margins_of(model, pairs, ((0.4,),), MEASURE_SEED + draw))
        with file.with_suffix(".partial").open("wb") as stream:
            np.savez_compressed(stream, margins=margins, draws=np.stack(draws))
        file.with_suffix(".partial").replace(file)
    return str(folder)


def test_pairs(options: Options, part: str) -> LatentPairs:
    pairs = LatentPairs.load(options.output / f"{part}.safetensors")
    return pairs.subset(torch.nonzero(pairs.prompt_index < options.scored_prompts).flatten())


def ensembles_of(name: str) -> tuple[tuple[float, ...], ...]:
    return ENSEMBLES if name == BASE else SHOWN


def margins_of(
    model: RewardModel, pairs: LatentPairs, ensembles: Sequence[tuple[float, ...]], seed: int
) -> np.ndarray:
    """(ensemble, pair), float32."""
    scores = joined_scores(model, pairs, ensembles, seed=seed)
    return (scores.chosen - scores.rejected).float().numpy()


def train_reward(options: Options, name: str, seed: int, folder: Path) -> None:
    base = variants()[name]
    config = replace(
        base,
        output=None,
        seed=seed,
        num_steps=options.num_steps,
        batch_size=options.batch_size,
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
    model.save_pretrained(folder)
    losses = [line.loss for line in trained.history if line.loss is not None]
    record = {"steps": trained.steps, "seconds": trained.seconds, "loss": losses}
    (folder / "training.json").write_text(json.dumps(record))


# --- what came of it ---------------------------------------------------------------------------------------


class Sums:
    """Expected agreement of every variant on one set, summed over each caption's pairs.

    Attributes:
        reached: by variant and label, (seed, caption).
        possible: (caption,), of the best reward.
    """

    def __init__(self, options: Options, names: Sequence[str], part: str) -> None:
        pairs = test_pairs(options, part)
        assert pairs.bayes is not None
        bayes = pairs.bayes.double().numpy()
        _, self.caption = np.unique(pairs.prompt_index.numpy(), return_inverse=True)
        self.possible = np.bincount(self.caption, np.maximum(bayes, 1 - bayes))
        self.reached: dict[tuple[str, str], np.ndarray] = {}
        for name in names:
            files = [options.output / f"{name}-{seed}" / f"{part}.npz" for seed in options.seeds]
            margins = np.stack([np.load(file)["margins"] for file in files])  # (seed, ensemble, pair)
            draws = np.stack([np.load(file)["draws"] for file in files])  # (seed, draw, pair)
            for row, levels in enumerate(ensembles_of(name)):
                self.add(name, levels_label(levels), margins[:, row], bayes)
            for count in range(2, draws.shape[1] + 1):
                self.add(name, f"0.4 x{count}", draws[:, :count].mean(axis=1), bayes)

    def add(self, name: str, label: str, margins: np.ndarray, bayes: np.ndarray) -> None:
        self.reached[name, label] = np.stack(
            [np.bincount(self.caption, expected_correctness(row, bayes)) for row in margins]
        )

    def share(self, name: str, label: str, seeds: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Share of the possible under each resample, (resample,)."""
        reached = self.reached[name, label]  # (seed, caption)
        by_resample = np.stack([reached[rows].mean(axis=0) for rows in seeds])
        return (by_resample * weights).sum(axis=1) / (weights @ self.possible)


SHOWN_LABELS = tuple(map(levels_label, SHOWN))


def summarize(options: Options, names: Sequence[str]) -> None:
    rng = np.random.default_rng(0)
    count = len(options.seeds)
    seeds = np.concatenate([np.arange(count)[None], rng.integers(count, size=(RESAMPLES, count))])
    rows: list[dict[str, Any]] = []
    claims: list[dict[str, Any]] = []
    for part in SETS:
        sums = Sums(options, names, part)
        captions = len(sums.possible)
        weights = np.concatenate(
            [
                np.ones((1, captions)),
                rng.multinomial(captions, np.full(captions, 1 / captions), size=RESAMPLES),
            ]
        )
        labels = dict.fromkeys(label for _, label in sums.reached)
        for label in labels:
            scored = [name for name in names if (name, label) in sums.reached]
            shares = {name: sums.share(name, label, seeds, weights) for name in scored}
            for name in scored:
                row: dict[str, Any] = {"set": part, "variant": name, "setting": label}
                row["share"] = interval(shares[name])
                row["by_seed"] = (sums.reached[name, label].sum(axis=1) / sums.possible.sum()).tolist()
                if name != BASE and BASE in shares:
                    row["minus_calibrated"] = interval(shares[name] - shares[BASE])
                row["minus_level_0"] = interval(shares[name] - sums.share(name, "0", seeds, weights))
                rows.append(row)
        for claim, terms in CLAIMS.items():
            if all(name in names for _, name, _ in terms):
                shares = [sign * sums.share(name, label, seeds, weights) for sign, name, label in terms]
                claims.append({"set": part, "claim": claim, "difference": interval(np.sum(shares, axis=0))})
    holm(claims)
    error = float(np.median([row["difference"]["error"] for row in claims])) if claims else None
    powers = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    about = {
        "steps": options.num_steps,
        "batch_size": options.batch_size,
        "train_pairs": 6 * options.train_prompts,
        "captions": options.scored_prompts,
        "comparisons": len(claims),
        # Seen with a probability of 80 % at a two-sided 5 %, one comparison taken alone.
        "smallest_detectable": None if error is None else powers * error,
    }
    folder = options.results or options.output
    text = "\n".join(table(about, rows, claims, names)) + "\n"
    print(text)
    content = {**about, "claims": claims, "rows": rows}
    write_results(folder, "ablation", content, text, seeds=options.seeds)


def interval(values: np.ndarray) -> dict[str, float]:
    """The value, its 95 % interval, and its standard error, of (value, resamples...)."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return {
        "value": float(values[0]),
        "low": float(low),
        "high": float(high),
        "error": float(values[1:].std()),
    }


def holm(rows: Sequence[dict[str, Any]]) -> None:
    """Which differences are there at 5 % over all comparisons together (Holm's step-down)."""

    def chance(row: dict[str, Any]) -> float:
        difference = row["difference"]
        return 2 * NormalDist().cdf(-abs(difference["value"]) / max(difference["error"], 1e-12))

    holds = True
    for place, row in enumerate(sorted(rows, key=chance)):
        holds = holds and chance(row) <= 0.05 / (len(rows) - place)
        row["certain"] = holds


def table(
    about: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    claims: Sequence[dict[str, Any]],
    names: Sequence[str],
) -> Iterator[str]:
    found = {(row["set"], row["variant"], row["setting"]): row for row in rows}
    yield (
        f"{about['train_pairs']} training pairs, {about['steps']} steps of {about['batch_size']}; "
        f"{about['captions']} captions in each set. Expected agreement with fresh raters in % of the best "
        "reward's, mean over seeds, 95 % intervals over captions and seeds."
    )
    for part in SETS:
        yield from header(part)
        for name in names:
            cells = [shown(found[part, name, label]["share"], "{:.1f}") for label in SHOWN_LABELS]
            yield f"| {name} | " + " | ".join(cells) + " |"
    if claims:
        yield ""
        yield (
            "Differences in points; * is one that stands after Holm's correction for all "
            f"{about['comparisons']}. One of {100 * about['smallest_detectable']:.1f} points would be seen "
            "four times in five, taken alone."
        )
        yield from ("", "| | " + " | ".join(SETS) + " |", "|---|" + "--:|" * len(SETS))
        for claim in dict.fromkeys(row["claim"] for row in claims):
            cells = [
                shown(row["difference"], "{:+.1f}") + ("*" if row["certain"] else "")
                for row in claims
                if row["claim"] == claim
            ]
            yield f"| {claim} | " + " | ".join(cells) + " |"
    yield from ("", "Minus calibrated at the same levels, in points:")
    for part in SETS:
        yield from header(part)
        for name in names:
            differences = [found[part, name, label].get("minus_calibrated") for label in SHOWN_LABELS]
            cells = [shown(difference, "{:+.1f}") for difference in differences if difference is not None]
            if cells:
                yield f"| {name} | " + " | ".join(cells) + " |"
    yield from ("", "Noise at scoring: minus level 0 of the same reward, in points:", "")
    more = (
        "0.4",
        "0.7",
        "0.2+0.5+0.7",
        *(levels_label(GROWING[:count]) for count in (3, 5, 9)),
        "0.4 x2",
        "0.4 x3",
    )
    yield "| set | variant | " + " | ".join(more) + " |"
    yield "|---|---|" + "--:|" * len(more)
    for part in SETS:
        for name in names:
            cells = [
                shown(found[part, name, label]["minus_level_0"], "{:+.1f}")
                if (part, name, label) in found
                else ""
                for label in more
            ]
            yield f"| {part} | {name} | " + " | ".join(cells) + " |"


def header(part: str) -> Iterator[str]:
    yield from (
        "",
        f"**{part}**",
        "",
        "| | " + " | ".join(SHOWN_LABELS) + " |",
        "|---|" + "--:|" * len(SHOWN),
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
