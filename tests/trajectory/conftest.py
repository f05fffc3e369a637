"""Pairs and a new reward for short runs of training."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dina_lrm.data.latents import LatentPairs
from dina_lrm.models.reward_model import RewardModel
from tests.trajectory.training_runs import make_pairs


@pytest.fixture(scope="module")
def train_pairs() -> LatentPairs:
    return make_pairs(64, seed=1)


@pytest.fixture(scope="module")
def validation_pairs() -> LatentPairs:
    return make_pairs(24, seed=2)


@pytest.fixture
def new_model(tiny_backbone: Path) -> Callable[..., RewardModel]:
    def make(**settings: object) -> RewardModel:
        settings = {"num_blocks": 2, "image_taps": (1, 2), "text_taps": (1,), "lora_rank": 2} | settings
        return RewardModel.initialize(str(tiny_backbone), seed=0, **settings)

    return make
