"""What the README.md of a trained run says: data, validation, accuracy, calibration, cost, versions."""

import math
from collections.abc import Sequence
from dataclasses import replace

from dina_lrm.checkpoints.config import RewardModelConfig
from dina_lrm.checkpoints.dina import library_versions
from dina_lrm.evaluation.metrics import cluster_bootstrap, pair_correctness, reliability
from dina_lrm.models.scoring import perceived_variance
from dina_lrm.training.config import TrainConfig
from dina_lrm.training.result import TrainResult
from dina_lrm.training.validation import Levels, ValidationMargins, levels_label

__all__ = ["training_card"]


def training_card(
    config: TrainConfig, model: RewardModelConfig, pairs: Sequence[str], result: TrainResult
) -> str:
    """Markdown for the model card.

    Args:
        model: of the trained model.
        pairs: lines about training and validation pairs.
    """
    best = "" if result.best_step is None else f", best validation at step {result.best_step}"
    lines = ["## Training", "", *(f"- {line}" for line in pairs)]
    if config.model.start_from is not None:
        lines.append(f"- started from the weights of {config.model.start_from}")
    lines += [
        f"- {result.steps} steps of {config.batch_size} pairs in {result.seconds:.0f} s, stopped by "
        f"{result.stopped_by.replace('_', ' ')}{best}, the {config.keep} weights kept; seed {config.seed}",
        "- versions: " + ", ".join(f"{name} {version}" for name, version in library_versions().items()),
    ]
    margins = result.margins
    if margins is None:
        return "\n".join([*lines, "- no validation: neither accuracy nor calibration is known"])
    lines += ["", "## Validation", ""]
    if result.uncalibrated is not None:
        lines.append(f"- {result.uncalibrated}")
    elif result.noise_levels is not None:
        lines.append(f"- calibration: {_calibration(model, result.noise_levels, margins)}")
    lines += ["", "| noise levels | accuracy % | 95 % interval |", "|---|--:|---|"]
    for levels in margins.by_levels:
        name = levels_label(levels) + (" (default)" if levels == model.noise_levels else "")
        lines.append(f"| {name} | {_accuracy(levels, margins)} |")
    lines += [
        "",
        f"Of {len(margins.target)} pairs of {len(margins.prompt.unique())} prompts; equal scores count as "
        "wrong, intervals resample prompts. The default levels and the calibration were chosen on these "
        "pairs, so other pairs tell better how good the reward is: `dina-lrm evaluate`.",
    ]
    return "\n".join(lines)


def _accuracy(levels: Levels, margins: ValidationMargins) -> str:
    correct = pair_correctness(margins.by_levels[levels].numpy(), margins.target.numpy())
    found = cluster_bootstrap(correct, margins.prompt.numpy())
    if math.isnan(found.value):
        return "- | no pair with a majority"
    interval = "one prompt: no interval" if math.isnan(found.low) else ""
    return f"{100 * found.value:.1f} | {interval or f'{100 * found.low:.1f} to {100 * found.high:.1f}'}"


def _calibration(model: RewardModelConfig, levels: Levels, margins: ValidationMargins) -> str:
    """The fitted scale and how far stated probabilities are from what came true, with it and without."""
    calibration = model.calibration_at(levels)
    assert calibration is not None
    scale = calibration.scale

    def error(scale: float) -> str:
        bins = reliability(margins.by_levels[levels].numpy(), margins.target.numpy(), scale=scale)
        return f"{100 * bins.expected_calibration_error:.1f} %"

    text = f"P(a preferred) = Phi(score difference / {scale:.4g}); expected calibration error {error(scale)}"
    variance = perceived_variance(levels, replace(model, calibrations=()))
    return text if variance is None else f"{text}, {error(math.sqrt(2 * variance))} without it"
