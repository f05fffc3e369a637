"""What a reader does by hand: to stop a command with Ctrl-C, and to look whether the files are the same."""

import hashlib
import os
import shlex
import signal
import time
from pathlib import Path

from tests.docs.background import START_SECONDS, Background
from tests.docs.page import current


def digests(folder: str) -> dict[str, str]:
    """The SHA-256 of every file."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(Path(folder).rglob("*"))
        if file.is_file()
    }


def interrupt(command: str, *, when: str) -> str:
    """Run a `dina-lrm` command, press Ctrl-C as soon as the file `when` is there; what it printed."""
    running = Background(shlex.split(command), current().folder, os.environ)
    deadline = time.monotonic() + START_SECONDS
    while not Path(when).exists():
        assert running.process.is_alive(), f"{running} ended before {when} was there:\n{running.output()}"
        assert time.monotonic() < deadline, f"{running} has not written {when}:\n{running.output()}"
        time.sleep(0.01)
    running.signal(signal.SIGINT)
    running.process.join(START_SECONDS)
    printed = running.output()
    assert running.wait() == 128 + signal.SIGINT, printed
    return printed
