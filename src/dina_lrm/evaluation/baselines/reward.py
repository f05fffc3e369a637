"""A reward of this package under the interface of the baselines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dina_lrm.core.tensors import Score
from dina_lrm.evaluation.baselines.scorer import score_in_batches
from dina_lrm.models.reward_model import RewardModel

__all__ = ["RewardScorer"]


class RewardScorer:
    """`RewardModel.score` at fixed noise levels and seed.

    With a reward trained by Bradley-Terry on an SD 1.5 or SDXL backbone, this is the step-level LRM
    (arXiv:2502.01051) as far as our backbones express it.

    Args:
        noise_levels: one level, or several for a token-level ensemble; None: the model's own.
        seed: of the noise, the same for every picture.
        batch_size: pictures per call; no effect on scores.
    """

    name = "dina"

    def __init__(
        self,
        model: RewardModel,
        *,
        noise_levels: Sequence[float] | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        self.model = model
        self.noise_levels = None if noise_levels is None else list(noise_levels)
        self.seed = seed
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path = "bundled",
        *,
        pipeline: Any = None,
        noise_levels: Sequence[float] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> "RewardScorer":
        """See `RewardModel.from_pretrained`."""
        model = RewardModel.from_pretrained(location, pipeline, device=device, dtype=dtype)
        model.requires_grad_(False)
        return cls(model, noise_levels=noise_levels, seed=seed, batch_size=batch_size)

    def score(self, prompts: Sequence[str], images: Sequence[Any]) -> Score:
        """See `Scorer.score`."""
        return score_in_batches(prompts, images, self._score_batch, batch_size=self.batch_size)

    def _score_batch(self, prompts: list[str], images: list[Image.Image]) -> Tensor:
        found = self.model.score(prompts, images, noise_levels=self.noise_levels, seed=self.seed)
        return found.scores.cpu()
