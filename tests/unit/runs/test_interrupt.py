"""Signals in a run: the first is noted, a second acts at once, and nothing is left behind."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from accelerate import Accelerator

from dina_lrm.runs import interrupt
from dina_lrm.runs.interrupt import Interrupt, Interrupted


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(autouse=True)
def _taken() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which ignores SIGINT there."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs the handler between two instructions of the main thread


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_the_first_signal_is_noted_and_handlers_come_back(number: int, accelerator: Accelerator) -> None:
    before = [signal.getsignal(one) for one in interrupt.SIGNALS]
    with Interrupt() as asked:
        assert not asked.asked(accelerator)
        send(number)
        assert asked.asked(accelerator)
        assert asked.number == number
    assert [signal.getsignal(one) for one in interrupt.SIGNALS] == before


def test_two_signals_at_once_are_one_and_a_later_one_ends_the_run(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Interrupt() as asked:
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # as `timeout` sends it to a process and to its group
        assert asked.asked(accelerator)
        monkeypatch.setattr(interrupt, "SAME_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    stopped = Interrupted(asked.number, "step 7 is kept")
    assert (stopped.args, stopped.__notes__) == ((signal.SIGTERM,), ["step 7 is kept"])


def test_a_signal_that_is_ignored_stays_ignored(accelerator: Accelerator) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupt() as asked:
        send(signal.SIGINT)
        assert not asked.asked(accelerator)


def test_outside_the_main_thread_signals_are_left_alone(accelerator: Accelerator) -> None:
    before = [signal.getsignal(one) for one in interrupt.SIGNALS]
    found: list[object] = []

    def work() -> None:
        with Interrupt() as asked:
            found.extend([signal.getsignal(one) for one in interrupt.SIGNALS])
            found.append(asked.asked(accelerator))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [*before, False]
