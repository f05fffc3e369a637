"""Thirty steps on a tiny random backbone: what a run must do, and what must not change it."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dina_lrm.checkpoints.config import HeadConfig
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.noise import seeded_noise
from dina_lrm.data.latents import LatentPairs
from dina_lrm.errors import DinaError, InvalidInputError
from dina_lrm.evaluation.benchmarks import evaluate_latent_pairs
from dina_lrm.files import json_types
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.runs.config import OptimizerConfig
from dina_lrm.training.config import DataConfig, LossConfig, NoiseConfig, TrainConfig, ValidationConfig
from dina_lrm.training.result import TrainResult
from dina_lrm.training.step import PairScorer, draw_step, loss_level
from dina_lrm.training.trainer import StepMetrics, train

TEXT_TOKENS = 6

CONFIG = TrainConfig(
    seed=0,
    num_steps=30,
    batch_size=8,
    log_every=5,
    checkpoint_every=1000,
    tensorboard=False,
    cpu=True,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=3, ema_decay=0.9),
    validation=ValidationConfig(every=10, noise_levels=(0.2, 0.6), ensembles=((0.2, 0.6),), max_pairs=16),
)


def make_pairs(num_pairs: int, seed: int) -> LatentPairs:
    """Of two random latents, the one with the higher mean in its first channel is preferred."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2 * num_pairs, 16, 4, 4, generator=generator)
    latents[:, 0] += torch.randn(2 * num_pairs, generator=generator)[:, None, None]
    first, second = torch.arange(num_pairs), torch.arange(num_pairs) + num_pairs
    utility = latents[:, 0].mean((1, 2))
    first_wins = utility[first] > utility[second]
    num_prompts = 8
    return LatentPairs(
        latents=latents,
        prompts=[f"prompt {i}" for i in range(num_prompts)],
        prompt_embeds=torch.randn(num_prompts, TEXT_TOKENS, 64, generator=generator),
        pooled_prompt_embeds=torch.randn(num_prompts, 64, generator=generator),
        prompt_index=torch.arange(num_pairs) % num_prompts,
        chosen=torch.where(first_wins, first, second),
        rejected=torch.where(first_wins, second, first),
        target=torch.ones(num_pairs),
        bayes=torch.ones(num_pairs),
    )


@pytest.fixture(scope="module")
def train_pairs() -> LatentPairs:
    return make_pairs(64, seed=1)


@pytest.fixture(scope="module")
def validation_pairs() -> LatentPairs:
    return make_pairs(24, seed=2)


@pytest.fixture
def new_model(tiny_backbone: Path) -> Callable[..., RewardModel]:
    def make(**settings: object) -> RewardModel:
        settings = {"num_blocks": 2, "image_taps": (1, 2), "text_taps": (1,), "lora_rank": 2} | settings
        return RewardModel.initialize(str(tiny_backbone), seed=0, **settings)

    return make


def trained_values(model: RewardModel) -> dict[str, Tensor]:
    model.train()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


def losses(result: TrainResult) -> list[float]:
    return [metrics.loss for metrics in result.history if metrics.loss is not None]


def margins(model: RewardModel, pairs: LatentPairs, levels: list[float]) -> Tensor:
    batch = pairs.batch(range(len(pairs)))
    conditioning = Conditioning(batch.prompt_embeds, batch.pooled_prompt_embeds)
    noise = torch.randn(batch.latents_chosen.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chosen, rejected = (
            model.score_latents(latents, conditioning, noise_levels=levels, noise=noise)
            for latents in (batch.latents_chosen, batch.latents_rejected)
        )
    return chosen - rejected


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
    assert model.config.calibration is not None
    assert model.config.calibration.scale == result.calibration_scale
    best = max(result.validation.values())
    assert result.validation["+".join(f"{level:g}" for level in model.config.noise_levels)] == best

    loaded = RewardModel.from_pretrained(tmp_path / "run", pipeline=str(tiny_backbone))
    assert loaded.config.calibration == model.config.calibration
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
    assert (model.config.noise_levels, model.config.calibration) == (default, None)


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


# --- what must not change the numbers


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


# --- draws


def test_noise_levels_and_seeds_depend_on_the_step_only() -> None:
    config = replace(CONFIG, ensemble_fraction=0.5, ensemble_sizes=(2, 3))
    again = draw_step(config, 4)
    assert torch.equal(draw_step(config, 4).sigma, again.sigma)
    assert draw_step(config, 4).noise_seeds == again.noise_seeds
    assert draw_step(config, 5).noise_seeds != again.noise_seeds
    sizes = [len(draw_step(config, step).sigma) for step in range(400)]
    assert set(sizes) == {1, 2, 3}
    assert sizes.count(1) / 400 == pytest.approx(0.5, abs=0.1)
    assert draw_step(replace(config, ensemble_fraction=0.0), 4).noise_seeds == again.noise_seeds


def test_variance_of_several_levels_is_their_mean() -> None:
    sigma = torch.tensor([[0.2, 0.1], [0.5, 0.1], [0.7, 0.1]])
    v = 2.0 * loss_level(sigma) ** 2 + 0.05
    torch.testing.assert_close(v, (2.0 * sigma**2 + 0.05).mean(0))
    assert torch.equal(loss_level(sigma[:1]), sigma[0])


# --- settings


@pytest.mark.parametrize(
    "likelihood", ["thurstone", "thurstone_constant", "bradley_terry", "bradley_terry_margin"]
)
@pytest.mark.parametrize("loss", ["fidelity", "log_likelihood"])
def test_every_likelihood_trains(
    likelihood: str, loss: str, new_model: Callable[..., RewardModel], train_pairs: LatentPairs
) -> None:
    config = replace(CONFIG, num_steps=3, log_every=1, loss=LossConfig(likelihood=likelihood, loss=loss))
    assert all(map(math.isfinite, losses(train(config, new_model(), train_pairs))))


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal", "mode", "power", "beta", "constant"])
def test_every_noise_distribution_can_be_drawn(distribution: str) -> None:
    sigma = draw_step(replace(CONFIG, noise=NoiseConfig(distribution=distribution)), 0).sigma
    assert sigma.shape == (1, 8)
    assert bool(((sigma >= 0) & (sigma <= 1)).all())


def test_votes_against_the_chosen_side_pull_the_other_way(
    new_model: Callable[..., RewardModel], train_pairs: LatentPairs
) -> None:
    """Swapping sides and votes is the same data: the same run, to rounding. "majority" makes votes labels."""
    swapped = replace(
        train_pairs,
        chosen=train_pairs.rejected,
        rejected=train_pairs.chosen,
        target=torch.full((64,), 0.2),
    )
    straight = replace(train_pairs, target=torch.full((64,), 0.8))
    curves = [
        losses(train(replace(CONFIG, num_steps=5, log_every=1), new_model(), p)) for p in (straight, swapped)
    ]
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    majority = replace(CONFIG, num_steps=5, log_every=1, data=DataConfig(labels="majority"))
    plain = losses(train(replace(CONFIG, num_steps=5, log_every=1), new_model(), train_pairs))
    assert losses(train(majority, new_model(), straight)) == plain


def test_bfloat16_keeps_float32_weights(
    new_model: Callable[..., RewardModel], train_pairs: LatentPairs
) -> None:
    model = new_model()
    config = replace(CONFIG, num_steps=4, log_every=1, accumulation_steps=2)
    result = train(replace(config, precision="bfloat16"), model, train_pairs)
    reference = train(config, new_model(), train_pairs)
    assert {value.dtype for value in trained_values(model).values()} == {torch.float32}
    assert losses(result) == pytest.approx(losses(reference), abs=0.03)


def test_a_time_budget_stops_cleanly(
    new_model: Callable[..., RewardModel],
    train_pairs: LatentPairs,
    validation_pairs: LatentPairs,
    tmp_path: Path,
) -> None:
    config = replace(CONFIG, num_steps=10**6, time_budget_seconds=0.5, output=str(tmp_path))
    result = train(config, new_model(), train_pairs, validation_pairs)
    assert result.stopped_by == "time_budget"
    assert 1 <= result.steps < 10**6
    assert result.margins is not None
    assert (
        json.loads((tmp_path / "last" / "training_state" / "position.json").read_text())["step"]
        == result.steps
    )


def test_divergence_is_an_error_that_says_so(
    new_model: Callable[..., RewardModel], train_pairs: LatentPairs
) -> None:
    optimizer = replace(CONFIG.optimizer, learning_rate=1e30, max_gradient_norm=math.inf)
    with pytest.raises(DinaError, match="diverged"):
        train(replace(CONFIG, optimizer=optimizer), new_model(), train_pairs)


def test_no_pairs_is_an_error(new_model: Callable[..., RewardModel], train_pairs: LatentPairs) -> None:
    with pytest.raises(InvalidInputError, match="no training pairs"):
        train(CONFIG, new_model(), train_pairs.subset([]))
