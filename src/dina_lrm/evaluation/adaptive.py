"""Learning how many levels a pair needs, and measuring what that saves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dina_lrm.checkpoints.config import AdaptiveLevels
from dina_lrm.core.adaptive import agreement_spreads, controlled_threshold, levels_taken, most_likely
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.noise import torch_seed
from dina_lrm.data.shards.read import PairSet
from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.metrics import pairwise_accuracy
from dina_lrm.evaluation.noise_sweep import PairScores, score_images
from dina_lrm.models.reward_model import RewardModel

__all__ = [
    "LevelOrder",
    "joined_scores",
    "learn_levels",
    "measure_levels",
    "order_levels",
    "stop_early",
    "stopping_rule",
]

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
NUM_LEVELS = 5
FEWEST_PAIRS = 100
"""In each half of the prompts."""
Progress = Callable[[int, int], None] | None


def joined_scores(
    model: RewardModel,
    pairs: PairSet,
    ensembles: Sequence[tuple[float, ...]],
    *,
    seed: int = 0,
    on_progress: Progress = None,
) -> PairScores:
    """Scores of every token-level ensemble; the backbone runs once at each level that any of them has.

    The same as `score_pairs` with each ensemble's levels in turn, with the same noise.
    """
    levels = tuple(dict.fromkeys(level for levels in ensembles for level in levels))

    def score(latents: Tensor, conditioning: Conditioning, noise: Tensor) -> Tensor:
        batch = len(latents)
        wanted = torch.tensor(levels, device=model.device)[:, None].expand(-1, batch)
        tokens = model.noisy_tokens(latents, conditioning, wanted, noise)
        rows = torch.arange(len(levels) * batch, device=model.device).reshape(-1, batch)
        found = []
        for members in ensembles:
            own = rows[[levels.index(level) for level in members]].flatten()
            found.append(model.score_tokens(tokens.rows(own).unfold(len(members))))
        return torch.stack(found)

    batch_size = max(1, model.max_batch_size // len(levels))
    return score_images(model, pairs, score, seed=seed, batch_size=batch_size, on_progress=on_progress)


@dataclass(frozen=True, kw_only=True)
class LevelOrder:
    """Levels in the order in which they are added, and what the votes say about each number of levels."""

    noise_levels: tuple[float, ...]
    scales: tuple[float, ...]
    """After each level, P(a preferred) = Phi(margin / scale)."""
    nats: tuple[float, ...]
    """After each level, the negative log-likelihood of a pair's votes on that scale."""
    scores: PairScores
    """Scores of the pairs that this was learned on, a row a level."""

    @property
    def ensembles(self) -> list[tuple[float, ...]]:
        """The first level, the first two, and so on."""
        return [self.noise_levels[: level + 1] for level in range(len(self.noise_levels))]

    def until_most_likely(self) -> "LevelOrder":
        """The levels up to those under which the votes are most likely: what comes later only costs."""
        count = self.nats.index(min(self.nats)) + 1
        return LevelOrder(
            noise_levels=self.noise_levels[:count],
            scales=self.scales[:count],
            nats=self.nats[:count],
            scores=PairScores(chosen=self.scores.chosen[:count], rejected=self.scores.rejected[:count]),
        )


def order_levels(
    model: RewardModel,
    pairs: PairSet,
    *,
    levels: Sequence[float] = LEVELS,
    num_levels: int = NUM_LEVELS,
    seed: int = 0,
    on_progress: Progress = None,
) -> LevelOrder:
    """Greedily: at each turn the level that, joined to those before, makes the votes most likely."""
    order: tuple[float, ...] = ()
    scales: list[float] = []
    nats: list[float] = []
    chosen: list[Tensor] = []
    rejected: list[Tensor] = []
    num_levels = min(num_levels, len(levels))
    for level in range(num_levels):
        ensembles = [(*order, level) for level in levels if level not in order]
        report = _turn(on_progress, level, num_levels)
        scores = joined_scores(model, pairs, ensembles, seed=seed, on_progress=report)
        best, found, scale = most_likely(scores.chosen - scores.rejected, pairs.target)
        order = ensembles[best]
        scales.append(scale)
        nats.append(found)
        chosen.append(scores.chosen[best])
        rejected.append(scores.rejected[best])
    return LevelOrder(
        noise_levels=order,
        scales=tuple(scales),
        nats=tuple(nats),
        scores=PairScores(chosen=torch.stack(chosen), rejected=torch.stack(rejected)),
    )


def stopping_rule(order: LevelOrder, margins: Float[Tensor, "level pair"], *, error: float) -> AdaptiveLevels:
    """When to stop along these levels.

    Args:
        margins: after each level, of pairs that the order was not learned on.
        error: share of decisions that an early stop may turn.

    Raises:
        InvalidInputError: these pairs do not show, for any early stop, that it turns so few.
    """
    learned = order.scores.chosen - order.scores.rejected
    spreads = agreement_spreads(learned)
    threshold = controlled_threshold(margins, spreads, error=error)
    if math.isinf(threshold):
        raise InvalidInputError(
            f"{margins.shape[1]} prompts do not show that any early stop turns at most {100 * error:g} % of "
            f"the decisions: more prompts are needed, or a larger share"
        )
    both = torch.cat([order.scores.chosen, order.scores.rejected], dim=1)
    return AdaptiveLevels(
        noise_levels=order.noise_levels,
        thresholds=tuple(threshold * spread for spread in spreads),
        scales=order.scales,
        offsets=tuple(both.double().mean(dim=1).tolist()),
        error=error,
        num_pairs=learned.shape[1] + margins.shape[1],
    )


def learn_levels(
    model: RewardModel,
    pairs: PairSet,
    *,
    error: float = 0.05,
    seed: int = 0,
    on_progress: Progress = None,
) -> tuple[AdaptiveLevels, dict[str, float]]:
    """The levels and when to stop, and what that saves, from pairs that nothing is tested on.

    Half of the prompts give the order of the levels and the calibration after each, the other half says when
    to stop: one pair of each prompt, since pairs of one prompt are not independent and the bound on early
    stops would be broken by them more often than it says.

    Args:
        error: share of decisions that an early stop may turn.

    Returns:
        What `compare` needs, and `measure_levels` of the second half.

    Raises:
        InvalidInputError: fewer than 100 pairs in a half, or too few prompts for this error.
    """
    first, second = pairs.split_by_prompt(0.5, seed=seed)
    if min(len(first), len(second)) < FEWEST_PAIRS:
        raise InvalidInputError(
            f"{len(pairs)} pairs of {pairs.num_prompts} prompts are too few to learn levels on: each half of "
            f"the prompts needs {FEWEST_PAIRS} pairs"
        )
    order = order_levels(model, first, seed=seed, on_progress=on_progress).until_most_likely()
    margins = joined_scores(model, second, order.ensembles, seed=seed)
    margins = margins.chosen - margins.rejected
    learned = stopping_rule(order, margins[:, one_pair_a_prompt(second, seed=seed)], error=error)
    return learned, measure_levels(learned, margins, second.target)


def one_pair_a_prompt(pairs: PairSet, *, seed: int) -> Int64[Tensor, " prompt"]:
    """A pair of each prompt, drawn at random."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(torch_seed(seed)))
    prompts, first = np.unique(pairs.prompt_index[order].numpy(), return_index=True)
    del prompts
    return order[torch.from_numpy(first)].sort().values


def measure_levels(
    levels: AdaptiveLevels, margins: Float[Tensor, "level pair"], target: Float[Tensor, " pair"]
) -> dict[str, float]:
    """What stopping early costs and saves on these pairs: mean levels, accuracies, decisions flipped."""
    taken, stopped = stop_early(levels, margins)
    return {
        "num_levels": float(taken.double().mean()),
        "accuracy": pairwise_accuracy(stopped.numpy(), target.numpy()).value,
        "accuracy_all": pairwise_accuracy(margins[-1].numpy(), target.numpy()).value,
        "flipped": float((stopped.sign() != margins[-1].sign()).double().mean()),
    }


def stop_early(
    levels: AdaptiveLevels, margins: Float[Tensor, "level pair"]
) -> tuple[Int64[Tensor, " pair"], Float[Tensor, " pair"]]:
    """How many levels each pair takes, and its margin then."""
    taken = levels_taken(margins, levels.thresholds)
    return taken, margins.gather(0, taken[None] - 1)[0]


def _turn(on_progress: Progress, turn: int, turns: int) -> Progress:
    """Progress of one turn of several, as a part of the whole."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(turn * total + done, turns * total)
