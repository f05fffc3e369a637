"""Rewards for flow_grpo: on pictures for its registry, and on latents with the policy's own transformer.

    from dina_lrm.integrations import flow_grpo
    flow_grpo.register("dina", reward="runs/mine")       # in the config file: no file of flow_grpo changes
    config.reward_fn = {"dina": 0.7, "ocr": 0.3}

A factory takes the device and returns the reward; the reward takes a batch and returns `(scores, {})`.
"""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dina_lrm.core.conditioning import Conditioning
from dina_lrm.errors import InvalidInputError
from dina_lrm.integrations.local import (
    PUBLISHED_REWARD,
    LocalReward,
    check_pairs,
    check_settings,
    finite,
    local_reward,
)
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.models.scoring import NoiseLevels

PixelReward = Callable[..., tuple[list[float], dict[str, Any]]]
"""`reward(images, prompts, metadata)`: one score for each picture, and nothing else to report."""
LatentReward = Callable[..., tuple[dict[str, Any], dict[str, Any]]]
"""`reward(latents, prompt_embeds, pooled_prompt_embeds, u=0.4, metadata=None)`: scores by name."""


def dina_score(
    device: torch.device | str,
    *,
    reward: str | Path = PUBLISHED_REWARD,
    pipeline: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    noise_levels: NoiseLevels = None,
    seed: int | None = 0,
    num_draws: int = 1,
) -> PixelReward:
    """A reward on pictures, in the form of flow_grpo's registry.

    The reward takes `images`, a float tensor (batch, 3, height, width) in [0, 1] or a uint8 array
    (batch, height, width, 3), one prompt for each, and metadata that it does not read. Its scores are those
    of `RewardModel.score`. Threads may share it.

    Args:
        reward, pipeline, dtype: as in `RewardModel.from_pretrained`. Loaded once a process.
        noise_levels, seed, num_draws: as in `RewardModel.score`. The same noise for every picture compares
            those of a group fairly.
    """
    local = local_reward(reward, pipeline=pipeline, device=device, dtype=dtype)

    def score(
        images: Any, prompts: Sequence[str], metadata: Any = None
    ) -> tuple[list[float], dict[str, Any]]:
        pictures = _pictures(images)
        prompts = check_pairs(prompts, len(pictures), "images")
        with local.turn() as model:
            output = model.score(prompts, pictures, noise_levels, seed, num_draws=num_draws)
        return finite(output.scores).tolist(), {}

    return score


def register(name: str = "dina", **settings: Any) -> None:
    """Make `config.reward_fn = {name: weight}` known to flow_grpo, without editing it.

    flow_grpo's registry is a dict inside `flow_grpo.rewards.multi_score`, out of reach. So that function is
    replaced in its module (a monkey-patch) by one that adds our terms to the weighted sum and passes all
    others on. Trainers look it up when they start, so call this before, for instance in the config file. A
    name that is registered again is replaced; one that flow_grpo has itself is hidden.

    Args:
        settings: of `dina_score`.

    Raises:
        InvalidInputError: a setting that it does not have.
    """
    check_settings(settings, dina_score)
    rewards: Any = importlib.import_module("flow_grpo.rewards")
    if not isinstance(rewards.multi_score, MultiScore):
        rewards.multi_score = MultiScore(rewards.multi_score)
    rewards.multi_score.own[name] = functools.partial(dina_score, **settings)


class MultiScore:
    """flow_grpo's `multi_score`, with rewards of our own beside its.

    Attributes:
        own: factories by name, each called with the device.
    """

    def __init__(self, multi_score: Callable[..., Any]) -> None:
        self.multi_score = multi_score
        self.own: dict[str, Callable[..., PixelReward]] = {}

    def __call__(self, device: Any, score_dict: Mapping[str, float]) -> Callable[..., Any]:
        own = {name: self.own[name](device) for name in score_dict if name in self.own}
        rest = {name: weight for name, weight in score_dict.items() if name not in self.own}
        score_rest = self.multi_score(device, rest) if rest else None

        def score(images: Any, prompts: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
            found, reported = {}, {}
            if score_rest is not None:
                found, reported = score_rest(images, prompts, metadata, *args, **kwargs)
            total = found.get("avg", [0.0] * len(prompts))
            for name, reward in own.items():
                scores, _ = reward(images, prompts, metadata)
                found = {**found, name: scores}
                total = [before + score_dict[name] * s for before, s in zip(total, scores, strict=True)]
            return {**found, "avg": total}, reported

        return score


def diffusion_rm_score(
    pipeline: Any,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    reward: str | Path = PUBLISHED_REWARD,
    seed: int | None = None,
) -> LatentReward:
    """A reward on clean latents that shares the policy's transformer, for Flow-GRPO and ReFL.

    The reward takes `latents` (batch, channel, height, width) and the embeddings they were sampled with, and
    returns `({"diffusion_rm_0.4": scores, "avg": [floats]}, {})`: scores is a tensor (batch,), differentiable
    in the latents, "avg" the same numbers as floats. The name holds the noise level `u`. Call it while the
    policy is not running in another thread: both use the same modules, with other adapters.

    Args:
        pipeline: of the policy, live, with its LoRA added (by PEFT's `get_peft_model` or `add_adapter`).
        device: where the pipeline's transformer is.
        dtype: not read: the reward computes in the dtype of the transformer it shares, its head in float32.
        reward: as in `RewardModel.from_pretrained`; trained on the pipeline's base weights.
        seed: of the noise, the same for all samples; None: fresh noise from torch's global generator, as
            ReFL wants it, which would otherwise learn to please one noise sample.

    Raises:
        InvalidInputError: the pipeline's transformer is on another kind of device.
    """
    model = RewardModel.from_pretrained(reward, pipeline, device="cpu").attach(pipeline)
    if model.device.type != torch.device(device).type:
        raise InvalidInputError(
            f"device = {str(device)!r}, but the pipeline's transformer is on {model.device}: move it first"
        )
    local = LocalReward(model)

    def score(
        latents: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        u: float = 0.4,
        metadata: Any = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        conditioning = Conditioning(prompt_embeds, pooled_prompt_embeds)
        with local.turn() as model:
            scores = finite(model.score_latents(latents, conditioning, u, seed=seed))
        return {f"diffusion_rm_{u}": scores, "avg": scores.detach().tolist()}, {}

    return score


def _pictures(images: Any) -> Tensor:
    """(batch, 3, height, width), as `RewardModel.score` takes it."""
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4:
        return torch.tensor(images).permute(0, 3, 1, 2)
    if isinstance(images, Tensor) and images.ndim == 4:
        return images
    kind = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray | Tensor) else ""
    raise InvalidInputError(
        f"images are {type(images).__name__} {kind}: they must be a float tensor (batch, 3, height, width) "
        f"in [0, 1] or a uint8 array (batch, height, width, 3)"
    )
