"""`dina-lrm train`: what it says to type next."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dina_lrm.cli.train import resuming, run, unseen_pairs
from dina_lrm.recipes import training as recipes
from dina_lrm.training.result import TrainResult


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


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("1", 0)])
def test_one_of_a_launchers_processes_reports(
    rank: str, said: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = TrainResult(
        steps=3,
        seconds=1.0,
        stopped_by="num_steps",
        best_step=None,
        best_accuracy=None,
        noise_levels=(0.4,),
        calibration_scale=None,
        uncalibrated=None,
        validation={"0.4": 0.7},
        margins=None,
        history=[],
    )
    monkeypatch.setattr("dina_lrm.build.training.run_training", lambda *_, **__: (None, result))
    monkeypatch.setenv("RANK", rank)
    assert run(replace(recipes.shapes_quick(), output=None), as_json=True) == 0
    assert capsys.readouterr().out.count('"steps": 3') == said
