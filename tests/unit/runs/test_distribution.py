"""Processes that a launcher started side by side are one run, on a CPU too."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dina_lrm.runs.distribution import on_cpu

WORKER = """
import sys
from dina_lrm.alignment.processes import Processes
processes = Processes(cpu=False)
print(processes.count, processes.index)
processes.leave()
"""


def test_a_launched_process_without_an_accelerator_is_one_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert on_cpu(True)
    assert not on_cpu(False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert on_cpu(False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not on_cpu(False)


@pytest.mark.long
def test_two_launched_processes_are_one_run(tmp_path: Path) -> None:
    """Without --cpu, as `torchrun` starts them where there is no accelerator."""
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = sorted(process.communicate(timeout=120)[0].split() for process in running)
    assert said == [["2", "0"], ["2", "1"]]
