"""A stand-in for a reward model: its score of a picture is the picture's mean brightness, in [0, 1]."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dina_lrm.checkpoints.config import RewardModelConfig
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.options import ModelOptions
from dina_lrm.models.scoring import preference_probability


class BrightnessModel:
    def __init__(self, noise_levels: tuple[float, ...] = (0.4,)) -> None:
        self.config = RewardModelConfig(
            num_blocks=1, image_taps=(1,), tuning="frozen", noise_levels=noise_levels
        )
        self.calls: list[dict[str, Any]] = []

    def score(self, prompts: list[str], images: list[Image.Image], **settings: Any) -> SimpleNamespace:
        self.calls.append({"prompts": prompts, **settings})
        if any("forbidden" in prompt for prompt in prompts):
            raise InvalidInputError("the prompt holds a word that is not allowed")
        scores = torch.tensor([float(np.asarray(image).mean()) / 255 for image in images])
        errors = torch.full_like(scores, 0.01) if settings["num_draws"] > 1 else None
        return SimpleNamespace(scores=scores, standard_errors=errors)

    def prompt_notes(self, prompts: list[str]) -> list[str]:
        return []

    def compare(self, prompt: str, image_a: Image.Image, image_b: Image.Image, **settings: Any) -> float:
        a, b = self.score([prompt] * 2, [image_a, image_b], **settings).scores.tolist()
        levels = settings["noise_levels"]
        return preference_probability(a - b, levels if isinstance(levels, list) else [levels], self.config)


def use_brightness_model(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> BrightnessModel:
    """Let every command load a BrightnessModel, whatever it was asked for."""
    model = BrightnessModel(**settings)
    monkeypatch.setattr(ModelOptions, "load", lambda self: model)
    return model
