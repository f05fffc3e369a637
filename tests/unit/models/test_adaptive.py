"""Comparing and ranking with as many views as it takes, and scoring to a target error."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dina_lrm import RewardModel
from dina_lrm.core.noise import seeded_noise
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.config import AdaptiveViews, RewardModelConfig
from tests.tiny import PROMPT, make_tiny_reward

PLAN = AdaptiveViews(
    noise_levels=(0.2, 0.5, 0.2, 0.4),
    gains=((0.9,), (0.5, 0.4), (0.4, 0.2, 0.3), (0.3, 0.2, 0.3, 0.1)),
    deviations=(0.5, 0.4, 0.3, 0.2),
    offsets=(0.1, -0.1, 0.1, 0.0),
    threshold=1.0,
    error=0.05,
    scale=0.8,
    num_pairs=1000,
)


@pytest.fixture(scope="module")
def model(tiny_pipeline: Path) -> RewardModel:
    return make_tiny_reward(tiny_pipeline)


def with_plan(model: RewardModel, **changes: object) -> RewardModel:
    model.config = replace(model.config, adaptive=replace(PLAN, **changes))
    return model


def pictures(count: int, size: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, size, size, generator=generator) for _ in range(count)]


def view_scores(model: RewardModel, images: list[torch.Tensor], seed: int) -> torch.Tensor:
    """(view, picture), by hand: view i of the plan with noise draw i of the seed, through `score_latents`."""
    latents = model.encode_images(images)
    noise = seeded_noise(tuple(latents.shape[1:]), [seed], num_draws=4)
    conditioning = model.encode_prompts(PROMPT)
    with torch.no_grad():
        views = [
            model.score_latents(latents, conditioning, level, noise[view].expand_as(latents))
            for view, level in enumerate(PLAN.noise_levels)
        ]
    return torch.stack(views).double()


def estimates(scores: torch.Tensor) -> torch.Tensor:
    offsets = torch.tensor(PLAN.offsets, dtype=torch.float64)[:, None]
    gains = torch.zeros(4, 4, dtype=torch.float64)
    for view, row in enumerate(PLAN.gains):
        gains[view, : view + 1] = torch.tensor(row, dtype=torch.float64)
    return gains @ (scores - offsets)


def test_a_comparison_stops_when_it_is_settled(model: RewardModel) -> None:
    a, b = pictures(2)
    leads = estimates(view_scores(model, [a, b], seed=3)).diff(dim=1)[:, 0].neg()
    certainty = (leads.abs() / torch.tensor(PLAN.deviations, dtype=torch.float64)).tolist()
    for threshold in (0.0, 0.5 * certainty[0], 1.01 * certainty[0], 1e6):
        expected = next((k for k, z in enumerate(certainty, 1) if z >= threshold), 4)
        found = with_plan(model, threshold=threshold).compare_views(PROMPT, a, b, seed=3)
        assert found.views == expected
        assert found.decided == (expected < 4)
        normal = torch.distributions.Normal(0, 1)
        assert found.probability == pytest.approx(float(normal.cdf(leads[expected - 1] / 0.8)), abs=1e-5)
        assert model.compare(PROMPT, a, b, seed=3, adaptive=True) == found.probability


def test_sides_may_be_exchanged(model: RewardModel) -> None:
    with_plan(model)
    a, b = pictures(2)
    forward, backward = model.compare_views(PROMPT, a, b), model.compare_views(PROMPT, b, a)
    assert forward.views == backward.views
    assert forward.probability == pytest.approx(1 - backward.probability, abs=1e-6)


def test_a_ranking_views_what_is_not_settled(model: RewardModel) -> None:
    """With threshold 0 everything is settled at once; at infinity all pictures take every view, and the
    order is that of the last estimates."""
    images = pictures(5)
    scores = estimates(view_scores(model, images, seed=1))
    for threshold, views in ((0.0, 1), (1e6, 4)):
        ranked = with_plan(model, threshold=threshold).rank(PROMPT, images, seed=1, adaptive=True)
        assert [item.index for item in ranked] == scores[views - 1].argsort(descending=True).tolist()
        assert [item.views for item in ranked] == [views] * 5
        assert ranked[0].score == pytest.approx(float(scores[views - 1].max()), abs=1e-5)
    between = with_plan(model, threshold=0.3).rank(PROMPT, images, seed=1, adaptive=True)
    assert sorted(item.index for item in between) == list(range(5))
    for first, second in pairwise(between):
        assert first.score >= second.score
        deviation = PLAN.deviations[min(first.views or 0, second.views or 0) - 1]
        settled = first.score - second.score >= 0.3 * deviation
        assert settled or max(first.views or 0, second.views or 0) == 4


def test_pictures_of_different_size_compare(model: RewardModel) -> None:
    with_plan(model, threshold=1e6)
    found = model.compare_views(PROMPT, *pictures(1), torch.rand(3, 32, 48))
    assert found.views == 4
    assert 0 < found.probability < 1


def test_without_learned_views_it_says_how_to_get_them(model: RewardModel) -> None:
    model.config = replace(model.config, adaptive=None)
    for call in (model.compare_views, lambda *a: model.compare(*a, adaptive=True)):
        with pytest.raises(InvalidInputError, match="evaluate --model RUN --learn-views"):
            call(PROMPT, *pictures(2))
    with pytest.raises(InvalidInputError, match="learn-views"):
        model.rank(PROMPT, pictures(2), adaptive=True)


def test_the_plan_travels_with_the_checkpoint(model: RewardModel, tmp_path: Path) -> None:
    with_plan(model).save_pretrained(tmp_path / "reward")
    loaded = RewardModel.from_pretrained(tmp_path / "reward")
    assert loaded.config.adaptive == PLAN
    assert RewardModelConfig.from_dict(model.config.to_dict()).adaptive == PLAN


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"gains": ((0.9,), (0.5,), (0.4, 0.2, 0.3), (0.3, 0.2, 0.3, 0.1))}, "gains"),
        ({"deviations": (0.5, 0.4, 0.3)}, "deviations"),
        ({"deviations": (0.5, 0.4, 0.3, 0.0)}, "deviations"),
        ({"offsets": (0.0, 0.0, 0.0, float("nan"))}, "offsets"),
        ({"threshold": -1.0}, "threshold"),
        ({"error": 1.0}, "error"),
        ({"scale": 0.0}, "scale"),
        ({"noise_levels": (0.2, 0.5, 0.2, 1.4)}, "noise_levels"),
    ],
)
def test_a_damaged_plan_is_refused(changes: dict[str, object], name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"adaptive.{name}"):
        replace(PLAN, **changes)


# --- a target error


def test_pictures_are_drawn_until_the_error_is_small(model: RewardModel) -> None:
    images = pictures(3)
    few = model.score(PROMPT, images, 0.5, num_draws=5)
    assert few.standard_errors is not None
    target = float(few.standard_errors.median())
    found = model.score(PROMPT, images, 0.5, target_error=target, max_draws=60)
    assert found.num_draws is not None
    assert found.standard_errors is not None
    for index, count in enumerate(found.num_draws.tolist()):
        assert 5 <= count <= 60
        alone = model.score(PROMPT, images[index], 0.5, num_draws=count)
        assert alone.standard_errors is not None
        assert float(found.scores[index]) == pytest.approx(float(alone.scores[0]), abs=1e-5)
        assert float(found.standard_errors[index]) == pytest.approx(float(alone.standard_errors[0]), rel=1e-3)
    assert len(set(found.num_draws.tolist())) > 1


def test_target_errors_out_of_range(model: RewardModel) -> None:
    for bad in ({"target_error": 0.0}, {"target_error": 0.1, "max_draws": 1}):
        with pytest.raises(InvalidInputError, match="target_error"):
            model.score(PROMPT, pictures(1), **bad)
