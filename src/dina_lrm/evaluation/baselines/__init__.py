"""Published rewards behind one interface, so that every number of a comparison comes out of one harness.

A `Scorer` takes prompts and pictures, pair by pair, and gives a float each. The networks are transformers'
own classes; nothing here unpickles an object or runs code that came with weights. Scores of different scorers
have different units: compare orders and accuracies, never values.
"""

from dina_lrm.evaluation.baselines.clip import ClipScore, HPSv2, PickScore
from dina_lrm.evaluation.baselines.hpsv3 import HPSv3
from dina_lrm.evaluation.baselines.image_reward import ImageReward
from dina_lrm.evaluation.baselines.pixel_network import PixelFusion, PixelNetwork
from dina_lrm.evaluation.baselines.registry import SCORERS, load_scorer
from dina_lrm.evaluation.baselines.reward import RewardScorer
from dina_lrm.evaluation.baselines.scorer import Scorer
from dina_lrm.evaluation.baselines.server import UNIFIED_REWARD, VISUAL_QUALITY_R1, ServerScorer

__all__ = [
    "SCORERS",
    "UNIFIED_REWARD",
    "VISUAL_QUALITY_R1",
    "ClipScore",
    "HPSv2",
    "HPSv3",
    "ImageReward",
    "PickScore",
    "PixelFusion",
    "PixelNetwork",
    "RewardScorer",
    "Scorer",
    "ServerScorer",
    "load_scorer",
]
