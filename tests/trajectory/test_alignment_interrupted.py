"""What ends an alignment run in the middle, or fails beside it, loses no update."""

import json
import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from PIL import Image

from dina_lrm.alignment.config import AlignConfig, MonitorConfig
from dina_lrm.alignment.run import Run
from dina_lrm.build.alignment import algorithm_of, write_alignment_page
from dina_lrm.evaluation.baselines.server import UNIFIED_REWARD, ServerScorer
from dina_lrm.recipes.alignment import alignment_recipe
from dina_lrm.runs.interrupt import Interrupted
from tests.local_server import answering
from tests.trajectory.test_alignment import ALGORITHMS, ODE, align, new_run, small, weights


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """By a reader that knows no NaN, which JSON does not have."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def saved_step(folder: Path) -> int:
    return json.loads((folder / "last" / "training_state" / "position.json").read_text())["step"]


class Judge(BaseHTTPRequestHandler):
    """A chat server that gives every picture the same score."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        reply = json.dumps({"choices": [{"message": {"content": "Final Score: 3"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: object) -> None: ...


def test_a_gold_server_that_dies_ends_no_run(tiny_pipeline: Path, tmp_path: Path) -> None:
    """The shapes recipe at tiny size, 20 updates; the server is gone after the third."""
    monitor = MonitorConfig(every=2, num_prompts=3, grid_size=2)
    recipe = alignment_recipe("refl", "shapes")
    config = small(recipe, tmp_path, sampler=ODE, num_steps=20, batch_size=2, monitor=monitor)
    run = new_run(tiny_pipeline, config)
    run.on_evaluation = write_alignment_page
    told: list[str] = []
    run.log = told.append
    algorithm = algorithm_of(config)
    with ExitStack() as server:
        address = server.enter_context(answering(Judge))
        run.golds = {"unified-reward": ServerScorer(address, "judge", UNIFIED_REWARD, num_retries=0).score}

        def update(run: Run, step: int) -> dict[str, float]:
            if step == 3:
                server.close()
            return algorithm(run, step)

        result = run.train(update)
    assert (result.steps, result.stopped_by) == (20, "steps")
    assert saved_step(tmp_path) == 20
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 20
    found = evaluations(tmp_path)
    assert [one["step"] for one in found] == list(range(0, 21, 2))
    assert [one["gold"]["unified-reward"] for one in found] == [[3.0] * 3] * 2 + [None] * 9
    assert all(f"no answer from {address}" in one["missing"]["unified-reward"] for one in found[2:])
    page = (tmp_path / "report.html").read_text()
    assert "The gold score unified-reward is missing since update 4" in page
    assert f"no answer from {address}" in page
    assert sum("unified-reward is missing, the run goes on without" in line for line in told) == 9


def test_a_gold_score_that_comes_back_is_used_again(tiny_pipeline: Path, tmp_path: Path) -> None:
    """NaN at the start, an error, too few scores; then two that count, of which the first is the best."""
    said: list[Any] = [float("nan"), OSError("away"), [1.0], 0.9, 0.4]

    def gold(prompts: Sequence[str], pictures: Sequence[Image.Image]) -> list[float]:
        now = said.pop(0)
        if isinstance(now, Exception):
            raise now
        return now if isinstance(now, list) else [now] * len(prompts)

    config = small(ALGORITHMS["refl"], tmp_path, monitor=MonitorConfig(every=1, num_prompts=3, grid_size=2))
    run = new_run(tiny_pipeline, config)
    run.on_evaluation = write_alignment_page
    run.golds = {"moody": gold}
    run.train(algorithm_of(config))
    found = evaluations(tmp_path)
    assert [one["gold"]["moody"] for one in found] == [None, None, None, [0.9] * 3, [0.4] * 3]
    reasons = [one["missing"].get("moody", "") for one in found]
    assert (
        "the scores of 3 of 3 pictures are not finite, first nan for prompt 'a yellow circle'" in reasons[0]
    )
    assert reasons[1:] == ["OSError: away", "ScoringError: 1 scores for 3 pictures", "", ""]
    assert (tmp_path / "best" / "pytorch_lora_weights.safetensors").exists()
    assert json.loads((tmp_path / "last" / "training_state" / "position.json").read_text())["best_step"] == 3
    assert "is missing since" not in (tmp_path / "report.html").read_text()


def test_an_evaluation_that_fails_comes_after_the_checkpoint(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Whatever fails in it; the run that goes on makes it first, and is the uninterrupted one."""
    config = small(ALGORITHMS["grpo"], tmp_path / "parts", checkpoint_every=100)
    run = new_run(tiny_pipeline, config)

    plain = run.policy.pictures

    def no_memory(*arguments: Any, **options: Any) -> Any:
        if run.state.step == 2:
            raise MemoryError
        return plain(*arguments, **options)

    run.policy.pictures = no_memory
    with pytest.raises(MemoryError):
        run.train(algorithm_of(config))
    assert saved_step(tmp_path / "parts") == 2
    assert [one["step"] for one in evaluations(tmp_path / "parts")] == [0]
    with (tmp_path / "parts" / "evaluations.jsonl").open("a") as lines:
        lines.write('{"step": 2, "seco')  # as a full disk leaves it
    resumed, result = align(tiny_pipeline, replace(config, resume=True))
    whole, once = align(tiny_pipeline, replace(config, output=str(tmp_path / "whole")))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert [one.proxy for one in result.evaluations] == [one.proxy for one in once.evaluations]
    assert [one["step"] for one in evaluations(tmp_path / "parts")] == [0, 2, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_to_the_same_weights(
    tiny_pipeline: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """A signal in the middle of the third update, long before a checkpoint is due."""
    monitor = MonitorConfig(every=100, num_prompts=3, grid_size=2)

    def config(name: str) -> AlignConfig:
        return small(ALGORITHMS["refl"], tmp_path / name, checkpoint_every=100, monitor=monitor)

    algorithm = algorithm_of(config("told"))

    def update(run: Run, step: int) -> dict[str, float]:
        if step == 2:
            os.kill(os.getpid(), number)
        return algorithm(run, step)

    run = new_run(tiny_pipeline, config("told"))
    with pytest.raises(Interrupted) as caught:
        run.train(update)
    assert caught.value.args == (number,)
    assert caught.value.__notes__ == [f"update 3 was finished, and {tmp_path / 'told' / 'last'} holds it"]
    assert saved_step(tmp_path / "told") == 3
    resumed, _ = align(tiny_pipeline, replace(config("told"), resume=True))
    whole, _ = align(tiny_pipeline, config("whole"))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
