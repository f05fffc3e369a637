"""DiNa-LRM: preference rewards read straight from noisy diffusion latents.

>>> import dina_lrm
>>> model = dina_lrm.RewardModel.from_pretrained("bundled")  # doctest: +SKIP
>>> model.score("a red circle on a gray background", "picture.png").scores  # doctest: +SKIP

Names are resolved on first use, so that importing the package costs nothing and loads no diffusers pipeline.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dina_lrm.errors import (
    CheckpointError,
    DinaError,
    HubError,
    InvalidInputError,
    MissingComponentError,
    PromptWarning,
    RunError,
    ScoringError,
    UntrainedModelError,
)

if TYPE_CHECKING:
    from dina_lrm import alignment
    from dina_lrm.backbones.backbone import BackboneFeatures
    from dina_lrm.checkpoints.config import Calibration, HeadConfig, LikelihoodConfig, RewardModelConfig
    from dina_lrm.core.conditioning import Conditioning
    from dina_lrm.models.reward_model import RewardModel
    from dina_lrm.models.scoring import RankedImage, ScoreOutput
    from dina_lrm.models.watch import RewardWatch, StepScore
    from dina_lrm.remote.client import AsyncClient, Client

__version__ = "0.1.0"

_HOME_OF = {
    "Client": "dina_lrm.remote.client",
    "AsyncClient": "dina_lrm.remote.client",
    "RewardModel": "dina_lrm.models.reward_model",
    "RankedImage": "dina_lrm.models.scoring",
    "ScoreOutput": "dina_lrm.models.scoring",
    "RewardWatch": "dina_lrm.models.watch",
    "StepScore": "dina_lrm.models.watch",
    "Conditioning": "dina_lrm.core.conditioning",
    "BackboneFeatures": "dina_lrm.backbones.backbone",
    "RewardModelConfig": "dina_lrm.checkpoints.config",
    "HeadConfig": "dina_lrm.checkpoints.config",
    "LikelihoodConfig": "dina_lrm.checkpoints.config",
    "Calibration": "dina_lrm.checkpoints.config",
}

__all__ = [
    "AsyncClient",
    "BackboneFeatures",
    "Calibration",
    "CheckpointError",
    "Client",
    "Conditioning",
    "DinaError",
    "HeadConfig",
    "HubError",
    "InvalidInputError",
    "LikelihoodConfig",
    "MissingComponentError",
    "PromptWarning",
    "RankedImage",
    "RewardModel",
    "RewardModelConfig",
    "RewardWatch",
    "RunError",
    "ScoreOutput",
    "ScoringError",
    "StepScore",
    "UntrainedModelError",
    "__version__",
    "alignment",
]


def __getattr__(name: str) -> Any:
    if name == "alignment":
        return importlib.import_module("dina_lrm.alignment")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'dina_lrm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
