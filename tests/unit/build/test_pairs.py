"""From a config to a run: rows on disk become a trained reward, resumed and reloaded."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dina_lrm.build.pairs import raw_source
from dina_lrm.build.training import reward_model, run_training
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.runs.config import OptimizerConfig
from dina_lrm.training.config import DataConfig, ModelConfig, TrainConfig, ValidationConfig
from tests.pictures import noise_picture
from tests.rows import write_json_lines


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright pictures are preferred to dark ones; one row is unusable."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for index in range(6):
        for place, (side, level) in enumerate((("chosen", 200), ("rejected", 50))):
            picture = noise_picture(
                2 * index + place, 32 + 16 * (index % 2), 32, low=level - 40, high=level + 40
            )
            picture.save(folder / f"{index}-{side}.png")
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
    return write_json_lines(folder / "rows.jsonl", lines)


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


@pytest.mark.long
def test_rows_to_a_reward_and_on(tiny_pipeline: Path, rows: Path, tmp_path: Path) -> None:
    """Pictures of several sizes; prepared once, then found by the run that goes on."""
    told: list[str] = []
    config = make_config(tiny_pipeline, rows, tmp_path / "run")
    model, result = run_training(config, log=told.append)
    assert result.steps == 2
    assert model.trained
    assert any("train: 6 pairs of 2 prompts" in line and "2 comparisons could not" in line for line in told)
    assert "validation shares prompts with the training pairs: 2 of its 2" in told
    prepared = tmp_path / "run" / "pairs" / "train"
    rejects = [json.loads(line) for line in (prepared / "rejects.jsonl").read_text().splitlines()]
    assert sorted(reject["reason"].split(":")[0] for reject in rejects) == [
        "missing file",
        "unreadable image",
    ]
    shard = prepared / "pairs" / "part-00000.parquet"
    written = shard.stat().st_mtime_ns
    trained, resumed = run_training(replace(config, resume=True, num_steps=3))
    assert resumed.steps == 3
    assert shard.stat().st_mtime_ns == written
    # A job that is restarted after its end changes nothing.
    again, _ = run_training(replace(config, resume=True, num_steps=3))
    assert again.trained
    loaded = RewardModel.from_pretrained(tmp_path / "run")
    assert loaded.trained
    assert loaded.config.noise_levels == (0.4,)
    assert (
        0 <= loaded.compare("a red circle", rows.parent / "0-chosen.png", rows.parent / "0-rejected.png") <= 1
    )
    card = (tmp_path / "run" / "README.md").read_text()
    for fact in ("6 pairs of 2 prompts from", "2 comparisons could not be used", "3 steps of 4 pairs"):
        assert fact in card
    assert "| 0.4 (default) |" in card
    assert "seed 0" in card
    assert "torch" in card
    assert trained.card is not None
    assert loaded.card is not None
    # The restart wrote the card again, and the seconds of a run are not the same twice.
    assert _without_seconds(trained.card) == _without_seconds(loaded.card)
    assert card.endswith(loaded.card + "\n")
    assert "training step" in card


def _without_seconds(card: str) -> str:
    text, changed = re.subn(r"pairs in \d+ s, stopped", "pairs, stopped", card)
    assert changed == 1
    return text


@pytest.mark.long
def test_own_pairs_are_validated_on_a_part_of_them(tiny_pipeline: Path, tmp_path: Path) -> None:
    """A folder of pairs, no word about validation, no output."""
    for index in range(10):
        (tmp_path / f"{index}.txt").write_text(f"prompt {index}")
        for place, side in enumerate(("chosen", "rejected")):
            picture = noise_picture(2 * index + place, 32 + 16 * (index % 2), 32)
            picture.save(tmp_path / f"{index}.{side}.png")
    base = make_config(tiny_pipeline, tmp_path, tmp_path / "run")
    told: list[str] = []
    config = replace(base, data=DataConfig(train=str(tmp_path), validation_fraction=0.2), output=None)
    _, result = run_training(config, log=told.append)
    assert result.margins is not None
    assert len(result.margins.target) == 2
    assert any(line.startswith("validation: 2 of these pairs, of 2 prompts, set aside") for line in told)
    assert any(line.startswith("warning: ") and "a coin may get too" in line for line in told)
    assert not any("shapes" in line for line in told)


@pytest.mark.long
def test_pairs_that_cannot_be_split_name_the_ways_out(tiny_pipeline: Path, rows: Path) -> None:
    config = make_config(tiny_pipeline, rows, rows.parent / "run")
    config = replace(config, data=DataConfig(train=str(rows)), output=None)
    with pytest.raises(InvalidInputError, match=r"--data.validation FILE.*--data.validation None"):
        run_training(config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(train="rows.jsonl"), r"batch_size = 100000: must be in \[1, 8\]"),
        (DataConfig(train="rows.csv"), r"batch_size = 100000: must be in \[1, 2\]"),
        (DataConfig(train="shapes", train_prompts=5), r"batch_size = 100000: must be in \[1, 30\]"),
        (DataConfig(train=None), "give training pairs, --data.train"),
        (DataConfig(train="nowhere.jsonl"), "no pairs at 'nowhere.jsonl'"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_anything_is_made(
    data: DataConfig, message: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline is not there: nothing has tried to open it."""
    monkeypatch.chdir(rows.parent)
    Path("rows.csv").write_text(
        "prompt,chosen,rejected\np,0-chosen.png,0-rejected.png\np,gone.png,0-chosen.png\n"
    )
    config = replace(make_config(tmp_path / "absent", rows, tmp_path / "run"), data=data)
    with pytest.raises(InvalidInputError, match=message):
        run_training(replace(config, batch_size=100_000))


def test_new_weights_follow_from_the_seed(tiny_backbone: Path) -> None:
    config = ModelConfig(
        pipeline=str(tiny_backbone), num_blocks=2, image_taps=(2,), text_taps=(), tuning="frozen"
    )
    heads = [reward_model(config, seed=seed).head.query_tokens for seed in (0, 0, 1)]
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(heads[2])


def test_a_folder_without_pairs_and_one_with_two_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="holds no pairs"):
        raw_source(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "prepare.json").write_text("{}")
    with pytest.raises(InvalidInputError) as caught:
        raw_source(tmp_path)
    assert f"train on {tmp_path / 'train'}, evaluate on {tmp_path / 'test'}" in str(caught.value)
    assert raw_source(tmp_path / "train") is None
