"""SIGINT and SIGTERM in a run: what is in progress is finished and saved before the process ends.

with Interrupt() as interrupt:
    while step < num_steps:
        ...
        stop = interrupt.asked(accelerator)
        if stop or a checkpoint is due:
            save()
        if stop:
            raise Interrupted(interrupt.number, "stopped after step 7 ...")
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from accelerate import Accelerator

__all__ = ["Interrupt", "Interrupted"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 1.0
"""Signals so close together are one request: `timeout` and launchers of several processes send a child both
its own and the one of its process group."""


class Interrupted(KeyboardInterrupt):
    """A run that ended because of a signal, of which its argument is the number.

    Args:
        number: of the signal.
        kept: what was kept; a note of the exception.
    """

    def __init__(self, number: int, kept: str) -> None:
        super().__init__(number)
        self.add_note(kept)


class Interrupt:
    """Inside the block the first SIGINT or SIGTERM is noted, and the run asks for it where it can stop.

    A second signal does what it would have done without the block, so a run that does not come to its next
    stopping point can be ended. No effect outside the main thread, where Python handles no signals, and on
    a signal that is ignored, as SIGINT is in a shell's background jobs.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._when = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def number(self) -> int:
        """The signal; SIGTERM where another process of the run received it."""
        return signal.SIGTERM if self.received is None else self.received

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in taken}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, former in self._previous.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process of the run was asked to stop; every process gets the same answer.

        With several processes a collective: all have to call it at the same point of the run.
        """
        if accelerator.num_processes == 1:
            return self.received is not None
        if self.received is not None:
            accelerator.set_trigger()
        return accelerator.check_trigger()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._when = number, time.monotonic()
        elif time.monotonic() - self._when > SAME_SECONDS:
            previous = self._previous[number]
            if callable(previous):
                previous(number, frame)
            else:
                signal.signal(number, previous)
                os.kill(os.getpid(), number)
