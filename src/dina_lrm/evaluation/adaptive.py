"""Learning how many views a pair needs, and measuring what that saves."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dina_lrm.core.adaptive import ViewPlan, controlled_threshold, fit_views, plan_views, stopping_views
from dina_lrm.core.calibration import fit_scale
from dina_lrm.data.latents import LatentPairs, mix_seeds
from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.metrics import pairwise_accuracy
from dina_lrm.evaluation.noise_sweep import PairScores, Setting, score_pairs
from dina_lrm.models.config import AdaptiveViews
from dina_lrm.models.reward_model import RewardModel

__all__ = ["learn_views", "measure_views", "view_scores", "views_along"]

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
NUM_VIEWS = 9
FEWEST_PAIRS = 200


def view_scores(
    model: RewardModel,
    pairs: LatentPairs,
    levels: Sequence[float],
    *,
    num_draws: int = 2,
    seed: int = 0,
    batch_size: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[PairScores]:
    """Scores of every pair at every level, over noise draws that are independent from level to level."""
    found = []
    for index, level in enumerate(levels):

        def report(done: int, total: int, index: int = index) -> None:
            if on_progress is not None:
                on_progress(index * total + done, len(levels) * total)

        setting = Setting(noise_levels=(level,), num_draws=num_draws)
        own_seed = mix_seeds(seed, 8, index)
        found.append(
            score_pairs(model, pairs, setting, seed=own_seed, batch_size=batch_size, on_progress=report)
        )
    return found


def learn_views(
    scores: Sequence[PairScores],
    levels: Sequence[float],
    target: Tensor,
    *,
    num_views: int = NUM_VIEWS,
    error: float = 0.05,
) -> tuple[AdaptiveViews, ViewPlan]:
    """The sequence of views, when to stop, and the calibration after it, from held-out pairs.

    Args:
        scores: from `view_scores`, by level: at least two draws.
        target: (pair,) share of votes for `chosen`.
        error: share of decisions that an early stop may turn.

    Raises:
        InvalidInputError: fewer than 200 pairs.
    """
    if len(target) < FEWEST_PAIRS:
        raise InvalidInputError(
            f"{len(target)} pairs are too few to learn views on: {FEWEST_PAIRS} are needed"
        )
    margins = torch.stack([one.chosen - one.rejected for one in scores], dim=1).double()
    plan = plan_views(fit_views(margins, target), num_views, max_repeats=len(margins))
    along = views_along(margins, plan)
    threshold = controlled_threshold(plan, along, error=error)
    threshold = min(threshold, 1e6)  # no early stop passed: never stop early
    offsets = [float(torch.cat([one.chosen, one.rejected]).mean()) for one in scores]
    order = plan.levels.tolist()
    learned = AdaptiveViews(
        noise_levels=tuple(levels[level] for level in order),
        gains=tuple(tuple(plan.gains[view, : view + 1].tolist()) for view in range(num_views)),
        deviations=tuple(plan.deviations.tolist()),
        offsets=tuple(offsets[level] for level in order),
        threshold=threshold,
        error=error,
        scale=fit_scale(plan.means(along)[-1], target.double()),
        num_pairs=len(target),
    )
    return learned, plan


def views_along(margins: Tensor, plan: ViewPlan) -> Tensor:
    """(view, pair): margins in the order of the plan; a level that comes again takes its next draw.

    Args:
        margins: (draw, level, pair).
    """
    taken = dict.fromkeys(range(margins.shape[1]), 0)
    views = []
    for level in plan.levels.tolist():
        views.append(margins[taken[level], level])
        taken[level] += 1
    return torch.stack(views)


def measure_views(
    scores: Sequence[PairScores], plan: ViewPlan, threshold: float, pairs: LatentPairs
) -> dict[str, float]:
    """What stopping early costs and saves on these pairs: mean views, accuracies, decisions turned."""
    margins = torch.stack([one.chosen - one.rejected for one in scores], dim=1).double()
    along = views_along(margins, plan)
    means = plan.means(along)
    views = stopping_views(plan.certainty(along), threshold)
    stopped = means.gather(0, views[None] - 1)[0]
    target = pairs.target.numpy()
    return {
        "views": float(views.double().mean()),
        "accuracy": pairwise_accuracy(stopped.numpy(), target).value,
        "accuracy_all": pairwise_accuracy(means[-1].numpy(), target).value,
        "turned": float((stopped.sign() != means[-1].sign()).double().mean()),
    }
