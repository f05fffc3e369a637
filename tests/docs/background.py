"""`dina-lrm` commands in processes of their own: servers, and commands that a page interrupts.

A fork server has imported the libraries, so that a process is there at once. Nothing heavy is imported here,
because the fork server imports this module too.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = (
    *("torch", "diffusers", "transformers", "peft", "accelerate", "pandas", "pyarrow.parquet", "uvicorn"),
    *("fastapi", "diffusers.models", "transformers.models.clip", "transformers.models.t5"),
    *("dina_lrm.cli.main", "dina_lrm.models.reward_model", "dina_lrm.data.prepare.run"),
    *("dina_lrm.serving.app", "dina_lrm.serving.server"),
)
CONTEXT = multiprocessing.get_context("forkserver")
START_SECONDS, STOP_SECONDS = 180, 60


def start_fork_server() -> None:
    """Begin to import, while the first blocks run."""
    from multiprocessing import forkserver

    CONTEXT.set_forkserver_preload([__name__, *PRELOADED])
    forkserver.ensure_running()


class Background:
    """A command that is running."""

    def __init__(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.arguments = list(arguments)
        self.log = folder.with_name(f"{folder.name}-{time.monotonic_ns()}.log")
        self.process = CONTEXT.Process(
            target=_run, args=(self.arguments, str(folder), dict(environment), str(self.log))
        )
        self.process.start()

    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, url: str) -> None:
        """Until a server answers: with 200, or 401 where it wants a token."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.is_alive(), f"{self} ended with {self.process.exitcode}:\n{self.output()}"
            try:
                with opener.open(url, timeout=5) as answer:
                    if answer.status == 200:
                        return
            except urllib.error.HTTPError as refused:
                if refused.code == 401:
                    return
                time.sleep(0.1)
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"{self} did not answer at {url}:\n{self.output()}")

    def wait(self, seconds: float = START_SECONDS) -> int:
        """The exit code, when the command has ended."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"{self} still runs:\n{self.output()}"
        self.log.unlink(missing_ok=True)
        return self.process.exitcode

    def signal(self, number: int) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def stop(self) -> int:
        """End a server, and its exit code; one that does not end is killed."""
        self.signal(signal.SIGTERM)
        self.process.join(STOP_SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
        return self.wait(10)

    def __str__(self) -> str:
        return f"dina-lrm {' '.join(self.arguments)}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(arguments: list[str], folder: str, environment: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.stdout.flush()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    from dina_lrm.cli.main import main

    sys.exit(main(arguments))
