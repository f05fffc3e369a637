"""Scorers by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.baselines.clip import ClipScore, HPSv2, PickScore
from dina_lrm.evaluation.baselines.hpsv3 import HPSv3
from dina_lrm.evaluation.baselines.image_reward import ImageReward
from dina_lrm.evaluation.baselines.pixel_network import PixelNetwork
from dina_lrm.evaluation.baselines.reward import RewardScorer
from dina_lrm.evaluation.baselines.scorer import Scorer
from dina_lrm.evaluation.baselines.server import UNIFIED_REWARD, VISUAL_QUALITY_R1, Question, ServerScorer

__all__ = ["SCORERS", "load_scorer"]


def _server(question: Question) -> Callable[..., Scorer]:
    def connect(
        location: str | None = None,
        *,
        model: str | None = None,
        template: str | None = None,
        device: torch.device | str,
        dtype: torch.dtype,
        **settings: Any,
    ) -> Scorer:
        del device, dtype  # the server's own affair
        if location is None or model is None:
            raise InvalidInputError(
                f"{question.name} runs on a server: pass location='http://host:port' and model='name there'"
            )
        asked = question if template is None else replace(question, template=template)
        return ServerScorer(location, model, asked, **settings)

    return connect


SCORERS: dict[str, Callable[..., Scorer]] = {
    "clip-score": ClipScore.from_pretrained,
    "pickscore": PickScore.from_pretrained,
    "hpsv2": HPSv2.from_pretrained,
    "imagereward": ImageReward.from_pretrained,
    "hpsv3": HPSv3.from_pretrained,
    "unified-reward": _server(UNIFIED_REWARD),
    "visualquality-r1": _server(VISUAL_QUALITY_R1),
    "pixel-network": PixelNetwork.from_pretrained,
    "dina": RewardScorer.from_pretrained,
}
"""What loads each: called with the location, if there is one, device, dtype and the scorer's own options."""


def load_scorer(
    name: str,
    *,
    location: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Scorer:
    """A scorer, ready to score.

    Args:
        name: one of `SCORERS`.
        location: hub id, folder or file; a server's address; None: the published weights on the hub.
        device, dtype: of the network; no effect on a server.
        options: the scorer's own, such as batch_size, processor, noise_levels, or model of a server.

    Raises:
        InvalidInputError: an unknown name.
        CheckpointError: weights or parts missing or damaged.
    """
    if name not in SCORERS:
        raise InvalidInputError(f"unknown scorer {name!r}; known: {', '.join(SCORERS)}")
    where = () if location is None else (location,)
    return SCORERS[name](*where, device=device, dtype=dtype, **options)
