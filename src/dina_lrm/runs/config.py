"""Settings that every run has."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["OptimizerConfig", "Schedule"]

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW, its learning rate over the run, and the average of the weights."""

    learning_rate: float = 5e-5
    """Peak learning rate."""
    backbone_learning_rate: float | None = None
    """Peak rate of the backbone's trainable weights (adapters or all); None: `learning_rate`."""
    weight_decay: float = 0.01
    """Acts on weight matrices only; norms, biases, queries and embeddings are never decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging of the gradient and of its square."""
    eps: float = 1e-8
    """AdamW's denominator floor."""
    schedule: Schedule = "constant"
    """Shape of the rate after warm-up."""
    final_fraction: float = 0.0
    """Where linear and cosine end, as a fraction of the peak."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up, with any schedule."""
    max_gradient_norm: float = 1.0
    """Clipping threshold, applied to the accumulated gradient; inf measures and does not clip."""
    ema_decay: float | None = 0.995
    """Average of the weights used in validation and saved as the model. It starts faster:
    min(ema_decay, (1 + n) / (10 + n)) after n steps. None: no average."""
