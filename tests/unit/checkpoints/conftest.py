"""Checkpoints of tiny rewards in both layouts, and what they score."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dina_lrm import RewardModel
from tests.tiny import make_tiny_reward, tiny_conditioning, tiny_latents

LAYOUTS = ["dina", "published"]


def score(model: RewardModel) -> torch.Tensor:
    with torch.no_grad():
        return model.score_latents(tiny_latents(), tiny_conditioning(), [0.3, 0.6], tiny_latents(seed=1))


@pytest.fixture
def saved(tiny_backbone: Path, tmp_path: Path) -> Callable[..., Path]:
    def save(layout: str, **settings: object) -> Path:
        return make_tiny_reward(tiny_backbone, **settings).save_pretrained(tmp_path / "reward", layout)

    return save
