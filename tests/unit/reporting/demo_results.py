"""Invented results of a demo, for the report's tests: plausible figures, pictures of one colour each."""

import numpy as np
import torch
from PIL import Image, ImageDraw

from dina_lrm.data.latents import LatentPairs
from dina_lrm.evaluation.benchmarks import BayesReference, EvaluationResult
from dina_lrm.evaluation.metrics import Interval
from dina_lrm.evaluation.noise_sweep import PairScores, Setting, measure
from dina_lrm.reporting.demo_results import DemoResults, JudgedPicture, LearningCurve, MeasuredReward, Ranking

CAPTIONS = (
    "a red circle on a gray background",
    "a large blue square left of a small green star on a white background",
    "two yellow triangles on a black background",
)


def make_demo_results(*, seed: int = 0) -> DemoResults:
    rng = np.random.default_rng(seed)
    pairs = make_pairs(rng)
    return DemoResults(
        samples=[(CAPTIONS[number % 3], make_picture(rng)) for number in range(12)],
        rankings=[make_ranking(caption, rng) for caption in CAPTIONS],
        curve=LearningCurve(
            steps=list(range(2, 400, 2)),
            accuracy=[
                0.5 + 0.25 * (1 - np.exp(-step / 120)) + 0.08 * rng.normal() for step in range(2, 400, 2)
            ],
            validation_steps=[100, 200, 300, 398],
            validation_accuracy={
                "0.2": [0.6, 0.67, 0.7, 0.72],
                "0.4": [0.62, 0.69, 0.72, 0.735],
                "0.7": [0.58, 0.63, 0.66, 0.67],
            },
        ),
        shipped=MeasuredReward(
            label="shipped",
            result=make_result(pairs, rng, quality=2.5),
            trainable_parameters=1_234_567,
        ),
        fresh=MeasuredReward(
            label="fresh",
            result=make_result(pairs, rng, quality=0.8),
            trainable_parameters=1_234_567,
            num_train_pairs=4200,
            train_seconds=70.3,
        ),
        stages=[("generating pictures", 41.2, "52 pictures"), ("training from scratch", 70.3, "398 steps")],
        milliseconds_per_score=23.4,
        peak_memory_bytes=1_700_000_000,
        environment="2 cores, x86_64, Python 3.11.7, torch 2.13.0, seed 0",
    )


def make_pairs(rng: np.random.Generator, *, num_prompts: int = 60, pairs_per_prompt: int = 4) -> LatentPairs:
    """Pairs whose true log-odds are known; latents are irrelevant here."""
    num = num_prompts * pairs_per_prompt
    bayes = torch.tensor(rng.beta(4, 1.2, num), dtype=torch.float32)
    return LatentPairs(
        latents=torch.zeros(2, 1, 2, 2),
        prompts=[f"caption {number}" for number in range(num_prompts)],
        prompt_embeds=torch.zeros(num_prompts, 1, 1),
        prompt_index=torch.arange(num_prompts).repeat_interleave(pairs_per_prompt),
        chosen=torch.zeros(num, dtype=torch.int64),
        rejected=torch.ones(num, dtype=torch.int64),
        target=torch.tensor(rng.binomial(5, bayes.numpy()) / 5, dtype=torch.float32),
        bayes=bayes,
    )


def make_result(pairs: LatentPairs, rng: np.random.Generator, *, quality: float) -> EvaluationResult:
    """Scores whose margin is the truth times `quality`, less away from sigma = 0.4, plus unit noise."""
    assert pairs.bayes is not None
    truth = torch.special.ndtri(pairs.bayes.double().clamp(0.02, 0.98))

    def scores(level: float, bonus: float = 1.0) -> PairScores:
        strength = quality * bonus * (1 - 1.1 * abs(level - 0.4))
        margin = strength * truth + torch.tensor(rng.normal(size=len(pairs)))
        return PairScores(chosen=margin.float()[None], rejected=torch.zeros(1, len(pairs)))

    sweep = [
        measure(Setting(noise_levels=(level,)), scores(level), pairs) for level in (0.05, 0.2, 0.4, 0.6, 0.8)
    ]
    levels = (0.2, 0.5, 0.7)
    tokens = measure(Setting(noise_levels=levels), scores(0.4, 1.2), pairs)
    means = measure(Setting(noise_levels=levels, combine="scores"), scores(0.4, 1.1), pairs)
    return EvaluationResult(
        benchmark="shapes",
        model="bundled",
        num_pairs=len(pairs),
        num_prompts=pairs.num_prompts,
        num_rater_ties=0,
        seed=0,
        ties="wrong",
        default=sweep[2],
        sweep=sweep,
        ensembles=[tokens, means],
        draws=[],
        bayes=BayesReference(
            accuracy=Interval(value=0.86, low=0.83, high=0.89),
            expected_accuracy=Interval(value=0.85, low=0.84, high=0.86),
        ),
        seconds=12.0,
        scores={},
        pairs=pairs,
    )


def make_ranking(caption: str, rng: np.random.Generator) -> Ranking:
    utilities = np.sort(rng.uniform(0.2, 1, 8))[::-1] + 0.15 * rng.normal(size=8)
    pictures = [
        JudgedPicture(
            image=make_picture(rng),
            made_with=f"{(20, 12, 8, 5)[number // 2]} steps, guidance 4",
            score=2.0 - 0.5 * number,
            utility=float(np.clip(utility, 0, 1)),
            full_match=bool(utility > 0.7),
        )
        for number, utility in enumerate(utilities)
    ]
    return Ranking(caption=caption, pictures=pictures)


def make_picture(rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (64, 64), tuple(int(c) for c in rng.integers(120, 230, 3)))
    left, top = (int(value) for value in rng.integers(4, 30, 2))
    ImageDraw.Draw(image).ellipse(
        (left, top, left + 28, top + 28), fill=tuple(int(c) for c in rng.integers(0, 255, 3))
    )
    return image
