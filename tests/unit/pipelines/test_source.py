"""Pipelines that no reward can stand for are refused wherever a pipeline enters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_lrm import InvalidInputError, RewardModel
from dina_lrm.cli.plan import make_plan
from dina_lrm.models.encoders import pipeline_encoders
from dina_lrm.pipelines.libraries import quiet_loading
from tests.families import load_pipeline, make_family_reward

TWO = r"has two networks, transformer for high noise and transformer_2 for low \(boundary_ratio = 0.875\)"
EXPANDED = r"tells every token a timestep of its own \(expand_timesteps\)"


def wan22(folder: Path, target: Path, kind: str) -> tuple[Any, Path]:
    """Wan 2.2 as diffusers has it: A14B with an expert for low noise, or TI2V with timesteps per token."""
    from diffusers import WanPipeline

    parts = load_pipeline(folder).components
    parts |= {"expand_timesteps": True}
    if kind == "experts":
        second = load_pipeline(folder).transformer
        parts |= {"expand_timesteps": False, "transformer_2": second, "boundary_ratio": 0.875}
    pipeline = WanPipeline(**parts)
    with quiet_loading():
        pipeline.save_pretrained(target)
    return pipeline, target


@pytest.mark.parametrize(("kind", "message"), [("experts", TWO), ("expanded", EXPANDED)])
def test_wan22_is_refused(
    kind: str, message: str, family_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    live, folder = wan22(family_folders("wan"), tmp_path / "wan22", kind)
    model = make_family_reward(family_folders("wan"))
    saved = model.save_pretrained(tmp_path / "reward")
    uses: list[Callable[[], Any]] = [
        lambda: model.attach(live),
        lambda: model.watch(live),
        lambda: make_plan(str(folder)),
    ]
    for pipeline in (live, folder):
        uses += [
            lambda pipeline=pipeline: RewardModel.from_pretrained(saved, pipeline),
            lambda pipeline=pipeline: RewardModel.initialize(pipeline),
            lambda pipeline=pipeline: RewardModel.initialize(pipeline, device="meta"),
            lambda pipeline=pipeline: pipeline_encoders(pipeline, dtype=torch.float32),
        ]
    for use in uses:
        with pytest.raises(InvalidInputError, match=message):
            use()
    assert not model.attached


def test_only_the_expert_for_low_noise(family_folders: Callable[[str], Path], tmp_path: Path) -> None:
    live, _ = wan22(family_folders("wan"), tmp_path / "wan22", "experts")
    live.transformer = None
    with pytest.raises(InvalidInputError, match=TWO):
        RewardModel.initialize(live)
