"""Comparing with as many levels as a pair needs, and no more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dina_lrm.checkpoints.config import AdaptiveLevels
from dina_lrm.core.adaptive import stein_draws
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.ensemble import mean_and_standard_error
from dina_lrm.core.likelihood import log_normal_cdf
from dina_lrm.core.noise import seeded_noise
from dina_lrm.core.precision import without_autocast
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.head import HeadTokens
from dina_lrm.models.scoring import RankedImage, ScoreOutput

if TYPE_CHECKING:
    from dina_lrm.models.reward_network import RewardNetwork


@dataclass(frozen=True)
class AdaptiveComparison:
    """Which of two pictures is preferred, and how many noise levels it took."""

    probability: float
    """That the first is preferred, calibrated."""
    num_levels: int
    """Noise levels at which each picture was scored: passes of the backbone."""
    decided: bool
    """Whether the test ended before the last level: more would hardly change which side leads."""


class LevelByLevel:
    """Scores of some pictures of one prompt, level by level: the backbone runs at one more noise level, and
    the head again on the tokens of all levels so far, which are kept. All levels have the same noise sample.

    Args:
        conditioning: one row.
        latents: clean, one (channel, *frame, height, width) a picture; pictures of one shape share their
            noise.
    """

    def __init__(
        self,
        model: "RewardNetwork",
        conditioning: Conditioning,
        latents: Sequence[Tensor],
        seed: int,
        plan: AdaptiveLevels,
    ) -> None:
        self.model, self.latents, self.plan = model, list(latents), plan
        self.conditioning = conditioning
        self.noise = {
            shape: seeded_noise(tuple(shape), [seed])[0].to(model.device)
            for shape in {latent.shape for latent in latents}
        }
        self.tokens: list[list[HeadTokens]] = [[] for _ in latents]
        self.scores: list[list[float]] = [[] for _ in latents]

    def draw(self, pictures: Sequence[int]) -> None:
        """One more level of each of these pictures."""
        groups: dict[tuple[torch.Size, int], list[int]] = {}
        for picture in pictures:
            key = self.latents[picture].shape, len(self.scores[picture])
            groups.setdefault(key, []).append(picture)
        for group in groups.values():
            size = self.model.max_batch_size
            for start in range(0, len(group), size):
                self._draw(group[start : start + size])

    def _draw(self, pictures: Sequence[int]) -> None:
        """For pictures of one shape that have been scored equally often."""
        shape, level, count = self.latents[pictures[0]].shape, len(self.scores[pictures[0]]), len(pictures)
        latents = torch.stack([self.latents[picture] for picture in pictures])
        self.model.backbone.check_latents(latents)
        with without_autocast(latents.device.type):
            found = self.model.noisy_tokens(
                latents,
                self.conditioning.index_select(torch.zeros(count, dtype=torch.int64, device=latents.device)),
                torch.full((1, count), self.plan.noise_levels[level], device=latents.device),
                self.noise[shape].expand(count, *shape),
            )
            for row, picture in enumerate(pictures):
                self.tokens[picture].append(found.rows(slice(row, row + 1)))
            seen = [self.tokens[picture][past] for past in range(level + 1) for picture in pictures]
            scores = self.model.score_tokens(HeadTokens.stack(seen).unfold(level + 1))
        for picture, score in zip(pictures, scores.tolist(), strict=True):
            self.scores[picture].append(score)

    def estimate(self, picture: int) -> float:
        """The score so far, in probits: P(a preferred to b) = Phi(estimate(a) - estimate(b))."""
        last = len(self.scores[picture]) - 1
        return (self.scores[picture][last] - self.plan.offsets[last]) / self.plan.scales[last]

    def decided(self, first: int, second: int) -> bool:
        """Is it final that `first`, whose estimate is the larger, leads? By the last level that both have."""
        levels = min(len(self.scores[first]), len(self.scores[second]))
        if levels == len(self.plan.noise_levels):
            return True
        lead = self.scores[first][levels - 1] - self.scores[second][levels - 1]
        return lead >= self.plan.thresholds[levels - 1]

    def exhausted(self, picture: int) -> bool:
        return len(self.scores[picture]) == len(self.plan.noise_levels)


def plan_of(model: "RewardNetwork") -> AdaptiveLevels:
    """The levels that the model learned.

    Raises:
        InvalidInputError: it has not learned any.
    """
    if model.config.adaptive is None:
        raise InvalidInputError(
            "this reward has not learned how many levels a pair needs: run "
            "`dina-lrm evaluate --model RUN --learn-levels`, or compare without adaptive=True"
        )
    return model.config.adaptive


def compare_adaptively(
    model: "RewardNetwork", conditioning: Conditioning, latents: Sequence[Tensor], seed: int
) -> AdaptiveComparison:
    """Score two pictures until it is decided which leads, at most as often as the plan has levels."""
    scored = LevelByLevel(model, conditioning, latents, seed, plan_of(model))
    while True:
        scored.draw([0, 1])
        lead = scored.estimate(0) - scored.estimate(1)
        if scored.decided(0, 1) if lead > 0 else scored.decided(1, 0):
            break
    probability = float(log_normal_cdf(torch.tensor(lead, dtype=torch.float64)).exp())
    return AdaptiveComparison(probability, len(scored.scores[0]), not scored.exhausted(0))


def rank_adaptively(
    model: "RewardNetwork",
    conditioning: Conditioning,
    images: Sequence[Any],
    latents: Sequence[Tensor],
    seed: int,
) -> list[RankedImage]:
    """Best first; pictures are scored until each is decided against its neighbours in the ranking.

    The error that the plan states holds for each comparison of neighbours, not for the ranking as a whole.
    """
    scored = LevelByLevel(model, conditioning, latents, seed, plan_of(model))
    everyone = range(len(latents))
    scored.draw(everyone)
    while True:
        order = sorted(everyone, key=lambda picture: -scored.estimate(picture))
        open_ones = {
            picture
            for pair in pairwise(order)
            if not scored.decided(*pair)
            for picture in pair
            if not scored.exhausted(picture)
        }
        if not open_ones:
            break
        fewest = min(len(scored.scores[picture]) for picture in open_ones)
        scored.draw(sorted(one for one in open_ones if len(scored.scores[one]) == fewest))
    return [
        RankedImage(picture, images[picture], scored.estimate(picture), len(scored.scores[picture]))
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
