"""`dina-lrm align` and `dina-lrm search` as typed, on the bundled generator and reward."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from dina_lrm.build.alignment import algorithm_of, alignment_prompts, read_prompts
from dina_lrm.cli.main import main
from dina_lrm.errors import InvalidInputError
from dina_lrm.recipes.alignment import ALGORITHMS, CONFIGS, GENERATORS, alignment_recipe

SMALL = ["--num-steps", "2", "--batch-size", "2", "--monitor.every", "1", "--monitor.num-prompts", "3"]
SMALL += ["--monitor.grid-size", "2", "--policy.lora-rank", "2", "--sampler.num-steps", "3", "--cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("align") / "run"
    arguments = ["align", "refl", "shapes", "--reward", "bundled", "--gradient-steps", "1"]
    assert main([*arguments, *SMALL, "--output", str(folder)]) == 0
    return folder


@pytest.mark.long
def test_a_run_leaves_a_lora_a_report_and_its_scores(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "pytorch_lora_weights.safetensors",
        "report.html",
        "evaluations.jsonl",
        "metrics.jsonl",
        "last",
    } <= names
    page = (finished / "report.html").read_text()
    assert "ReFL on bundled" in page
    assert "Gold against proxy" in page
    assert "before" in page
    evaluations = [json.loads(line) for line in (finished / "evaluations.jsonl").read_text().splitlines()]
    assert [one["step"] for one in evaluations] == [0, 1, 2]
    assert all(0 <= value <= 1 for one in evaluations for value in one["gold"]["judge"])


@pytest.mark.long
def test_a_finished_run_is_not_trained_over(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", "refl", "shapes", *SMALL, "--output", str(finished)]) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.long
def test_resuming_a_finished_run_says_what_it_reached(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["align", "refl", "shapes", "--reward", "bundled", "--gradient-steps", "1", *SMALL]
    assert main([*arguments, "--output", str(finished), "--resume", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2
    assert set(found["gains"]) == {"proxy", "judge"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ppo", "shapes"], "unknown algorithm 'ppo'; there are refl, grpo, dpo, step-dpo"),
        (["refl", "sd4"], "got 'sd4', there are shapes, sd35m-512"),
        (["refl"], "the recipe comes after the algorithm"),
        (["grpo", "shapes", "--group-size", "1"], "group_size = 1"),
        (["refl", "shapes", "--reward", "nowhere/at/all", "--cpu"], "nowhere/at/all"),
        (["refl", "shapes", "--prompts", "missing.txt", "--cpu"], "missing.txt"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = [] if len(arguments) < 2 else ["--output", str(tmp_path / "run")]
    assert main(["align", *arguments, *output]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_algorithms_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in (*CONFIGS, *GENERATORS):
        assert name in shown


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_an_algorithms_help_lists_its_settings(
    algorithm: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["align", algorithm, flag]) == 0
    shown = capsys.readouterr()
    assert "--optimizer.learning-rate" in shown.out
    for name in GENERATORS:
        assert name in shown.err


@pytest.mark.long
def test_a_signal_ends_a_run_with_the_command_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"

    def send_when_it_learns() -> None:
        log = folder / "metrics.jsonl"
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send_when_it_learns, daemon=True)
    sender.start()
    arguments = ["align", "refl", "shapes", "--reward", "bundled", "--gradient-steps", "1", *SMALL]
    arguments += ["--num-steps", "1000", "--monitor.every", "1000", "--output", str(folder)]
    assert main(arguments) == 143
    sender.join()
    told = capsys.readouterr().err
    step = json.loads((folder / "last" / "training_state" / "position.json").read_text())["step"]
    assert f"interrupted; update {step} was finished" in told.replace("\n", " ")
    assert told.rstrip().endswith("--resume")
    assert "go on with: dina-lrm align refl shapes" in told.replace("\n", " ")


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_recipe_is_whole(algorithm: str, generator: str) -> None:
    config = alignment_recipe(algorithm, generator)
    assert type(config) is CONFIGS[algorithm]
    algorithm_of(config)
    if generator == "sdxl-1024":
        assert config.sampler.rule in ("ode", "ddim")


def test_the_papers_settings() -> None:
    config = alignment_recipe("refl", "sd35m-1024")
    assert (config.num_steps, config.batch_size) == (150, 256)
    assert (config.sampler.num_steps, config.sampler.guidance_scale) == (40, 4.5)
    assert (config.sampler.height, config.sampler.width) == (1024, 1024)
    assert config.monitor.gold == ("pickscore",)


def test_unknown_recipes_are_named() -> None:
    with pytest.raises(InvalidInputError, match="unknown algorithm 'ppo'"):
        alignment_recipe("ppo", "shapes")
    with pytest.raises(InvalidInputError, match="unknown recipe 'x'; known: shapes"):
        alignment_recipe("refl", "x")


def test_held_out_prompts_are_never_trained_on(tmp_path: Path) -> None:
    prompts, held_out = alignment_prompts(alignment_recipe("refl", "shapes"))
    assert len(held_out) == 64
    assert not set(prompts) & set(held_out)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"prompt {index % 5}"}) + "\n" for index in range(9)))
    assert read_prompts(str(file)) == [f"prompt {index}" for index in range(5)]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(InvalidInputError, match='row 2: no "prompt"'):
        read_prompts(str(tmp_path / "bad.jsonl"))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(InvalidInputError, match="has no prompts"):
        read_prompts(str(tmp_path / "empty.txt"))


@pytest.mark.parametrize("method", ["halving", "best-of-n", "guided"])
def test_search_writes_the_best_picture(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["search", "a red circle on a gray background", "--samples", "4", "--method", method]
    arguments += ["--steps", "4", "--guidance-scale", "1", "--output", str(tmp_path), "--json", "--keep", "2"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"] == sorted(found["scores"], reverse=True)
    assert found["alive"][0] == 4
    assert Path(found["files"][0]).name == "000.png"
    with Image.open(tmp_path / "000.png") as picture:
        assert picture.size == (64, 64)
    assert json.loads((tmp_path / "search.json").read_text())["method"] == method


def test_search_keeps_an_earlier_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["search", "a red circle on a gray background", "--samples", "2", "--method", "best-of-n"]
    arguments += ["--steps", "2", "--guidance-scale", "1", "--output", str(tmp_path)]
    assert main([*arguments, "--keep", "2"]) == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert main([*arguments, "--seed", "1"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "holds the result of a search; choose another --output, or replace it with --overwrite" in error
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert main([*arguments, "--seed", "1", "--overwrite"]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000.png", "search.json"]
    assert (tmp_path / "000.png").read_bytes() != before["000.png"]


def test_search_refuses_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", " ", "--output", str(tmp_path)]) == 2
    assert "give a prompt" in capsys.readouterr().err
    assert main(["search", "a red circle on a gray background", "--samples", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err
