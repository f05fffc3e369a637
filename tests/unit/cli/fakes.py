"""A stand-in for a reward model: its score of a picture is the picture's mean brightness, in [0, 1]."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dina_lrm.errors import InvalidInputError
from dina_lrm.models.options import ModelOptions


class BrightnessModel:
    def __init__(self, noise_levels: tuple[float, ...] = (0.4,)) -> None:
        self.config = SimpleNamespace(noise_levels=noise_levels)
        self.calls: list[dict[str, Any]] = []

    def score(self, prompts: list[str], images: list[Image.Image], **settings: Any) -> SimpleNamespace:
        self.calls.append({"prompts": prompts, **settings})
        if any("forbidden" in prompt for prompt in prompts):
            raise InvalidInputError("the prompt holds a word that is not allowed")
        scores = torch.tensor([float(np.asarray(image).mean()) / 255 for image in images])
        errors = torch.full_like(scores, 0.01) if settings["num_draws"] > 1 else None
        return SimpleNamespace(scores=scores, standard_errors=errors)

    def compare(self, prompt: str, image_a: Image.Image, image_b: Image.Image, **settings: Any) -> float:
        self.calls.append({"prompts": [prompt], **settings})
        a, b = (float(np.asarray(image).mean()) for image in (image_a, image_b))
        return 0.5 + (a - b) / 510


def use_brightness_model(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> BrightnessModel:
    """Let every command load a BrightnessModel, whatever it was asked for."""
    model = BrightnessModel(**settings)
    monkeypatch.setattr(ModelOptions, "load", lambda self: model)
    return model
