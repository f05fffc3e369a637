"""HPSv3's calls, in both of its orders, and what DanceGRPO does with the answer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm
from torch import Tensor

from dina_lrm import InvalidInputError, LikelihoodConfig, RewardModel
from dina_lrm.integrations import local
from dina_lrm.integrations.hpsv3 import HPSv3RewardInferencer, HPSv3RewardInferencerV1
from dina_lrm.models.scoring import perceived_variance

BUNDLED: dict[str, Any] = {"checkpoint_path": "bundled", "device": "cpu"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, pictures: Tensor) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for index, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"flux_0_{index}.png")
    return [str(folder / f"flux_0_{index}.png") for index in range(2)]


def test_later_versions_take_prompts_first(
    bundled: RewardModel, prompts: list[str], files: list[str]
) -> None:
    rewards = HPSv3RewardInferencer(**BUNDLED, seed=3).reward(prompts, files)
    assert rewards.shape == (2, 2)
    assert torch.equal(rewards[:, 0], bundled.score(prompts, files, seed=3).scores)
    assert rewards[0][0].item() != rewards[1][0].item()


def test_dance_grpo_calls_release_1_with_one_picture_at_a_time(
    bundled: RewardModel, prompts: list[str], files: list[str]
) -> None:
    reward_model = HPSv3RewardInferencerV1(None, "bundled", "cpu")
    all_rewards = []
    for path, caption in zip(files, prompts, strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reward = reward_model.reward([path], [caption])
        if reward.ndim == 2:
            reward = reward[:, 0]
        all_rewards.append(reward)
    expected = bundled.score(prompts, files, seed=0).scores
    torch.testing.assert_close(torch.cat(all_rewards), expected, atol=1e-4, rtol=1e-5)


def test_keywords_work_with_both(prompts: list[str], files: list[str]) -> None:
    first = HPSv3RewardInferencer(**BUNDLED).reward(prompts=prompts, image_paths=files)
    second = HPSv3RewardInferencerV1(**BUNDLED).reward(prompts=prompts, image_paths=files)
    assert torch.equal(first, second)


@pytest.mark.parametrize("noise_levels", [None, 0.4, [0.2, 0.7]])
def test_scores_and_deviations_give_the_probability_of_compare(
    bundled: RewardModel, prompts: list[str], files: list[str], noise_levels: Any
) -> None:
    inferencer = HPSv3RewardInferencer(**BUNDLED, noise_levels=noise_levels)
    (score_a, deviation_a), (score_b, deviation_b) = inferencer.reward([prompts[0]] * 2, files).tolist()
    by_hand = norm.cdf((score_a - score_b) / (deviation_a**2 + deviation_b**2) ** 0.5)
    expected = bundled.compare(prompts[0], *files, noise_levels)
    assert by_hand == pytest.approx(expected, rel=1e-5)
    levels = np.atleast_1d(bundled.config.noise_levels if noise_levels is None else noise_levels).tolist()
    assert deviation_a**2 == pytest.approx(perceived_variance(levels, bundled.config))


def test_the_papers_reward_unless_another_is_named(
    bundled: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *a, **k: asked.append((a, k)) or bundled)
    try:
        HPSv3RewardInferencer(device="cpu")
    finally:
        local._loaded.cache_clear()
    assert asked == [(("liuhuohuo/DiNa-LRM-SD35M-12layers", None), {"device": "cpu", "dtype": None})]


def test_a_logistic_reward_has_no_deviation(bundled: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    local._loaded.cache_clear()
    config = replace(bundled.config, likelihood=LikelihoodConfig(kind="bradley_terry"))
    monkeypatch.setattr(bundled, "config", config)
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *_, **__: bundled)
    try:
        with pytest.raises(InvalidInputError, match=r"no calibration at noise levels \[0.35"):
            HPSv3RewardInferencer(**BUNDLED, noise_levels=0.35)
        HPSv3RewardInferencer(**BUNDLED)  # calibrated at its own levels
    finally:
        local._loaded.cache_clear()


def test_arguments_in_the_other_order_are_an_error_that_names_the_order(
    prompts: list[str], files: list[str]
) -> None:
    with pytest.raises(
        InvalidInputError,
        match=r"image_paths\[0\] = 'a red.*of HPSv3RewardInferencer is reward\(prompts, image_paths\)",
    ):
        HPSv3RewardInferencer(**BUNDLED).reward(files, prompts)
    with pytest.raises(InvalidInputError, match=r"HPSv3RewardInferencerV1 is reward\(image_paths, prompts\)"):
        HPSv3RewardInferencerV1(**BUNDLED).reward(prompts, files)


def test_wrong_arguments(tmp_path: Path, prompts: list[str], files: list[str]) -> None:
    inferencer = HPSv3RewardInferencer(**BUNDLED)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(InvalidInputError, match="not a readable image"):
        inferencer.reward(prompts, [files[0], str(broken)])
    with pytest.raises(InvalidInputError, match="1 prompts for 2 image_paths"):
        inferencer.reward(prompts[:1], files)
    with pytest.raises(InvalidInputError, match="image_paths is one string"):
        inferencer.reward(prompts, files[0])
    with pytest.raises(InvalidInputError, match="it must be None"):
        HPSv3RewardInferencer("HPSv3_7B.yaml", "bundled", "cpu")
    with pytest.raises(InvalidInputError, match="differentiable = True"):
        HPSv3RewardInferencer(**BUNDLED, differentiable=True)
