"""What the processes of one run tell one another.

All of them must come to every exchange, or the others wait for ever. So whether there is anything to learn is
asked of all together (`any`, `gather`), what only one of them knows is told by it (`from_main`), and a
process that fails says so in place of its next exchange (`leave`): the others then end with an error.

Process p of P takes the places p, p + P, p + 2P, ... of what is cut among them, so that the first half of
everybody's part is the first half of the whole.
"""

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch import Tensor

from dina_lrm.errors import RunError
from dina_lrm.runs.distribution import on_cpu
from dina_lrm.runs.interrupt import Interrupt

__all__ = ["AlignmentError", "Processes"]

T = TypeVar("T")

_LONGEST_WAIT = timedelta(hours=6)
"""For the others while the main process asks a gold score; one that fails says so at once."""


class AlignmentError(RunError):
    """A run that cannot go on; its last good checkpoint is kept."""


class Processes:
    """The processes that `torchrun` or `accelerate launch` started; a single one otherwise.

    Every method but `leave` is an exchange, with no effect on a single process.

    Attributes:
        count: how many there are.
        index: which of them this is.
        local_index: which of those on this machine.
        is_main: whether this is the one that writes.
    """

    def __init__(self, *, cpu: bool) -> None:
        waiting = InitProcessGroupKwargs(timeout=_LONGEST_WAIT)
        self._accelerator = Accelerator(cpu=on_cpu(cpu), kwargs_handlers=[waiting])
        self.count = self._accelerator.num_processes
        self.index = self._accelerator.process_index
        self.local_index = self._accelerator.local_process_index
        self.is_main = self._accelerator.is_main_process
        self._left = False

    def mean(self, values: Tensor) -> Tensor:
        """Element by element over all processes; one collective, whatever the size."""
        if self.count == 1:
            return values
        self.wait()
        reduced: Any = self._accelerator.reduce(values, reduction="mean")
        return reduced

    def gather(self, values: Tensor) -> Tensor:
        """(process, ...): those of every process, of one shape; on the CPU."""
        if self.count == 1:
            return values[None].cpu()
        self.wait()
        found: Any = self._accelerator.gather(values[None].to(self._accelerator.device))
        return found.cpu()

    def any(self, own: bool) -> bool:
        """Whether it holds in at least one process."""
        return bool(self.gather(torch.tensor(own).long()).any())

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, in all of them."""
        if self.count == 1:
            return make()
        made = [make() if self.is_main else None]
        self.wait()
        told: Any = broadcast_object_list(made, from_process=0)[0]
        return told

    def asked(self, interrupt: Interrupt) -> bool:
        """Whether a signal has asked one of them to stop."""
        self.wait()
        return interrupt.asked(self._accelerator)

    def wait(self) -> None:
        """Until all are here.

        Raises:
            AlignmentError: one of them has failed.
        """
        if self.count == 1:
            return
        failed = self._failures(own=False).nonzero().flatten().tolist()
        if failed:
            self._left = True
            raise AlignmentError(
                f"process {failed[0]} of {self.count} has failed, its own message says why; the last good "
                f"checkpoint is kept"
            )

    def leave(self) -> None:
        """To be called by a process that ends with an error, in place of its next exchange."""
        if self.count > 1 and not self._left:
            self._left = True
            with contextlib.suppress(RuntimeError):  # the others are gone already
                self._failures(own=True)

    def _failures(self, *, own: bool) -> Tensor:
        """(process,): 1 of those that have failed."""
        flags = torch.zeros(self.count, device=self._accelerator.device)
        flags[self.index] = float(own)
        reduced: Any = self._accelerator.reduce(flags, reduction="sum")
        return reduced.cpu()
