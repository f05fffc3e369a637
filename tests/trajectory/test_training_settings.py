"""What each setting of a training run does, on thirty steps."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dina_lrm.data.latents import LatentPairs
from dina_lrm.errors import DinaError, InvalidInputError
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.training.config import DataConfig, LossConfig, NoiseConfig
from dina_lrm.training.step import draw_step, loss_level
from dina_lrm.training.trainer import train
from tests.trajectory.training_runs import CONFIG, losses, trained_values

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


def test_variance_of_several_levels_is_that_of_the_smallest() -> None:
    sigma = torch.tensor([[0.2, 0.1], [0.5, 0.1], [0.7, 0.1]])
    v = 2.0 * loss_level(sigma) ** 2 + 0.05
    torch.testing.assert_close(v, torch.tensor([2 * 0.2**2 + 0.05, 2 * 0.1**2 + 0.05]))
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
