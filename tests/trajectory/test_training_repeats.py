"""What must not change the numbers of a training run: a stop, parts of a batch, generators, validation."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dina_lrm.checkpoints.config import HeadConfig
from dina_lrm.data.latents import LatentPairs
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.training.trainer import StepMetrics, train
from tests.trajectory.training_runs import CONFIG, assert_same, trained_values


def test_resumed_equals_uninterrupted_bit_for_bit(
    new_model: Callable[..., RewardModel],
    train_pairs: LatentPairs,
    validation_pairs: LatentPairs,
    tmp_path: Path,
) -> None:
    """With validation and a checkpoint in between, dropout, cosine rate, steps that train the ensemble."""
    config = replace(
        CONFIG,
        num_steps=16,
        ensemble_fraction=0.5,
        checkpoint_every=7,
        optimizer=replace(CONFIG.optimizer, schedule="cosine"),
        validation=replace(CONFIG.validation, every=5),
    )
    head = HeadConfig(dropout=0.1)
    whole = new_model(head=head)
    uninterrupted = train(replace(config, output=str(tmp_path / "a")), whole, train_pairs, validation_pairs)

    class Stopped(Exception):
        pass

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 10:
            raise Stopped

    part = replace(config, output=str(tmp_path / "b"))
    with pytest.raises(Stopped):  # three steps after the last checkpoint, with lines of metrics to take back
        train(part, new_model(head=head), train_pairs, validation_pairs, on_step=stop)
    again = new_model(head=head)
    torch.manual_seed(123)  # the state of the global generator must not matter
    resumed = train(replace(part, resume=True), again, train_pairs, validation_pairs)

    assert_same(trained_values(whole), trained_values(again))
    assert (resumed.best_step, resumed.best_accuracy) == (
        uninterrupted.best_step,
        uninterrupted.best_accuracy,
    )
    assert resumed.validation == uninterrupted.validation
    assert resumed.calibration_scale == uninterrupted.calibration_scale
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("a", "b")]
    assert [json.loads(line)["step"] for line in lines[0]] == [json.loads(line)["step"] for line in lines[1]]


def test_resume_refuses_other_settings_and_other_data(
    new_model: Callable[..., RewardModel],
    train_pairs: LatentPairs,
    validation_pairs: LatentPairs,
    tmp_path: Path,
) -> None:
    config = replace(CONFIG, num_steps=2, output=str(tmp_path / "run"))
    train(replace(config, resume=True), new_model(), train_pairs)  # nothing there yet: it begins
    resumed = replace(config, resume=True, num_steps=3)
    with pytest.raises(InvalidInputError, match="batch_size was 8 and is 4"):
        train(replace(resumed, batch_size=4), new_model(), train_pairs)
    with pytest.raises(InvalidInputError, match="other pairs"):
        train(resumed, new_model(), validation_pairs)
    with pytest.raises(InvalidInputError, match="needs output"):
        train(replace(resumed, output=None), new_model(), train_pairs)
    assert train(resumed, new_model(), train_pairs).steps == 3  # a longer run is allowed


def test_accumulating_two_halves_equals_one_batch(
    new_model: Callable[..., RewardModel], train_pairs: LatentPairs
) -> None:
    """Not bit for bit: sums are taken in another order. AdamW's own eps would turn the rounded sign of a
    gradient of zero into a whole step, so it is raised here; then both the largest and the mean difference
    are those of rounding."""
    config = replace(CONFIG, num_steps=10, optimizer=replace(CONFIG.optimizer, eps=1e-3))
    models = []
    for accumulation_steps in (1, 2, 4):
        model = new_model()
        train(replace(config, accumulation_steps=accumulation_steps), model, train_pairs)
        models.append(trained_values(model))
    for other in models[1:]:
        differences = torch.cat([(models[0][name] - other[name]).abs().flatten() for name in other])
        assert differences.max() < 2e-5
        assert differences.mean() < 1e-7


def test_same_seed_same_run_whatever_the_callers_generator_holds(
    new_model: Callable[..., RewardModel], train_pairs: LatentPairs
) -> None:
    values = []
    for seed in (7, 8):
        model = new_model()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        train(replace(CONFIG, num_steps=5, ensemble_fraction=0.5), model, train_pairs)
        assert torch.equal(torch.get_rng_state(), state)
        values.append(trained_values(model))
    assert_same(*values)


def test_validation_does_not_touch_training(
    new_model: Callable[..., RewardModel], train_pairs: LatentPairs, validation_pairs: LatentPairs
) -> None:
    with_validation, without = new_model(), new_model()
    config = replace(CONFIG, num_steps=10, keep="last")
    train(
        replace(config, validation=replace(config.validation, every=3)),
        with_validation,
        train_pairs,
        validation_pairs,
    )
    train(config, without, train_pairs)
    assert_same(trained_values(with_validation), trained_values(without))
