"""Comparing and ranking with as many levels as it takes, and scoring to a target error."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_lrm import RewardModel
from dina_lrm.checkpoints.config import AdaptiveLevels, RewardModelConfig
from dina_lrm.core.seeds import mix_seeds, text_seed
from dina_lrm.errors import InvalidInputError
from tests.tiny import PROMPT, make_tiny_reward

PLAN = AdaptiveLevels(
    noise_levels=(0.4, 0.1, 0.6),
    thresholds=(1.0, 0.5),
    scales=(0.5, 0.8, 0.6),
    offsets=(0.1, -0.1, 0.2),
    error=0.05,
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
    """(level, picture), through `score_latents`: after k levels the ensemble of the first k levels."""
    latents = model.encode_images(images)
    conditioning = model.encode_prompts(PROMPT)
    with torch.no_grad():
        levels = [
            model.score_latents(
                latents,
                conditioning,
                list(PLAN.noise_levels[: level + 1]),
                seed=mix_seeds(seed, text_seed(PROMPT)),
            )
            for level in range(3)
        ]
    return torch.stack(levels).double()


def estimates(scores: torch.Tensor) -> torch.Tensor:
    offsets, scales = torch.tensor(PLAN.offsets).double(), torch.tensor(PLAN.scales).double()
    return (scores - offsets[:, None]) / scales[:, None]


def test_a_comparison_stops_when_it_is_settled(model: RewardModel) -> None:
    """Margins at which it is final, put just below and just above what each level finds."""
    a, b = pictures(2)
    leads = view_scores(model, [a, b], seed=3).diff(dim=1)[:, 0].neg()
    below, above = (0.99 * leads.abs()).tolist(), (1.01 * leads.abs()).tolist()
    for thresholds, expected in (
        ((below[0], 0.0), 1),
        ((above[0], below[1]), 2),
        ((above[0], above[1]), 3),
    ):
        found = with_plan(model, thresholds=thresholds).compare_adaptively(PROMPT, a, b, seed=3)
        assert found.num_levels == expected
        assert found.decided == (expected < 3)
        normal = torch.distributions.Normal(0, 1)
        probability = float(normal.cdf(leads[expected - 1] / PLAN.scales[expected - 1]))
        assert found.probability == pytest.approx(probability, abs=1e-5)
        assert model.compare(PROMPT, a, b, seed=3, adaptive=True) == found.probability


def test_the_backbone_runs_once_a_view(model: RewardModel) -> None:
    with_plan(model, thresholds=(1e6, 1e6))
    levels: list[float] = []
    features_at = model.backbone.features_at

    def counted(latents: torch.Tensor, conditioning: Any, timestep: torch.Tensor, **options: Any) -> Any:
        levels.extend(model.schedule.sigma_at(timestep).tolist())
        return features_at(latents, conditioning, timestep, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.backbone, "features_at", counted)
        model.compare_adaptively(PROMPT, *pictures(2))
    wanted = [level for level in PLAN.noise_levels for _ in range(2)]
    assert levels == pytest.approx(wanted, abs=2e-3)  # the schedule's nearest entries


def test_sides_may_be_exchanged(model: RewardModel) -> None:
    with_plan(model)
    a, b = pictures(2)
    forward, backward = model.compare_adaptively(PROMPT, a, b), model.compare_adaptively(PROMPT, b, a)
    assert forward.num_levels == backward.num_levels
    assert forward.probability == pytest.approx(1 - backward.probability, abs=1e-6)


def test_a_ranking_views_what_is_not_settled(model: RewardModel) -> None:
    """With margins of 0 everything is decided at once; where nothing ever is, all pictures take every level;
    either way the order is that of the last estimates."""
    images = pictures(5)
    by_hand = view_scores(model, images, seed=1)
    found = estimates(by_hand)
    for threshold, levels in ((0.0, 1), (1e6, 3)):
        ranked = with_plan(model, thresholds=(threshold, threshold)).rank(
            PROMPT, images, seed=1, adaptive=True
        )
        assert [item.index for item in ranked] == found[levels - 1].argsort(descending=True).tolist()
        assert [item.num_levels for item in ranked] == [levels] * 5
        assert ranked[0].score == pytest.approx(float(found[levels - 1].max()), abs=1e-4)
    gap = float(by_hand[0].sort().values.diff().median())
    between = with_plan(model, thresholds=(gap, gap)).rank(PROMPT, images, seed=1, adaptive=True)
    assert sorted(item.index for item in between) == list(range(5))
    assert len({item.num_levels for item in between}) > 1
    for item in between:
        assert item.num_levels is not None
        assert item.score == pytest.approx(float(found[item.num_levels - 1, item.index]), abs=1e-4)
    for first, second in pairwise(between):
        assert first.score >= second.score
        levels = min(first.num_levels or 0, second.num_levels or 0)
        lead = by_hand[levels - 1, first.index] - by_hand[levels - 1, second.index]
        assert levels == 3 or float(lead) >= gap - 1e-5


def test_pictures_of_different_size_compare(model: RewardModel) -> None:
    with_plan(model, thresholds=(1e6, 1e6))
    found = model.compare_adaptively(PROMPT, *pictures(1), torch.rand(3, 32, 48))
    assert found.num_levels == 3
    assert 0 < found.probability < 1


def test_without_learned_views_it_says_how_to_get_them(model: RewardModel) -> None:
    model.config = replace(model.config, adaptive=None)
    for call in (model.compare_adaptively, lambda *a: model.compare(*a, adaptive=True)):
        with pytest.raises(InvalidInputError, match="evaluate --model RUN --learn-levels"):
            call(PROMPT, *pictures(2))
    with pytest.raises(InvalidInputError, match="learn-levels"):
        model.rank(PROMPT, pictures(2), adaptive=True)


def test_the_plan_travels_with_the_checkpoint(model: RewardModel, tmp_path: Path) -> None:
    with_plan(model).save_pretrained(tmp_path / "reward")
    loaded = RewardModel.from_pretrained(tmp_path / "reward")
    assert loaded.config.adaptive == PLAN
    assert RewardModelConfig.from_dict(model.config.to_dict()).adaptive == PLAN


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"thresholds": (1.0, 0.5, 0.5)}, "thresholds"),
        ({"thresholds": (1.0, -0.5)}, "thresholds"),
        ({"thresholds": (float("inf"), 0.5)}, "thresholds"),
        ({"offsets": (0.0, 0.0, float("nan"))}, "offsets"),
        ({"scales": (0.5, 0.8)}, "scales"),
        ({"scales": (0.5, 0.8, 0.0)}, "scales"),
        ({"error": 1.0}, "error"),
        ({"noise_levels": (0.4, 0.1, 1.4)}, "noise_levels"),
        ({"noise_levels": (0.4, 0.1, 0.4)}, "noise_levels"),
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
