"""`dina-lrm train`: what it says to type next."""

import json
from pathlib import Path

import pytest

from dina_lrm.cli.train import resuming, unseen_pairs


def test_the_command_that_goes_on_is_the_users_own() -> None:
    assert (
        resuming("train", ["bundled", "--output", "my run"])
        == "dina-lrm train bundled --output 'my run' --resume"
    )
    assert resuming("train", ["bundled", "--resume"]) == "dina-lrm train bundled --resume"


def test_shapes_are_named_after_training_on_shapes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("latents/train", "latents/test", "alone"):
        Path(folder).mkdir(parents=True)
        Path(folder, "manifest.json").write_text("{}")
        Path(folder, "prepare.json").write_text(json.dumps({"source": "hpdv3"}))
    hints = {
        "shapes": "--benchmark shapes",
        "latents/train": "--pairs latents/test",
        "alone": "--benchmark hpdv3 --root FOLDER",
        "rows.jsonl": "--benchmark jsonl --root TEST_ROWS",
    }
    assert {train: unseen_pairs(train) for train in hints} == hints
