"""The main job through the command line: pairs, training, evaluation, scores; tiny budgets, real models."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest

import dina_lrm
from dina_lrm.cli.main import main
from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import change_attribute, sample_caption, sample_scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("end_to_end")


@pytest.fixture(scope="module")
def rows(folder):
    """Preference rows with a known utility: what the caption asks for against one thing changed."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(40):
        spec = sample_caption(rng, num_objects=1)
        for side, scene in (("chosen", spec), ("rejected", change_attribute(rng, spec))):
            render(sample_scene(rng, scene)).save(folder / f"{number}-{side}.png")
        row = {"prompt": spec.caption, "chosen": f"{number}-chosen.png", "rejected": f"{number}-rejected.png"}
        lines.append(json.dumps(row))
    lines.append(json.dumps({"prompt": "a red circle", "chosen": "absent.png", "rejected": "0-chosen.png"}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def reward(folder, rows):
    """A reward trained by the command line on those rows."""
    run = folder / "reward"
    overrides = {
        "--output": run,
        "--data.train": rows,
        "--data.validation": rows,
        "--num-steps": 12,
        "--batch-size": 8,
        "--model.num-blocks": 2,
        "--model.lora-rank": 2,
        "--validation.every": 6,
        "--time-budget-seconds": 60,
    }
    arguments = [str(part) for pair in overrides.items() for part in pair]
    taps = [
        "--model.image-taps",
        "1",
        "2",
        "--model.text-taps",
        "1",
        "--validation.noise-levels",
        "0.2",
        "0.4",
    ]
    assert main(["train", "shapes-quick", *arguments, *taps, "--cpu", "--json"]) == 0
    return run


def test_training_leaves_a_whole_checkpoint(reward):
    for name in ("config.json", "reward_head.safetensors", "README.md", "metrics.jsonl", "train_config.json"):
        assert (reward / name).is_file(), name
    rejects = [
        json.loads(line) for line in (reward / "pairs" / "train" / "rejects.jsonl").read_text().splitlines()
    ]
    assert [reject["row"] for reject in rejects] == [40]
    assert not list(reward.rglob("*.pkl"))
    assert not list(reward.rglob("*.tmp"))


def test_a_finished_run_is_not_trained_over(reward, rows, capsys):
    assert main(["train", "shapes-quick", "--output", str(reward), "--data.train", str(rows)]) == 2
    assert "holds a trained reward" in capsys.readouterr().err


def test_evaluate_writes_results(reward, folder, capsys):
    output = folder / "evaluation"
    arguments = [
        "--num-prompts",
        "4",
        "--noise-levels",
        "0.2,0.4",
        "--ensembles",
        "0.2,0.4",
        "--output",
        str(output),
    ]
    assert main(["evaluate", "--model", str(reward), "--benchmark", "shapes", *arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["num_pairs"] > 0
    assert 0 <= record["default"]["accuracy"]["value"] <= 1
    assert record["bayes"]["expected_accuracy"]["value"] >= record["default"]["expected_accuracy"]["value"]
    assert json.loads((output / "results.json").read_text())["num_pairs"] == record["num_pairs"]
    assert "| noise levels |" in (output / "results.md").read_text()
    assert pyarrow.parquet.read_table(output / "scores.parquet").num_rows == record["num_pairs"]


def test_scores_of_a_file_and_of_the_command_line_agree(reward, folder, rows, capsys):
    lines = [json.loads(line) for line in rows.read_text().splitlines()][:6]
    images = [{"prompt": line["prompt"], "image": line["chosen"]} for line in lines]
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in images))
    output = folder / "scores.parquet"
    options = ["--model", str(reward), "--noise-levels", "0.4", "--seed", "3", "--json"]
    assert main(["score", "--input", str(folder / "images.jsonl"), "--output", str(output), *options]) == 0
    assert json.loads(capsys.readouterr().out)["scored"] == 6
    scores = pyarrow.parquet.read_table(output)["score"].to_pylist()
    assert main(["score", images[0]["prompt"], str(folder / images[0]["image"]), *options]) == 0
    alone = json.loads(capsys.readouterr().out)["score"]
    assert alone == pytest.approx(scores[0], abs=1e-5)  # alone and in a batch


def test_compare_is_a_probability_and_symmetric(reward, folder, rows, capsys):
    line = json.loads(rows.read_text().splitlines()[0])
    a, b = str(folder / line["chosen"]), str(folder / line["rejected"])
    found = []
    for first, second in ((a, b), (b, a)):
        assert main(["compare", line["prompt"], first, second, "--model", str(reward), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["probability_a_preferred"])
    assert sum(found) == pytest.approx(1, abs=1e-5)


def test_doctor_scores(reward, capsys):
    assert main(["doctor", "--model", str(reward), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"]


@pytest.mark.parametrize("model", ["absent/folder", "."])
def test_a_model_that_is_none_is_one_clear_error(model, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["score", "a red circle", "0-chosen.png", "--model", model]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error:") == 1
    assert "Traceback" not in captured.err


def test_the_console_script(folder):
    """As a user runs it, in its own process: it prints the library's scores of the bundled reward."""
    rng = np.random.default_rng(5)
    spec = sample_caption(rng, num_objects=1)
    names = [folder / name for name in ("right.png", "wrong.png")]
    for name, scene in zip(names, (spec, change_attribute(rng, spec)), strict=True):
        render(sample_scene(rng, scene)).save(name)
    command = [sys.executable, "-m", "dina_lrm", "score", spec.caption, "right.png", "wrong.png", "--json"]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr
    printed = [json.loads(line)["score"] for line in finished.stdout.splitlines()]
    expected = dina_lrm.RewardModel.from_pretrained("bundled").score(spec.caption, names, seed=0).scores
    assert printed == pytest.approx(expected.tolist(), abs=1e-5)
    assert abs(printed[0] - printed[1]) > 1e-3
