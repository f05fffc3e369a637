"""The same pairs scored in different ways: one noise level, several at once, several draws.

A setting says how one number per image is made: which levels, joined as tokens (the head runs once on all of
them) or as an average of scores, and over how many noise draws. Every image of a prompt gets the same noise,
so both sides of every pair do, as in training, and an image that is in many pairs is scored once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.ensemble import average_levels
from dina_lrm.core.noise import seeded_noise, torch_seed
from dina_lrm.core.seeds import mix_seeds
from dina_lrm.data.order import first_occurrences
from dina_lrm.data.shards.read import PairSet
from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.metrics import (
    Interval,
    Reliability,
    Ties,
    agreement,
    cluster_bootstrap,
    expected_correctness,
    pair_correctness,
    pairwise_accuracy,
    reliability,
)
from dina_lrm.models.reward_model import RewardModel

__all__ = ["PairScores", "Setting", "SettingResult", "measure", "noise_sweep", "score_pairs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One way of making a score."""

    noise_levels: tuple[float, ...]
    """sigma in [0, 1]."""
    combine: Literal["tokens", "scores"] = "tokens"
    """Several levels: concatenate their tokens, or average their scores. No effect on one level."""
    num_draws: int = 1
    """Noise draws whose scores are averaged."""

    def __post_init__(self) -> None:
        if self.num_draws < 1:
            raise InvalidInputError(f"num_draws = {self.num_draws}: must be at least 1")

    @property
    def label(self) -> str:
        """Short and unique: "0.4", "0.2+0.5+0.7", "mean(0.2, 0.5)", "0.4 x4".

        >>> Setting(noise_levels=(0.2, 0.5), combine="scores", num_draws=4).label
        'mean(0.2, 0.5) x4'
        """
        levels = [f"{level:g}" for level in self.noise_levels]
        joined = len(levels) == 1 or self.combine == "tokens"
        label = "+".join(levels) if joined else f"mean({', '.join(levels)})"
        return label + (f" x{self.num_draws}" if self.num_draws > 1 else "")

    @property
    def passes(self) -> int:
        """Backbone passes per image: what a score costs."""
        return len(self.noise_levels) * self.num_draws


@dataclass(frozen=True, kw_only=True, slots=True)
class PairScores:
    """Scores of both sides of every pair, one row per noise draw or per way of scoring."""

    chosen: Float[Tensor, "draw pair"]
    rejected: Float[Tensor, "draw pair"]

    @property
    def margin(self) -> Float[Tensor, " pair"]:
        """score_chosen - score_rejected, each averaged over the draws."""
        return (self.chosen - self.rejected).mean(dim=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingResult:
    """What a setting achieves."""

    setting: Setting
    accuracy: Interval
    """Against the votes; the interval resamples prompts."""
    num_pairs: int
    """Pairs in the denominator."""
    num_score_ties: int
    """Pairs on which both sides have the same score, counted by the policy of the evaluation."""
    expected_accuracy: Interval | None
    """Probability of agreeing with a fresh rater, where the raters' distribution is known."""
    bayes_share: Interval | None
    """Accuracy over that of the Bayes-optimal rule on the same votes, where the raters' distribution is
    known."""
    expected_bayes_share: Interval | None
    """Expected accuracy over that of the Bayes-optimal rule: the same without the luck of the votes."""
    reliability: Reliability
    """Calibration on these pairs, by the model's own scale where it has one for the setting, and else by
    scales fitted to the other half of the prompts."""
    draw_agreement: float | None
    """Probability that two noise draws prefer the same side; None for one draw."""
    draw_spread: float | None
    """Standard deviation of the margin over draws, as a fraction of that over pairs; None for one draw."""


ScoreImages = Callable[[Tensor, Conditioning, Tensor], Float[Tensor, "way image"]]
"""Scores of latents, with a row of conditioning and a noise sample each, made in one or more ways."""


def score_pairs(
    model: RewardModel,
    pairs: PairSet,
    setting: Setting,
    *,
    seed: int = 0,
    batch_size: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
) -> PairScores:
    """Score both sides of every pair.

    Args:
        seed: noise follows from (seed, draw, the prompt's row), so subsets and batch sizes change nothing.
        batch_size: images per call.
        on_progress: called with (images done, images in all).
    """

    def score(latents: Tensor, conditioning: Conditioning, noise: Tensor) -> Tensor:
        def at(levels: list[float]) -> Tensor:
            return model.score_latents(latents, conditioning, noise_levels=levels, noise=noise)

        if setting.combine == "tokens":
            return at(list(setting.noise_levels))[None]
        return average_levels(torch.stack([at([level]) for level in setting.noise_levels]))[None]

    draws = []
    for draw in range(setting.num_draws):

        def report(done: int, total: int, draw: int = draw) -> None:
            if on_progress is not None:
                on_progress(draw * total + done, setting.num_draws * total)

        draws.append(
            score_images(model, pairs, score, seed=seed, draw=draw, batch_size=batch_size, on_progress=report)
        )
    return PairScores(
        chosen=torch.cat([one.chosen for one in draws]), rejected=torch.cat([one.rejected for one in draws])
    )


@torch.no_grad()
def score_images(
    model: RewardModel,
    pairs: PairSet,
    score: ScoreImages,
    *,
    seed: int,
    draw: int = 0,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> PairScores:
    """Both sides of every pair under one noise draw; one row for each way in which `score` makes scores.

    Args:
        seed, draw, batch_size, on_progress: as in `score_pairs`.
    """
    for pair in pairs.examples:
        latents, conditioning = _sides(pairs, pair[None], torch.zeros(1, dtype=torch.bool))
        model.check_inputs(latents, conditioning, pairs.latent_space)
    # Every picture of a prompt once, as the side of the first pair that it is in.
    sides = torch.stack([torch.cat([pairs.chosen, pairs.rejected]), pairs.prompt_index.repeat(2)], dim=1)
    first, position = first_occurrences(sides)
    parts: list[Tensor] = []
    rows: list[Tensor] = []
    for own in _of_one_shape(pairs, first % len(pairs)):
        for some in own.split(batch_size):
            pair, is_rejected = first[some] % len(pairs), first[some] >= len(pairs)
            latents, conditioning = _sides(pairs, pair, is_rejected)
            prompts = pairs.prompt_index[pair].tolist()
            seeds = [torch_seed(mix_seeds(seed, draw, prompt)) for prompt in prompts]
            noise = seeded_noise(tuple(latents.shape[1:]), seeds)[0]
            latents = latents.to(model.device, model.dtype)
            conditioning = conditioning.to(model.device, model.dtype)
            parts.append(score(latents, conditioning, noise.to(model.device)).float().cpu())
            rows.append(some)
            if on_progress is not None:
                on_progress(sum(map(len, rows)), len(first))
    order = torch.cat(rows).argsort()
    chosen, rejected = torch.cat(parts, dim=1)[:, order][:, position].chunk(2, dim=1)
    return PairScores(chosen=chosen, rejected=rejected)


def _of_one_shape(pairs: PairSet, pair: Tensor) -> list[Tensor]:
    """Positions in `pair`, by the latent shape of these pairs."""
    everything = torch.arange(len(pairs))
    shape = torch.empty(len(pairs), dtype=torch.int64)
    for number, own in enumerate(pairs.parts(everything, len(pairs))):
        shape[own] = number
    return [(shape[pair] == number).nonzero().flatten() for number in shape[pair].unique().tolist()]


def _sides(pairs: PairSet, pair: Tensor, is_rejected: Tensor) -> tuple[Tensor, Conditioning]:
    """One side of each of these pairs, all of one shape, and its conditioning."""
    batch = pairs.batch(pair)
    latents = batch.latents_chosen.clone()
    latents[is_rejected] = batch.latents_rejected[is_rejected]
    return latents, Conditioning(batch.prompt_embeds, batch.pooled_prompt_embeds, batch.attention_mask)


def measure(
    setting: Setting,
    scores: PairScores,
    pairs: PairSet,
    *,
    ties: Ties = "wrong",
    scale: float | None = None,
) -> SettingResult:
    """Turn scores into accuracy, shares of the optimum, calibration and stability.

    Args:
        ties: what equal scores count as.
        scale: of the model's own calibration, to be tested on these pairs; None fits one to half of the
            prompts and tests it on the other half, both ways.
    """
    margin = scores.margin.double().numpy()
    target = pairs.target.double().numpy()
    prompts = pairs.prompt_index.numpy()
    correct = pair_correctness(margin, target, ties=ties)
    counts = pairwise_accuracy(margin, target, ties=ties)
    expected = bayes_share = expected_share = None
    if pairs.bayes is not None:
        bayes = pairs.bayes.double().numpy()
        expected_correct = expected_correctness(margin, bayes)
        optimal = pair_correctness(bayes - 0.5, target, ties="half")
        expected = cluster_bootstrap(expected_correct, prompts)
        bayes_share = cluster_bootstrap(correct, prompts, reference=optimal)
        expected_share = cluster_bootstrap(expected_correct, prompts, reference=np.maximum(bayes, 1 - bayes))
    margins = (scores.chosen - scores.rejected).double().numpy()
    several = len(margins) > 1
    return SettingResult(
        setting=setting,
        accuracy=cluster_bootstrap(correct, prompts),
        num_pairs=counts.num_pairs,
        num_score_ties=counts.num_score_ties,
        expected_accuracy=expected,
        bayes_share=bayes_share,
        expected_bayes_share=expected_share,
        reliability=reliability(margin, target, scale=scale, prompts=prompts),
        draw_agreement=agreement(margins) if several else None,
        draw_spread=float(margins.std(axis=0, ddof=1).mean() / max(margin.std(), 1e-12)) if several else None,
    )


def noise_sweep(
    model: RewardModel,
    pairs: PairSet,
    settings: Sequence[Setting],
    *,
    seed: int = 0,
    batch_size: int = 128,
    ties: Ties = "wrong",
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[SettingResult], dict[str, PairScores]]:
    """Score and measure several settings on the same pairs with the same noise.

    Score averages are made from single-level scores, which are computed once however many settings use them.
    Where the model has a calibration for exactly the levels of a setting, that scale is tested; elsewhere
    one is fitted to half of the prompts and tested on the other half.

    Returns:
        One result per setting, in order, and all scores by label.
    """
    if not settings:
        raise ValueError("a sweep needs at least one setting")
    basis = list(dict.fromkeys(part for setting in settings for part in _parts(setting)))
    total = sum(part.passes for part in basis)
    scores: dict[str, PairScores] = {}
    done = 0
    for part in basis:

        def report(now: int, all_images: int, part: Setting = part, done: int = done) -> None:
            if on_progress is not None:
                on_progress(done * all_images + part.passes * now, total * all_images)

        scores[part.label] = score_pairs(
            model, pairs, part, seed=seed, batch_size=batch_size, on_progress=report if on_progress else None
        )
        done += part.passes
    for setting in settings:
        parts = [scores[part.label] for part in _parts(setting)]
        scores[setting.label] = PairScores(
            chosen=torch.stack([part.chosen for part in parts]).mean(dim=0),
            rejected=torch.stack([part.rejected for part in parts]).mean(dim=0),
        )
    results = []
    for setting in settings:
        stored = model.config.calibration_at(setting.noise_levels) if setting.combine == "tokens" else None
        scale = None if stored is None else stored.scale
        results.append(measure(setting, scores[setting.label], pairs, ties=ties, scale=scale))
    return results, {setting.label: scores[setting.label] for setting in settings}


def _parts(setting: Setting) -> list[Setting]:
    """The settings whose scores are averaged to give this one: itself, or one per level."""
    if setting.combine == "tokens":
        return [setting]
    return [Setting(noise_levels=(level,), num_draws=setting.num_draws) for level in setting.noise_levels]
