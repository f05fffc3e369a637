"""Thirty steps on a tiny random backbone: what a run learns, and which weights it keeps."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dina_lrm.core.noise import seeded_noise
from dina_lrm.data.latents import LatentPairs
from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.benchmarks import evaluate_latent_pairs
from dina_lrm.files import json_types
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.training.step import PairScorer, draw_step
from dina_lrm.training.trainer import StepMetrics, train
from dina_lrm.training.validation import levels_label
from tests.trajectory.training_runs import CONFIG, assert_same, losses, make_pairs, margins, trained_values

# --- a run learns, and ends in a usable model


@pytest.mark.parametrize("tuning", ["lora", "frozen", "full"])
def test_loss_falls_and_only_what_should_train_moves(
    tuning: str,
    new_model: Callable[..., RewardModel],
    train_pairs: LatentPairs,
    validation_pairs: LatentPairs,
) -> None:
    model = new_model(tuning=tuning, lora_rank=2 if tuning == "lora" else 0)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = trained_values(model)
    result = train(replace(CONFIG, num_steps=60), model, train_pairs, validation_pairs)
    curve = losses(result)
    assert sum(curve[-3:]) < 0.8 * sum(curve[:3])
    assert result.best_accuracy is not None
    assert result.best_accuracy > 0.7
    moved = [name for name, value in trained_values(model).items() if not torch.equal(value, before[name])]
    assert len(moved) > 0.9 * len(before)  # a last text projection may not reach the score
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_the_trained_model_has_defaults_from_validation_and_loads_again(
    new_model: Callable[..., RewardModel],
    train_pairs: LatentPairs,
    tiny_backbone: Path,
    tmp_path: Path,
) -> None:
    model = new_model()
    validation_pairs = make_pairs(64, seed=2)
    result = train(replace(CONFIG, output=str(tmp_path / "run")), model, train_pairs, validation_pairs)
    assert set(result.validation) == {"0.2", "0.6", "0.2+0.6"}
    assert model.trained
    assert model.config.noise_levels == result.noise_levels
    default = model.config.calibration_at(model.config.noise_levels)
    assert default is not None
    assert default.scale == result.calibration_scale
    fitted = {levels_label(one.noise_levels) for one in model.config.calibrations}
    assert fitted == set(result.validation)
    best = max(result.validation.values())
    assert result.validation["+".join(f"{level:g}" for level in model.config.noise_levels)] == best

    loaded = RewardModel.from_pretrained(tmp_path / "run", pipeline=str(tiny_backbone))
    assert loaded.config.calibrations == model.config.calibrations
    for levels in ([0.2], [0.2, 0.6]):
        assert torch.equal(
            margins(loaded, validation_pairs, levels), margins(model, validation_pairs, levels)
        )
    for name in ("best", "last"):
        RewardModel.from_pretrained(tmp_path / "run" / name, pipeline=str(tiny_backbone))
    evaluation = evaluate_latent_pairs(
        loaded, validation_pairs, noise_levels=(0.2, 0.6), ensembles=((0.2, 0.6),), num_draws=2
    )
    assert evaluation.default.reliability.scale == result.calibration_scale


def test_validation_that_a_coin_could_reach_chooses_nothing(
    new_model: Callable[..., RewardModel], train_pairs: LatentPairs, tmp_path: Path
) -> None:
    """Votes that have nothing to do with the pictures: the default level stays, no scale is stored."""
    noise = make_pairs(64, seed=2)
    coin = torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.5
    noise = replace(noise, target=coin.float())
    model = new_model()
    default = model.config.noise_levels
    result = train(replace(CONFIG, num_steps=3, output=str(tmp_path)), model, train_pairs, noise)
    assert result.noise_levels is None
    assert result.calibration_scale is None
    assert result.uncalibrated is not None
    assert "of 64 validation pairs right, which a coin may get too" in result.uncalibrated
    assert (model.config.noise_levels, model.config.calibrations) == (default, ())


def test_a_batch_larger_than_the_pairs_is_refused_by_name(
    new_model: Callable[..., RewardModel], train_pairs: LatentPairs
) -> None:
    with pytest.raises(InvalidInputError, match=r"batch_size = 100000: must be in \[1, 64\]"):
        train(replace(CONFIG, batch_size=100_000), new_model(), train_pairs)


def test_metrics_are_written_and_told(
    new_model: Callable[..., RewardModel],
    train_pairs: LatentPairs,
    validation_pairs: LatentPairs,
    tmp_path: Path,
) -> None:
    told: list[StepMetrics] = []
    config = replace(CONFIG, output=str(tmp_path), num_steps=10, tensorboard=True)
    train(config, new_model(), train_pairs, validation_pairs, on_step=told.append)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [metrics.step for metrics in told] == [5, 10, 10]
    assert lines[0]["loss"] > 0
    assert lines[0]["epoch"] == 5 * 8 / 64
    assert set(lines[2]["validation"]) == {"0.2", "0.6", "0.2+0.6"}
    assert json.loads((tmp_path / "train_config.json").read_text()) == json_types(config)
    assert list((tmp_path / "tensorboard").glob("events*"))


# --- the average of the weights


def test_the_average_is_what_is_kept(
    new_model: Callable[..., RewardModel], train_pairs: LatentPairs, tmp_path: Path
) -> None:
    """Against the same average computed here from runs that are stopped after every step."""
    decay, num_steps = 0.6, 6
    raw = []
    for steps in range(1, num_steps + 1):
        model = new_model()
        no_average = replace(CONFIG.optimizer, ema_decay=None)
        train(replace(CONFIG, num_steps=steps, optimizer=no_average), model, train_pairs)
        raw.append(trained_values(model))
    expected = raw[0]
    for step, values in enumerate(raw[1:], start=1):
        keep = min(decay, (1 + step) / (10 + step))
        expected = {name: keep * expected[name] + (1 - keep) * values[name] for name in expected}
    model = new_model()
    settings = replace(CONFIG.optimizer, ema_decay=decay)
    config = replace(CONFIG, num_steps=num_steps, optimizer=settings, output=str(tmp_path / "run"))
    train(config, model, train_pairs)
    for name, value in trained_values(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    kept, last = (
        load_file(folder / "reward_head.safetensors") for folder in (tmp_path / "run", tmp_path / "run/last")
    )
    assert_same(kept, last)
    assert any(not torch.equal(expected[name], raw[-1][name]) for name in expected)


def test_the_best_validation_is_kept_or_the_last(
    new_model: Callable[..., RewardModel], train_pairs: LatentPairs, validation_pairs: LatentPairs
) -> None:
    """A rate that wrecks the model late: best and last differ, and `keep` decides."""
    config = replace(CONFIG, num_steps=12, validation=replace(CONFIG.validation, every=1))
    best, last = new_model(), new_model()
    result = train(config, best, train_pairs, validation_pairs)
    train(replace(config, keep="last"), last, train_pairs, validation_pairs)
    accuracies = [max(m.validation.values()) for m in result.history if m.validation is not None]
    assert result.best_accuracy == max(accuracies)
    assert result.best_step == 1 + accuracies.index(max(accuracies))
    stopped = new_model()
    train(replace(config, num_steps=result.best_step, keep="last"), stopped, train_pairs)
    assert_same(trained_values(best), trained_values(stopped))
    if result.best_step != 12:
        assert any(not torch.equal(v, trained_values(best)[n]) for n, v in trained_values(last).items())


# --- pairs of one prompt together


def test_sharing_images_changes_the_cost_and_not_the_scores(
    new_model: Callable[..., RewardModel], train_pairs: LatentPairs
) -> None:
    """Four images of each prompt in all six pairs are scored once each, as every pair would be alone."""
    combinations = torch.combinations(torch.arange(4))
    chosen = torch.cat([combinations[:, 0] + 4 * prompt for prompt in range(3)])
    rejected = torch.cat([combinations[:, 1] + 4 * prompt for prompt in range(3)])
    prompt_index = torch.arange(3).repeat_interleave(6)
    pairs = replace(
        train_pairs,
        chosen=chosen,
        rejected=rejected,
        prompt_index=prompt_index,
        target=torch.ones(18),
        bayes=None,
    )
    draws = draw_step(replace(CONFIG, batch_size=18), 0).shared(prompt_index * 6)
    noise = seeded_noise(tuple(pairs.latents.shape[1:]), draws.noise_seeds)[0]
    scorer = PairScorer(new_model().eval())
    sigma = scorer.model.schedule.match(draws.sigma.flatten()).sigma.reshape(draws.sigma.shape)
    together, alone = pairs.batch(range(18), draws=prompt_index), pairs.batch(range(18))
    assert len(together.distinct) == 12
    assert len(alone.distinct) == 36
    with torch.no_grad():
        for a, b in zip(scorer(together, noise, sigma), scorer(alone, noise, sigma), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_grouped_run_learns_and_does_not_depend_on_how_its_batch_is_cut(
    new_model: Callable[..., RewardModel], train_pairs: LatentPairs, validation_pairs: LatentPairs
) -> None:
    config = replace(CONFIG, group_by_prompt=True, num_steps=20, ensemble_fraction=0.2)
    curve = losses(train(config, new_model(), train_pairs, validation_pairs))
    assert curve[-1] < curve[0]

    config = replace(
        config, num_steps=10, optimizer=replace(CONFIG.optimizer, eps=1e-3)
    )  # as for plain batches
    whole, parts = new_model(), new_model()
    train(config, whole, train_pairs)
    train(replace(config, accumulation_steps=2), parts, train_pairs)
    values = trained_values(parts)
    differences = torch.cat([(v - values[name]).abs().flatten() for name, v in trained_values(whole).items()])
    assert differences.max() < 2e-5
    assert differences.mean() < 1e-7
