"""A reward that is trained further: whose weights it starts from, and what it keeps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dina_lrm.build.training import reward_model, run_training
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.runs.config import OptimizerConfig
from dina_lrm.training.config import DataConfig, HeadConfig, LossConfig, ModelConfig, TrainConfig
from tests.tiny import (
    make_tiny_reward,
    preferred_pairs,
    tiny_conditioning,
    tiny_latents,
)


@pytest.fixture(scope="module")
def trained(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardModel, Path]:
    model = make_tiny_reward(tiny_pipeline)
    return model, model.save_pretrained(tmp_path_factory.mktemp("reward") / "first")


def settings_of(model: RewardModel, pipeline: Path, folder: Path) -> ModelConfig:
    config = model.config
    return ModelConfig(
        pipeline=str(pipeline),
        start_from=str(folder),
        num_blocks=config.num_blocks,
        image_taps=config.image_taps,
        text_taps=config.text_taps,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        head=config.head,
    )


def test_a_run_starts_with_the_weights_of_a_trained_reward(
    trained: tuple[RewardModel, Path], tiny_pipeline: Path, tmp_path: Path
) -> None:
    model, folder = trained
    latents, conditioning = tiny_latents(4), tiny_conditioning(4)
    preferred_pairs(latents, conditioning).save(tmp_path / "pairs.safetensors")
    config = TrainConfig(
        model=settings_of(model, tiny_pipeline, folder),
        data=DataConfig(train=str(tmp_path / "pairs.safetensors"), validation=None),
        loss=LossConfig(likelihood="thurstone_constant"),
        optimizer=OptimizerConfig(learning_rate=1e-9, weight_decay=0.0),
        output=str(tmp_path / "run"),
        num_steps=1,
        batch_size=2,
        precision="float32",
        tensorboard=False,
        cpu=True,
    )
    further, _ = run_training(config)
    wanted = {"noise_levels": 0.4, "seed": 0}
    before = model.score_latents(latents, conditioning, **wanted)
    torch.testing.assert_close(
        further.score_latents(latents, conditioning, **wanted), before, rtol=0, atol=1e-5
    )
    fresh = reward_model(replace(config.model, start_from=None), seed=0)
    fresh.allow_untrained = True
    assert not torch.allclose(fresh.score_latents(latents, conditioning, **wanted), before, atol=1e-2)
    assert further.config.likelihood.kind == "thurstone_constant"
    assert further.config.calibrations == ()

    moved, _ = run_training(
        replace(config, optimizer=OptimizerConfig(learning_rate=1e-2), output=str(tmp_path / "moved"))
    )
    assert not torch.allclose(moved.score_latents(latents, conditioning, **wanted), before, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_blocks": 1, "image_taps": (1,), "text_taps": ()}, "model.num_blocks = 1"),
        ({"lora_rank": 3}, "model.lora_rank = 3"),
        ({"tuning": "frozen"}, "model.tuning = 'frozen'"),
        ({"head": HeadConfig(num_queries=2)}, "model.head = "),
        ({"logistic": True}, "model.logistic = True"),
    ],
)
def test_settings_that_it_cannot_have_are_named(
    trained: tuple[RewardModel, Path], tiny_pipeline: Path, changed: dict[str, object], message: str
) -> None:
    model, folder = trained
    config = replace(settings_of(model, tiny_pipeline, folder), **changed)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=message):
        reward_model(config)


def test_taps_in_another_order_are_the_same_taps(
    trained: tuple[RewardModel, Path], tiny_pipeline: Path
) -> None:
    model, folder = trained
    config = settings_of(model, tiny_pipeline, folder)
    assert reward_model(replace(config, image_taps=config.image_taps[::-1])).trained
