"""A stand-in for `HPSv3RewardInferencer`, for DanceGRPO and other code written for HPSv3.

HPSv3 has changed the order of its arguments: release 1.0.0, which DanceGRPO calls, takes
`reward(image_paths, prompts)`, later versions `reward(prompts, image_paths)`. A caption and a path are both
strings, so the order cannot be told from the call. Import the class of the version your trainer was written
for; keyword arguments work with both.

    from dina_lrm.integrations.hpsv3 import HPSv3RewardInferencer  # prompts first
    from dina_lrm.integrations.hpsv3 import HPSv3RewardInferencerV1 as HPSv3RewardInferencer  # paths first
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dina_lrm.errors import InvalidInputError
from dina_lrm.integrations.local import PUBLISHED_REWARD, check_pairs, finite, local_reward
from dina_lrm.models.scoring import NoiseLevels, perceived_variance, resolve_levels

MeanAndDeviation = Float[Tensor, "batch 2"]


class Inferencer:
    """What both versions have in common. The reward is loaded once a process for the same arguments.

    Args:
        config_path: must be None: our checkpoints hold their configuration.
        checkpoint_path: the reward, as in `RewardModel.from_pretrained`; None: the paper's.
        differentiable: must be False: there is no gradient through files. `score_latents` has gradients.
        pipeline, dtype: as in `RewardModel.from_pretrained`.
        noise_levels, seed, num_draws: as in `RewardModel.score`.

    Raises:
        InvalidInputError: a config_path, differentiable=True, no such device, or a reward with a logistic
            likelihood and no calibration at these noise levels, which has no deviation to report.
    """

    order: str

    def __init__(
        self,
        config_path: str | Path | None = None,
        checkpoint_path: str | Path | None = None,
        device: torch.device | str = "cuda",
        differentiable: bool = False,
        *,
        pipeline: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        noise_levels: NoiseLevels = None,
        seed: int = 0,
        num_draws: int = 1,
    ) -> None:
        if config_path is not None:
            raise InvalidInputError(
                f"config_path = {str(config_path)!r}: it must be None, since the reward in checkpoint_path "
                f"holds its own configuration"
            )
        if differentiable:
            raise InvalidInputError(
                "differentiable = True: pictures in files have no gradient; "
                "RewardModel.score_latents is differentiable in the latents"
            )
        self._settings = {"noise_levels": noise_levels, "seed": seed, "num_draws": num_draws}
        reward = PUBLISHED_REWARD if checkpoint_path is None else checkpoint_path
        self._reward = local_reward(reward, pipeline=pipeline, device=device, dtype=dtype)
        config = self._reward.model.config
        resolved = resolve_levels(noise_levels, config.noise_levels, 1)[:, 0].double().tolist()
        levels = [round(level, 6) for level in resolved]  # as they were given, not as float32 has them
        variance = perceived_variance(levels, config)
        if variance is None:
            raise InvalidInputError(
                f"the reward {str(reward)!r} has a logistic likelihood and no calibration at noise levels "
                f"{levels}, so it has no deviation to report: calibrate it, or use RewardModel.score"
            )
        self._deviation = variance**0.5

    def _score(self, prompts: Sequence[str], image_paths: Sequence[Any]) -> MeanAndDeviation:
        if isinstance(image_paths, str):
            raise InvalidInputError(f"image_paths is one string, {image_paths!r}: give a list")
        prompts = check_pairs(prompts, len(image_paths), "image_paths")
        for index, path in enumerate(image_paths):
            if isinstance(path, str | Path) and not Path(path).is_file():
                raise InvalidInputError(
                    f"image_paths[{index}] = {str(path)!r} is not a file; "
                    f"the order of {type(self).__name__} is reward({self.order})"
                )
        with self._reward.turn() as model:
            scores = finite(model.score(prompts, list(image_paths), **self._settings).scores)
        return torch.stack([scores, torch.full_like(scores, self._deviation)], dim=1)


class HPSv3RewardInferencer(Inferencer):
    """For trainers written for HPSv3 after 1.0.0: prompts first. Arguments as in `Inferencer`."""

    order = "prompts, image_paths"

    def reward(self, prompts: Sequence[str], image_paths: Sequence[Any]) -> MeanAndDeviation:
        """Scores and deviations (batch, 2) of pictures for prompts, pair by pair, on the reward's device.

        The deviation is that of a rater's impression around the score, the same for all pictures and in score
        units, so that P(a preferred to b) = Phi((score_a - score_b) / sqrt(deviation_a^2 + deviation_b^2)) is
        `RewardModel.compare`: calibrated where the checkpoint holds a calibration for these noise levels.

        Args:
            image_paths: files; PIL images and tensors serve too.
        """
        return self._score(prompts, image_paths)


class HPSv3RewardInferencerV1(Inferencer):
    """For trainers written for HPSv3 1.0.0, as DanceGRPO: image paths first. Arguments as in `Inferencer`."""

    order = "image_paths, prompts"

    def reward(self, image_paths: Sequence[Any], prompts: Sequence[str]) -> MeanAndDeviation:
        """See `HPSv3RewardInferencer.reward`."""
        return self._score(prompts, image_paths)
