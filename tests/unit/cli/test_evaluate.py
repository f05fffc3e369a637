"""`dina-lrm evaluate` on a public benchmark: what is kept of a stopped run, with stand-ins for models."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dina_lrm.cli import evaluate, main

NUM_ROWS = 10


class Scorer:
    """Brightness; interrupted once it was shown `limit` pictures."""

    def __init__(self, limit: int = 1000) -> None:
        self.shown, self.limit = 0, limit

    def __call__(self, prompts: list[str], images: list[Image.Image]) -> dict[str, torch.Tensor]:
        self.shown += len(images)
        if self.shown > self.limit:
            raise KeyboardInterrupt
        return {"brightness": torch.tensor([float(np.asarray(image).mean()) for image in images])}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rows = []
    for row in range(NUM_ROWS):
        for side, grey in (("chosen", 10 * row + 5), ("rejected", 10 * row)):
            Image.new("L", (2, 2), grey).save(tmp_path / f"{row}-{side}.png")
        rows.append({"prompt": f"p{row}", "chosen": f"{row}-chosen.png", "rejected": f"{row}-rejected.png"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def use(monkeypatch: pytest.MonkeyPatch, **scorers: Scorer) -> None:
    monkeypatch.setattr(evaluate, "scorer_function", lambda options, name, location: (scorers[name], None))


def test_a_later_model_that_stops_does_not_cost_an_earlier_one(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = root / "out"
    command = ["evaluate", "--benchmark", "jsonl", "--root", str(root), "--output", str(out)]
    command += ["--scorers", "clip-score", "hpsv2", "--batch-size", "4"]
    first, second = Scorer(), Scorer(limit=9)
    use(monkeypatch, **{"clip-score": first, "hpsv2": second})
    assert main.main(command) == main.EXIT_INTERRUPTED
    assert first.shown == 2 * NUM_ROWS + 1  # one more, whose operations are counted
    capsys.readouterr()

    first, second = Scorer(), Scorer()
    use(monkeypatch, **{"clip-score": first, "hpsv2": second})
    assert main.main(command) == 0
    assert first.shown == 0
    assert second.shown == 2 * NUM_ROWS - 8 + 1
    assert not list(out.rglob("*.part.jsonl"))
    results = [json.loads((out / name / "results.json").read_text()) for name in ("clip-score", "hpsv2")]
    assert [one["published"]["accuracy"]["value"] for one in results] == [1, 1]
    told = capsys.readouterr().err
    assert told.count("going on from") == 2
    assert f"{NUM_ROWS} of {NUM_ROWS} comparisons" in told


def test_a_model_that_was_trained_on_is_another(tmp_path: Path) -> None:
    assert evaluate.last_written(Path("org/model")) is None
    weights = tmp_path / "checkpoint" / "head.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"1")
    os.utime(weights, ns=(5, 5))
    assert evaluate.last_written(tmp_path) == 5
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text("{}")
    assert evaluate.last_written(tmp_path) == 5
    os.utime(weights, ns=(7, 7))
    assert evaluate.last_written(tmp_path) == 7
