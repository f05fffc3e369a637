"""`dina-lrm demo`: the whole story on this machine, offline, in at most five minutes on two cores.

Generate pictures, train a reward from scratch, measure it beside the shipped one, rank new pictures, ask the
gold judge, write one HTML file. The seconds are spent by budget, so a slower machine trains for fewer steps
and not for longer.
"""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dina_lrm.cli.console import UsageError, log, log_validation, print_json, print_table, stderr
from dina_lrm.cli.options import JsonFlag, parse

if TYPE_CHECKING:
    from dina_lrm import RewardModel
    from dina_lrm.data.latents import LatentPairs
    from dina_lrm.reporting.demo_results import DemoResults, LearningCurve, MeasuredReward, Ranking
    from dina_lrm.training.config import TrainConfig

SAMPLERS = ((20, 4.0), (20, 4.0), (20, 4.0), (12, 4.0), (12, 2.0), (8, 4.0), (8, 1.5), (5, 3.0))
"""Steps and guidance for one caption: good ones and, so that a ranking means something, worse ones."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Generate, train, measure and rank, offline; writes one HTML report."""

    output: Path = Path("runs/demo")
    """Folder that receives report.html, results.json and the freshly trained reward."""
    train_seconds: float = 90.0
    """Time for training, evaluation not counted."""
    train_prompts: int = 130
    """Number of captions that training pairs are made of."""
    test_prompts: int = 80
    """Number of captions, with new pictures and votes, that both rewards are measured on."""
    num_samples: int = 12
    """Number of pictures in the first gallery."""
    num_rankings: int = 5
    """Number of captions whose pictures are ranked."""
    seed: int = 0
    """Seed of captions, pictures, votes and training."""
    as_json: JsonFlag = False
    """Print one JSON object instead of a table."""


@dataclass
class Stopwatch:
    """Seconds by stage, announced as they pass."""

    stages: list[tuple[str, float, str]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Time what happens inside; the list it yields takes the amount, such as "40 pictures"."""
        amount: list[str] = []
        started = time.perf_counter()
        with stderr().status(f"{name} ...") if sys.stderr.isatty() else stderr_line(name):
            yield amount
        seconds = time.perf_counter() - started
        self.stages.append((name, seconds, ", ".join(amount)))
        log(f"{name}: {seconds:.1f} s" + (f" ({amount[0]})" if amount else ""))


@contextmanager
def stderr_line(_: str) -> Iterator[None]:
    yield


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] == "pictures":
        from dina_lrm.cli import demo_pictures

        return demo_pictures.main(arguments[1:])
    options = parse(Demo, "demo", arguments)
    for name in ("train_prompts", "test_prompts", "num_samples", "num_rankings"):
        if getattr(options, name) < 2:
            raise UsageError(f"--{name.replace('_', '-')} is at least 2; got {getattr(options, name)}")
    if options.train_seconds <= 0:
        raise UsageError(f"--train-seconds is above 0; got {options.train_seconds:g}")
    from dina_lrm.reporting.demo import build_report
    from dina_lrm.reporting.html import write_html

    results = run_demo(options)
    report = options.output / "report.html"
    write_html(build_report(results), report)
    summary = summarize(results)
    (options.output / "results.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    if options.as_json:
        print_json({"report": str(report), **summary})
        return 0
    rows = [
        [
            str(row["reward"]),
            str(row["noise_levels"]),
            f"{100 * row['accuracy']:.1f}%",
            "-" if row["share_of_bayes"] is None else f"{100 * row['share_of_bayes']:.1f}%",
        ]
        for row in summary["rewards"]
    ]
    print_table(["reward", "noise level", "accuracy", "of Bayes-optimal"], rows, text_columns=2)
    log(f"report: {report}  ({summary['seconds']:.0f} s)")
    return 0


def run_demo(options: Demo) -> "DemoResults":
    """Everything that is measured and made; no page yet."""
    import torch

    from dina_lrm.evaluation.benchmarks import EvaluationResult, evaluate_latent_pairs
    from dina_lrm.reporting.demo_results import DemoResults, MeasuredReward

    watch = Stopwatch()
    with watch.stage("loading the libraries and the bundled models") as amount:
        from dina_lrm import RewardModel
        from dina_lrm.shapes.pipeline import load_pipeline

        pipeline = load_pipeline()
        shipped = RewardModel.from_pretrained("bundled", pipeline=pipeline)
        amount.append("generator and reward")
    captions = demo_captions(max(options.num_samples, options.num_rankings), seed=options.seed)
    with watch.stage("generating pictures") as amount:
        samples, groups = generate_pictures(pipeline, captions, options)
        amount.append(f"{len(samples) + sum(map(len, groups))} pictures")
    with watch.stage("making and encoding pairs") as amount:
        train_pairs, validation_pairs, test_pairs = make_pairs(pipeline, shipped, options)
        amount.append(f"{len(train_pairs) + len(validation_pairs) + len(test_pairs):,} pairs")
    with watch.stage("training from scratch") as amount:
        fresh, curve, seconds = train_fresh(pipeline, train_pairs, validation_pairs, options)
        amount.append(f"{curve.steps[-1]:,} steps")
    measured: list[EvaluationResult] = []
    for model, label in ((shipped, "shipped"), (fresh, "fresh")):
        with watch.stage(f"measuring the {label} reward") as amount:
            result = evaluate_latent_pairs(
                model, test_pairs, noise_levels=(0.05, 0.2, 0.4, 0.5, 0.7, 0.85), seed=options.seed
            )
            amount.append(f"{len(test_pairs):,} pairs, {len(result.settings)} settings")
            measured.append(result)
    with watch.stage("ranking and judging pictures") as amount:
        rankings = rank_pictures(shipped, captions, groups)
        amount.append(f"{sum(len(ranking.pictures) for ranking in rankings)} pictures")
    return DemoResults(
        samples=samples,
        rankings=rankings,
        curve=curve,
        shipped=MeasuredReward(
            label="shipped",
            result=measured[0],
            trainable_parameters=trained_parameters(shipped),
        ),
        fresh=MeasuredReward(
            label="fresh",
            result=measured[1],
            trainable_parameters=trained_parameters(fresh),
            num_train_pairs=len(train_pairs),
            train_seconds=seconds,
        ),
        stages=watch.stages,
        milliseconds_per_score=time_one_score(shipped, test_pairs),
        peak_memory_bytes=peak_memory_bytes(),
        environment=f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, seed {options.seed}",
    )


# --- stages ------------------------------------------------------------------------------------------------


def demo_captions(count: int, *, seed: int) -> list[str]:
    """Different captions of one and two objects, in turn."""
    import numpy as np

    from dina_lrm.shapes.scenes import sample_caption

    rng = np.random.default_rng([seed, 7])
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[sample_caption(rng, num_objects=2 if len(captions) % 2 else 1).caption] = None
    return list(captions)


def generate_pictures(
    pipeline: Any, captions: Sequence[str], options: Demo
) -> tuple[list[tuple[str, Any]], list[list[tuple[str, Any]]]]:
    """The first gallery, and for each ranked caption its pictures with the settings they were made with."""
    from dina_lrm.shapes.pipeline import generate

    first = list(captions[: options.num_samples])
    seeds = [1000 * options.seed + number for number in range(len(first))]
    pictures = generate(pipeline, first, seeds, num_inference_steps=20, guidance_scale=4.0)
    samples = list(zip(first, pictures, strict=True))
    ranked = list(captions[: options.num_rankings])
    groups: list[list[tuple[str, Any]]] = [[] for _ in ranked]
    for setting, (steps, guidance) in enumerate(dict.fromkeys(SAMPLERS)):  # one batch for each
        repeats = SAMPLERS.count((steps, guidance))
        batch = [caption for caption in ranked for _ in range(repeats)]
        seeds = [1000 * (options.seed + 1) + 100 * setting + number for number in range(len(batch))]
        pictures = generate(pipeline, batch, seeds, num_inference_steps=steps, guidance_scale=guidance)
        for number, picture in enumerate(pictures):
            groups[number // repeats].append((f"{steps} steps, guidance {guidance:g}", picture))
    return samples, groups


def make_pairs(
    pipeline: Any, model: "RewardModel", options: Demo
) -> "tuple[LatentPairs, LatentPairs, LatentPairs]":
    """Training, validation and test pairs: other pictures and votes in each, captions drawn anew."""
    from dina_lrm.shapes.pairs import make_shapes_pairs

    num_validation = min(max(options.train_prompts // 7, 20), options.train_prompts)
    sizes = (options.train_prompts, num_validation, options.test_prompts)
    made = [
        make_shapes_pairs(pipeline, num_prompts=size, seed=1_000_003 * (options.seed + 1) + number)
        for number, size in enumerate(sizes)
    ]
    train, validation, test = (pairs.to_latents(model) for pairs in made)
    return train, validation, test


def train_fresh(
    pipeline: Any, train_pairs: "LatentPairs", validation_pairs: "LatentPairs", options: Demo
) -> "tuple[RewardModel, LearningCurve, float]":
    """A reward from a random head, trained until the time is up; with its curve and the seconds it took."""
    from dina_lrm import RewardModel
    from dina_lrm.reporting.demo_results import LearningCurve
    from dina_lrm.training.trainer import train

    config = demo_recipe(options, len(train_pairs))
    model = RewardModel.initialize(
        pipeline,
        num_blocks=config.model.num_blocks,
        image_taps=config.model.image_taps,
        text_taps=config.model.text_taps,
        lora_rank=config.model.lora_rank,
        seed=options.seed,
    )
    result = train(config, model, train_pairs, validation_pairs, on_step=log_validation)
    training = [entry for entry in result.history if entry.accuracy is not None]
    validation = [entry for entry in result.history if entry.validation]
    curve = LearningCurve(
        steps=[entry.step for entry in training],
        accuracy=[entry.accuracy for entry in training if entry.accuracy is not None],
        validation_steps=[entry.step for entry in validation],
        validation_accuracy={
            level: [(entry.validation or {}).get(level, math.nan) for entry in validation]
            for level in (validation[0].validation or {} if validation else {})
        },
    )
    return model, curve, result.seconds


def demo_recipe(options: Demo, num_pairs: int) -> "TrainConfig":
    """The quick recipe within the demo's time, with a point of the curve every few seconds; a batch is never
    larger than there are pairs."""
    from dina_lrm.core.precision import faster_precision
    from dina_lrm.recipes.training import shapes_quick

    base = shapes_quick()
    return replace(
        base,
        output=str(options.output / "reward"),
        seed=options.seed,
        batch_size=min(base.batch_size, num_pairs),
        time_budget_seconds=options.train_seconds,
        num_steps=2000,
        optimizer=replace(base.optimizer, warmup_steps=10),
        validation=replace(base.validation, every=20),
        precision=faster_precision("cpu"),
        log_every=2,
        checkpoint_every=2000,
        tensorboard=False,
    )


def rank_pictures(
    model: "RewardModel", captions: Sequence[str], groups: Sequence[Sequence[tuple[str, Any]]]
) -> "list[Ranking]":
    """Each caption's pictures in the reward's order, with the gold judge's opinion."""
    from dina_lrm.reporting.demo_results import JudgedPicture, Ranking
    from dina_lrm.scaling.settings import Viewing
    from dina_lrm.shapes.judge import judge

    rankings: list[Ranking] = []
    for caption, group in zip(captions, groups, strict=False):
        images = [image for _, image in group]
        levels = Viewing().levels(model.config.noise_levels)
        output = model.score([caption] * len(images), images, noise_levels=levels, seed=0)
        pictures: list[JudgedPicture] = []
        for (made_with, image), score in zip(group, output.scores.tolist(), strict=True):
            opinion = judge(image, caption)
            pictures.append(
                JudgedPicture(
                    image=image,
                    made_with=made_with,
                    score=score,
                    utility=float(opinion.utility),
                    full_match=bool(opinion.full_match),
                )
            )
        pictures.sort(key=lambda picture: -picture.score)
        rankings.append(Ranking(caption=caption, pictures=pictures))
    return rankings


# --- figures -----------------------------------------------------------------------------------------------


def trained_parameters(model: "RewardModel") -> int:
    return sum(parameter.numel() for parameter in model.trainable_parameters())


def time_one_score(model: "RewardModel", pairs: "LatentPairs", *, repeats: int = 10) -> float:
    """Milliseconds for one latent at one noise level: the median of a few, the first not counted."""
    import torch

    from dina_lrm import Conditioning

    def row(table: torch.Tensor | None) -> torch.Tensor | None:
        return None if table is None else table[:1].float()

    embeds = row(pairs.prompt_embeds)
    assert embeds is not None
    conditioning = Conditioning(
        prompt_embeds=embeds,
        pooled_prompt_embeds=row(pairs.pooled_prompt_embeds),
        attention_mask=None if pairs.attention_mask is None else pairs.attention_mask[:1],
    )
    latents = pairs.latents[:1].float()
    seconds: list[float] = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            model.score_latents(latents, conditioning, noise_levels=[0.4], seed=0)
            seconds.append(time.perf_counter() - started)
    return 1000 * sorted(seconds[1:])[repeats // 2]


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def summarize(results: "DemoResults") -> dict[str, Any]:
    """The figures of the report, for programs."""
    from dina_lrm.reporting.demo_results import best_of_group, rank_correlation

    def summary_of(reward: "MeasuredReward") -> dict[str, Any]:
        default = reward.result.default
        return {
            "reward": reward.label,
            "noise_levels": default.setting.label,
            "accuracy": default.accuracy.value,
            "share_of_bayes": default.expected_bayes_share.value if default.expected_bayes_share else None,
            "evaluation": reward.result.to_dict(),
        }

    mean, chosen, best = best_of_group(results.rankings)
    return {
        "rewards": [summary_of(results.shipped), summary_of(results.fresh)],
        "best_of_group": {"mean": mean, "reward": chosen, "judge": best},
        "kendall_tau": rank_correlation(results.rankings),
        "milliseconds_per_score": results.milliseconds_per_score,
        "peak_memory_bytes": results.peak_memory_bytes,
        "seconds": sum(seconds for _, seconds, _ in results.stages),
        "stages": [
            {"name": name, "seconds": seconds, "amount": amount} for name, seconds, amount in results.stages
        ],
        "environment": results.environment,
    }
