"""Probabilities of the background thread: the library's own, kept, and told when they fail."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dina_lrm import RewardModel
from dina_lrm.serving.labelling.estimates import Estimates, model_digest
from dina_lrm.serving.labelling.items import Items, read_items
from dina_lrm.serving.labelling.store import VoteStore
from tests.rows import write_json_lines
from tests.unit.serving.labelling.conftest import write_picture

PROMPTS = ("a red circle on a gray background", "a blue square on a white background")


@pytest.fixture(scope="module")
def reward() -> RewardModel:
    return RewardModel.from_pretrained("bundled")


@pytest.fixture
def scenes(tmp_path: Path) -> Items:
    """Two prompts with three pictures each: six pairs, six pictures."""
    rows = [
        {
            "prompt": prompt,
            "images": [write_picture(tmp_path / f"{row}{n}.png", 10 * row + n) for n in range(3)],
        }
        for row, prompt in enumerate(PROMPTS)
    ]
    return read_items(write_json_lines(tmp_path / "scenes.jsonl", rows))


def estimated(
    items: Items, folder: Path, load: Callable[[], RewardModel]
) -> tuple[Estimates, list[Exception]]:
    failures: list[Exception] = []
    store = VoteStore(folder / "estimates.sqlite")
    estimates = Estimates(items, store, load, on_failure=failures.append)
    estimates.start()
    estimates._thread.join()
    store.close()
    return estimates, failures


def test_they_are_what_compare_says(scenes: Items, tmp_path: Path, reward: RewardModel) -> None:
    estimates, failures = estimated(scenes, tmp_path, lambda: reward)
    assert failures == []
    expected = [
        reward.compare(pair.prompt, scenes.pictures[pair.a], scenes.pictures[pair.b]) for pair in scenes.pairs
    ]
    np.testing.assert_allclose(estimates.probability, expected, atol=1e-5)  # float32, batches of another size
    assert estimates.status == "has looked at all 6 pairs"


def test_what_is_known_is_not_asked_again(
    scenes: Items, tmp_path: Path, reward: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = estimated(scenes, tmp_path, lambda: reward)
    monkeypatch.setattr(reward, "score", None)
    second, failures = estimated(scenes, tmp_path, lambda: reward)
    assert failures == []
    np.testing.assert_array_equal(first.probability, second.probability)


def test_each_picture_is_scored_once(
    scenes: Items, tmp_path: Path, reward: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    score = reward.score
    monkeypatch.setattr(
        reward,
        "score",
        lambda prompts, images, **k: scored.append(len(images)) or score(prompts, images, **k),
    )
    estimated(scenes, tmp_path, lambda: reward)
    assert sum(scored) == 6


def test_another_reward_is_asked_anew(scenes: Items, tmp_path: Path, reward: RewardModel) -> None:
    first, _ = estimated(scenes, tmp_path, lambda: reward)
    other = RewardModel.from_pretrained("bundled")
    weight = next(iter(other.head.parameters()))
    weight.data += 0.05
    assert model_digest(other) != model_digest(reward)
    assert model_digest(RewardModel.from_pretrained("bundled")) == model_digest(reward)
    second, _ = estimated(scenes, tmp_path, lambda: other)
    assert np.abs(first.probability - second.probability).max() > 1e-3


def test_one_bad_picture_costs_its_pairs_alone(
    scenes: Items, tmp_path: Path, reward: RewardModel, caplog: pytest.LogCaptureFixture
) -> None:
    bad = scenes.pictures[0]
    assert isinstance(bad, Path)
    bad.write_bytes(b"no picture any more")
    estimates, failures = estimated(scenes, tmp_path, lambda: reward)
    concerned = {index for index, pair in enumerate(scenes.pairs) if 0 in (pair.a, pair.b)}
    assert failures == []
    assert (
        set(estimates.unscored) == concerned == set(np.flatnonzero(np.isnan(estimates.probability)).tolist())
    )
    assert all(bad.name in reason for reason in estimates.unscored.values())
    assert estimates.status == "has looked at all 6 pairs, and could not read 2"
    assert "has no probability" in caplog.text


def test_a_reward_that_cannot_be_loaded_is_told(scenes: Items, tmp_path: Path) -> None:
    def load() -> RewardModel:
        raise ValueError("no such checkpoint")

    estimates, failures = estimated(scenes, tmp_path, load)
    assert [str(failure) for failure in failures] == ["no such checkpoint"]
    assert estimates.status == "stopped: no such checkpoint"


def test_a_later_failure_stops_nothing_else(
    scenes: Items,
    tmp_path: Path,
    reward: RewardModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("dina_lrm.serving.labelling.estimates.PAIRS_AT_ONCE", 1)
    calls = 0
    score = reward.score

    def failing(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("out of memory")
        return score(*arguments, **options)

    monkeypatch.setattr(reward, "score", failing)
    estimates, failures = estimated(scenes, tmp_path, lambda: reward)
    assert failures == []
    assert int((~np.isnan(estimates.probability)).sum()) == 1
    assert estimates.status == "stopped: out of memory"
    assert "the reward stopped" in caplog.text


def test_stopping_leaves_what_was_found(scenes: Items, tmp_path: Path, reward: RewardModel) -> None:
    store = VoteStore(tmp_path / "estimates.sqlite")
    estimates = Estimates(scenes, store, lambda: reward, on_failure=pytest.fail)
    estimates._stopping.set()
    estimates.start()
    estimates.stop()
    assert np.isnan(estimates.probability).all()
    store.close()
