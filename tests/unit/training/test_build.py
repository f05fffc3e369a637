"""From a config to a run: rows on disk become a trained reward, resumed and reloaded."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dina_lrm.build import latent_pairs, reward_model, run_training
from dina_lrm.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig, ValidationConfig
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.reward_model import RewardModel


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright pictures are preferred to dark ones; one row is unusable."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    lines = []
    for index in range(6):
        for side, level in (("chosen", 200), ("rejected", 50)):
            pixels = rng.integers(level - 40, level + 40, size=(32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}-{side}.png")
        lines.append(
            {
                "prompt": "a red circle" if index % 2 else "a blue square",
                "chosen": f"{index}-chosen.png",
                "rejected": f"{index}-rejected.png",
            }
        )
    (folder / "broken.png").write_bytes(b"no picture")
    lines.append(lines[0] | {"chosen": "broken.png"})
    lines.append(lines[0] | {"chosen": "gone.png"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def make_config(pipeline: Path, rows: Path, output: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            pipeline=str(pipeline), num_blocks=2, image_taps=(1, 2), text_taps=(1,), lora_rank=2
        ),
        data=DataConfig(train=str(rows), validation=str(rows)),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        validation=ValidationConfig(every=2, noise_levels=(0.4,), ensembles=()),
        output=str(output),
        num_steps=2,
        batch_size=4,
        tensorboard=False,
        cpu=True,
    )


def test_rows_to_a_reward_and_on(tiny_pipeline: Path, rows: Path, tmp_path: Path) -> None:
    told: list[str] = []
    config = make_config(tiny_pipeline, rows, tmp_path / "run")
    model, result = run_training(config, log=told.append)
    assert result.steps == 2
    assert model.trained
    assert any("6 pairs of 2 prompts" in line for line in told)
    rejects = [
        json.loads(line) for line in (tmp_path / "run" / "rejects_train.jsonl").read_text().splitlines()
    ]
    assert sorted(reject["reason"].split(":")[0] for reject in rejects) == [
        "missing file",
        "unreadable image",
    ]
    rows_after = (tmp_path / "run" / "pairs" / "train.safetensors").stat().st_mtime_ns
    _, resumed = run_training(replace(config, resume=True, num_steps=3))
    assert resumed.steps == 3
    assert (tmp_path / "run" / "pairs" / "train.safetensors").stat().st_mtime_ns == rows_after
    loaded = RewardModel.from_pretrained(tmp_path / "run")
    assert loaded.config.noise_levels == (0.4,)
    assert (
        0 <= loaded.compare("a red circle", rows.parent / "0-chosen.png", rows.parent / "0-rejected.png") <= 1
    )


def test_new_weights_follow_from_the_seed(tiny_backbone: Path) -> None:
    config = ModelConfig(
        pipeline=str(tiny_backbone), num_blocks=2, image_taps=(2,), text_taps=(), tuning="frozen"
    )
    heads = [reward_model(config, seed=seed).head.query_tokens for seed in (0, 0, 1)]
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(heads[2])


def test_an_unknown_source_is_an_error(tiny_backbone: Path) -> None:
    config = ModelConfig(pipeline=str(tiny_backbone), num_blocks=1, image_taps=(1,), text_taps=())
    with pytest.raises(InvalidInputError, match=r"not 'pairs\.csv'"):
        latent_pairs("pairs.csv", reward_model(config))
