"""How far to trust a reward: accuracy with intervals, noise levels and ensembles, calibration, stability."""

from dina_lrm.evaluation.benchmarks import BayesReference, EvaluationResult, evaluate_latent_pairs
from dina_lrm.evaluation.metrics import (
    Accuracy,
    Interval,
    Reliability,
    agreement,
    cluster_bootstrap,
    pairwise_accuracy,
    reliability,
)
from dina_lrm.evaluation.noise_sweep import PairScores, Setting, SettingResult, noise_sweep, score_pairs

__all__ = [
    "Accuracy",
    "BayesReference",
    "EvaluationResult",
    "Interval",
    "PairScores",
    "Reliability",
    "Setting",
    "SettingResult",
    "agreement",
    "cluster_bootstrap",
    "evaluate_latent_pairs",
    "noise_sweep",
    "pairwise_accuracy",
    "reliability",
    "score_pairs",
]
