"""The model config: it survives JSON, and refuses what cannot be meant."""

import json

import pytest

from dina_lrm import Calibration, HeadConfig, InvalidInputError, LikelihoodConfig, RewardModelConfig


def test_round_trip_through_json() -> None:
    config = RewardModelConfig(
        num_blocks=12,
        image_taps=(12, 4, 8),
        text_taps=(4,),
        lora_rank=64,
        lora_alpha=128.0,
        head=HeadConfig(width=64, project_in=True),
        likelihood=LikelihoodConfig(kind="bradley_terry"),
        calibrations=(Calibration(noise_levels=(0.2, 0.5), scale=1.5),),
    )
    assert RewardModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_taps_have_one_order() -> None:
    config = RewardModelConfig(num_blocks=12, image_taps=(12, 0, 8), tuning="frozen")
    assert config.image_taps == (0, 8, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_taps": (1, 1)}, "without repeats"),
        ({"image_taps": (5,)}, "from 0 to num_blocks = 4"),
        ({"text_taps": (-1,)}, "from 0 to num_blocks = 4"),
        ({"image_taps": ()}, "at least one tap"),
        ({"num_blocks": 0}, "num_blocks = 0"),
        ({"tuning": "lora"}, "lora_rank = 0"),
        ({"noise_levels": (0.4, 1.2)}, "noise_levels = 1.2"),
        ({"noise_levels": ()}, "at least one level"),
    ],
)
def test_values_that_cannot_be_meant(changes: dict, message: str) -> None:
    settings = {"num_blocks": 4, "image_taps": (1,), "tuning": "frozen"} | changes
    with pytest.raises(InvalidInputError, match=message):
        RewardModelConfig(**settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, r"unknown entries in model: \['colour'\]"),
        ({"head": {"depth": 3}}, r"unknown entries in model.head: \['depth'\]"),
        ({"num_blocks": "4"}, "model.num_blocks = '4'"),
        ({"num_blocks": True}, "model.num_blocks = True"),
        ({"image_taps": 3}, "must be a list"),
        ({"tuning": "some"}, "one of"),
        ({"logistic": "yes"}, "of type bool"),
        ({"calibrations": [{"noise_levels": [0.4]}]}, r"missing entries in model.calibrations: \['scale'\]"),
        ({"calibrations": [{"noise_levels": [0.4], "scale": -1}]}, "above 0"),
    ],
)
def test_dictionaries_are_read_strictly(changes: dict, message: str) -> None:
    values = {"num_blocks": 4, "image_taps": [1], "tuning": "frozen"} | changes
    with pytest.raises(InvalidInputError, match=message):
        RewardModelConfig.from_dict(values)


def test_last_text_block_is_adapted_only_if_it_is_read() -> None:
    def config(**changes: object) -> RewardModelConfig:
        return RewardModelConfig(num_blocks=4, image_taps=(4,), lora_rank=2, lora_alpha=4.0, **changes)

    assert config(text_taps=(1, 4)).adapts_last_text
    assert not config(text_taps=(1, 3)).adapts_last_text
    assert not config(text_taps=()).adapts_last_text
    assert not config(text_taps=(4,), lora_last_text=False).adapts_last_text
