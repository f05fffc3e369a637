"""Comparing with as many views as a pair needs, and no more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dina_lrm.core.adaptive import stein_draws
from dina_lrm.core.ensemble import mean_and_standard_error
from dina_lrm.core.likelihood import win_probability
from dina_lrm.core.noise import seeded_noise
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.config import AdaptiveViews
from dina_lrm.models.scoring import RankedImage, ScoreOutput

if TYPE_CHECKING:
    from dina_lrm.models.reward_model import RewardModel


@dataclass(frozen=True)
class AdaptiveComparison:
    """Two pictures, and how much looking it took."""

    probability: float
    """That the first is preferred, calibrated."""
    views: int
    """Scores computed of each picture."""
    decided: bool
    """Whether the test ended before the last view: more would hardly change which side leads."""


class Views:
    """Scores of some pictures of one prompt, view by view; view i has its own level and its own noise.

    Args:
        latents: clean, one (channel, *frame, height, width) a picture; pictures of one shape share their
            noise.
    """

    def __init__(
        self, model: "RewardModel", prompt: str, latents: Sequence[Tensor], seed: int, plan: AdaptiveViews
    ) -> None:
        self.model, self.latents, self.plan = model, list(latents), plan
        self.conditioning = model.encode_prompts(prompt)
        count = len(plan.noise_levels)
        self.noise = {
            shape: seeded_noise(tuple(shape), [seed], num_draws=count)
            for shape in {latent.shape for latent in latents}
        }
        self.scores: list[list[float]] = [[] for _ in latents]

    def draw(self, pictures: Sequence[int]) -> None:
        """One more view of each of these pictures."""
        groups: dict[tuple[torch.Size, int], list[int]] = {}
        for picture in pictures:
            key = self.latents[picture].shape, len(self.scores[picture])
            groups.setdefault(key, []).append(picture)
        for (shape, view), members in groups.items():
            found = self.model.score_latents(
                torch.stack([self.latents[picture] for picture in members]),
                self.conditioning,
                self.plan.noise_levels[view],
                self.noise[shape][view].expand(len(members), *shape),
            )
            for picture, score in zip(members, found.tolist(), strict=True):
                self.scores[picture].append(score)

    def estimate(self, picture: int) -> float:
        """Of the score that unlimited views would give."""
        scores = self.scores[picture]
        gains = self.plan.gains[len(scores) - 1]
        return sum(g * (s - o) for g, s, o in zip(gains, scores, self.plan.offsets, strict=False))

    def decided(self, first: int, second: int) -> bool:
        """Is it settled which of the two leads?"""
        views = min(len(self.scores[first]), len(self.scores[second]))
        difference = abs(self.estimate(first) - self.estimate(second))
        return difference >= self.plan.threshold * self.plan.deviations[views - 1]

    def exhausted(self, picture: int) -> bool:
        return len(self.scores[picture]) == len(self.plan.noise_levels)


def plan_of(model: "RewardModel") -> AdaptiveViews:
    """The views that the model learned.

    Raises:
        InvalidInputError: it has not learned any.
    """
    if model.config.adaptive is None:
        raise InvalidInputError(
            "this reward has not learned how many views a pair needs: run "
            "`dina-lrm evaluate --model RUN --learn-views`, or compare without adaptive=True"
        )
    return model.config.adaptive


def compare_adaptively(
    model: "RewardModel", prompt: str, latents: Sequence[Tensor], seed: int
) -> AdaptiveComparison:
    """View two pictures until it is settled which leads, at most as often as the plan has views."""
    plan = plan_of(model)
    views = Views(model, prompt, latents, seed, plan)
    while True:
        views.draw([0, 1])
        decided = views.decided(0, 1)
        if decided or views.exhausted(0):
            break
    lead = torch.tensor([views.estimate(0) - views.estimate(1)], dtype=torch.float64)
    probability = win_probability(
        lead, torch.zeros(1), likelihood="thurstone", slope=0.0, floor=plan.scale**2 / 2
    ).item()
    return AdaptiveComparison(probability, len(views.scores[0]), decided and not views.exhausted(0))


def rank_adaptively(
    model: "RewardModel", prompt: str, images: Sequence[Any], latents: Sequence[Tensor], seed: int
) -> list[RankedImage]:
    """Best first; pictures are viewed until each is settled against its neighbours in the ranking.

    The error that the plan states holds for each comparison of neighbours, not for the ranking as a whole.
    """
    views = Views(model, prompt, latents, seed, plan_of(model))
    everyone = range(len(latents))
    views.draw(everyone)
    while True:
        order = sorted(everyone, key=lambda picture: -views.estimate(picture))
        open_ones = {
            picture
            for pair in pairwise(order)
            if not views.decided(*pair)
            for picture in pair
            if not views.exhausted(picture)
        }
        if not open_ones:
            break
        fewest = min(len(views.scores[picture]) for picture in open_ones)
        views.draw(sorted(one for one in open_ones if len(views.scores[one]) == fewest))
    return [
        RankedImage(picture, images[picture], views.estimate(picture), len(views.scores[picture]))
        for picture in order
    ]


PILOT_DRAWS = 5
"""Draws of every picture from which its spread is read."""


def score_to_target(
    draw: Callable[[Sequence[int], int, int], Tensor], num_pictures: int, target_error: float, max_draws: int
) -> ScoreOutput:
    """Means over as many noise draws as each picture needs.

    Args:
        draw: scores (draw, picture) of some pictures, of noise draws from start to stop - 1.
    """
    pilot = draw(range(num_pictures), 0, min(PILOT_DRAWS, max_draws))
    wanted = stein_draws(pilot, target_error, max_draws=max_draws).cpu()
    scores, errors = torch.empty_like(pilot[0]), torch.empty_like(pilot[0])
    for count in wanted.unique().tolist():
        pictures = (wanted == count).nonzero().flatten().tolist()
        own = pilot[:, pictures]
        if count > len(pilot):
            own = torch.cat([own, draw(pictures, len(pilot), count)])
        mean, error = mean_and_standard_error(own)
        assert error is not None
        scores[pictures], errors[pictures] = mean.to(scores.dtype), error.to(errors.dtype)
    return ScoreOutput(scores, errors, wanted)
