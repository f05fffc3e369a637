"""Replicas behind one port: the library's scores, and what clients see when a replica is killed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dina_lrm import Conditioning, RewardModel
from dina_lrm.remote.client import Client

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

MARK = "REPLICAS_TEST_RUN"
ROWS = 3
"""Of one request."""


class Server:
    """`dina-lrm serve --replicas 2`, and the processes it has started."""

    def __init__(self, log: Path) -> None:
        self.mark = uuid.uuid4().hex
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dina_lrm", "serve", "--replicas", "2", "--port", "0"],
                stderr=stderr,
                env=os.environ | {"OMP_NUM_THREADS": "1", MARK: self.mark},
            )
        ready = re.compile(r"^(http://\S+)  \(2 replicas", re.MULTILINE)
        assert eventually(
            lambda: bool(ready.search(log.read_text())) or self.process.poll() is not None, seconds=180
        )
        found = ready.search(log.read_text())
        assert found, log.read_text()
        self.url = found.group(1)

    def processes(self, title: bytes = b"") -> list[int]:
        return sorted(
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if title in _read(folder / "cmdline")
            and f"{MARK}={self.mark}".encode() in _read(folder / "environ")
        )

    def replicas(self) -> list[int]:
        return self.processes(b"ray::ServeReplica:dina-lrm:reward")

    def rows_scored(self) -> dict[str, float]:
        """What each replica has scored so far, as any of them tells it."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as reply:
            assert len(reply.headers.get_all("x-request-id")) == 1
            text = reply.read().decode()
        found = re.findall(r'^dina_lrm_scores_total\{model="bundled",replica="(\w+)"\} (\S+)$', text, re.M)
        return {replica: float(count) for replica, count in found}


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # the process has ended
        return b""


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return met


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    server = Server(tmp_path / "log")
    yield server
    server.process.terminate()
    server.process.wait(timeout=90)
    for pid in server.processes():  # none, unless the test has failed
        os.kill(pid, signal.SIGKILL)


def test_a_killed_replica_is_replaced_and_no_score_is_wrong(server):
    model = RewardModel.from_pretrained("bundled")
    latents = torch.randn(30, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    one = model.encode_prompts(["a red circle on a gray background"])
    conditioning = Conditioning(one.prompt_embeds.expand(30, -1, -1), one.pooled_prompt_embeds.expand(30, -1))
    sigma = torch.linspace(0.1, 0.9, 30)
    with torch.no_grad():
        expected = model.score_latents(latents, conditioning, sigma, seed=list(range(30))).tolist()

    def ask(start: int) -> float:
        """Largest error of the scores of a request."""
        rows = slice(start, start + ROWS)
        part = Conditioning(conditioning.prompt_embeds[rows], conditioning.pooled_prompt_embeds[rows])
        seeds = list(range(30))[rows]
        scores = client.score_latents(latents[rows], part, sigma[rows], seeds).tolist()
        return max(abs(a - b) for a, b in zip(scores, expected[rows], strict=True))

    starts = [start for _ in range(6) for start in range(0, 30, ROWS)]
    with Client(server.url, max_retries=8) as client, ThreadPoolExecutor(4) as clients:
        assert max(clients.map(ask, starts)) < 1e-4
        # Every row was scored once, by one replica or the other.
        assert eventually(lambda: sum(server.rows_scored().values()) == ROWS * len(starts), seconds=30)
        assert len(server.rows_scored()) == 2
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=10) as one:
            one.sendall(b"GET /healthz HTTP/1.1\r\nx-a: " + b"a" * 60_000)
            assert one.recv(4096).startswith(b"HTTP/1.1 400")

        before = server.replicas()
        assert len(before) == 2
        answers = [clients.submit(ask, start) for start in starts * 5]
        while sum(answer.done() for answer in answers) < len(starts):
            time.sleep(0.02)
        os.kill(before[0], signal.SIGKILL)
        assert max(answer.result() for answer in answers) < 1e-4

        assert eventually(lambda: len(set(server.replicas()) - {before[0]}) == 2, seconds=120)
        assert max(clients.map(ask, starts)) < 1e-4

        last = [clients.submit(ask, start) for start in starts[:8]]
        while not any(answer.done() for answer in last):
            time.sleep(0.01)
        server.process.terminate()
        for answer in last[:4]:  # that were on their way
            assert answer.exception() is None
        for answer in last[4:]:
            answer.cancel()
    assert server.process.wait(timeout=90) == 0
    assert eventually(lambda: not server.processes(), seconds=30)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{server.url}/healthz", timeout=5)
