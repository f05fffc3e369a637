"""diffusers and transformers say nothing that a user did not cause, and what they do say still comes out."""

import logging
import os
import pty
import subprocess
import sys
import threading

import pytest

from dina_lrm.pipelines.libraries import quiet_tokenizing

SCORE = """
import dina_lrm
from PIL import Image

dina_lrm.RewardModel.from_pretrained("bundled").score("a red circle", Image.new("RGB", (64, 64)))
"""
ON_A_TERMINAL = "from dina_lrm.cli.console import quiet_libraries; quiet_libraries()\n" + SCORE


@pytest.mark.long
def test_scoring_in_python_says_nothing() -> None:
    command = [sys.executable, "-W", "default", "-c", SCORE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.long
@pytest.mark.parametrize("environment", [{}, {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}])
def test_a_command_on_a_terminal_does_not_warn_of_progress_bars(environment: dict[str, str]) -> None:
    terminal, stderr = pty.openpty()
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTEST_CURRENT_TEST",)}
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL], stderr=stderr, env=inherited | environment
    )
    os.close(stderr)
    said = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # how Linux tells that the other end is closed
            break
        if not part:
            break
        said += part
    os.close(terminal)
    assert process.wait() == 0
    assert b"arning" not in said
    assert not said or environment, "bars are shown to whoever asks for them"


def test_only_this_threads_messages_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    class Pipeline: ...

    logger = logging.getLogger(Pipeline.__module__)

    def speak() -> None:
        logger.warning("from another thread")

    with quiet_tokenizing(Pipeline()), quiet_tokenizing(Pipeline()):
        logger.warning("from this thread")
        other = threading.Thread(target=speak)
        other.start()
        other.join()
    logger.warning("afterwards")
    assert [record.getMessage() for record in caplog.records] == ["from another thread", "afterwards"]
