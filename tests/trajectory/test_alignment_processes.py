"""Alignment in two processes: they learn what one does, and neither waits for ever."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trajectory.alignment_on_cpu import FLAT, RUNS, one_run

SCRIPT = Path(__file__).with_name("alignment_on_cpu.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def two(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs made in two gloo processes."""
    output = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(SCRIPT), str(tiny_pipeline), str(output)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def told(two: Path, process: int) -> dict[str, Any]:
    return json.loads((two / f"process-{process}.json").read_text())


def assert_same(one: Path, two: Path) -> None:
    """Weights and metrics, to the rounding of sums in another order."""
    ours, theirs = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, two))
    assert any(value.abs().max() > 1e-3 for name, value in ours.items() if "lora_B" in name)
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=2e-5)
    lines, others = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, two)
    )
    for line, other in zip(lines, others, strict=True):
        line.pop("seconds"), other.pop("seconds")
        assert other == pytest.approx(line, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_does(tiny_pipeline: Path, two: Path, tmp_path: Path, name: str) -> None:
    one_run(tiny_pipeline, tmp_path, name)
    assert_same(tmp_path / name, two / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAT)
def test_a_process_with_nothing_to_learn_takes_every_step(
    tiny_pipeline: Path, two: Path, tmp_path: Path, name: str
) -> None:
    """The second one's rewards are all alike, in every update."""
    name = f"flat-{name}"
    assert [told(two, process)[name]["flat"] for process in (0, 1)] == [[False] * 2, [True] * 2]
    one_run(tiny_pipeline, tmp_path, name)
    assert_same(tmp_path / name, two / name)


@pytest.mark.slow
def test_gradients_are_averaged_in_one_collective(two: Path) -> None:
    """And one more, in which processes say that they are well."""
    found = told(two, 0)["step"]
    assert found["parameters"] > 20
    assert found["collectives"] == 2


@pytest.mark.slow
def test_a_process_that_fails_alone_leaves_nobody_waiting(two: Path) -> None:
    assert told(two, 1)["failing"] == ["MemoryError: no memory left"] * 2
    for said in told(two, 0)["failing"]:
        assert said.startswith("AlignmentError: process 1 of 2 has failed, its own message says why")
