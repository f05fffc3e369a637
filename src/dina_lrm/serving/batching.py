"""Micro-batches: pieces of many requests share a pass of the model, and no request keeps it for long.

A request is admitted as a whole or refused (`MicroBatcher.admit`); what it wants is then handed in as units
of work, such as one noise draw of one row (`submit`). A unit waits until enough units of its kind (equal
shapes) are there for a full pass, or until it has waited `max_wait_ms` and the model is free. A pass is cut
where it would take longer than `max_pass_seconds`, by the pace of the passes before.

Order is fair by start-time fair queueing: a unit's place is the virtual time at which its request would come
to it if all requests shared the model equally, so a small request does not wait for the rest of a large one.
Units of a request whose client has left are dropped.
"""

import asyncio
import heapq
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

__all__ = ["BatchStats", "Done", "Draining", "MicroBatcher", "QueueFull", "Ticket"]


class _Unit(Protocol):
    @property
    def kind(self) -> Hashable:
        """Units of one kind can share a pass."""
        ...

    @property
    def stage(self) -> str:
        """What a pass of them does: units of one stage have the same pace."""
        ...

    @property
    def work(self) -> float:
        """In tokens, or what is worth as much of the model's time, roughly."""
        ...


UnitT = TypeVar("UnitT", bound=_Unit)
ResultT = TypeVar("ResultT")
T = TypeVar("T")


class QueueFull(Exception):
    """No room for a request; `retry_after_seconds` is when there may be."""

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__("the queue is full")
        self.retry_after_seconds = retry_after_seconds


class Draining(Exception):
    """The server is shutting down and takes no more."""


@dataclass(frozen=True)
class BatchStats:
    """What is told about each pass to whoever measures."""

    stage: str
    units: int
    seconds: float
    waits: tuple[float, ...]
    """Seconds that each unit waited."""


@dataclass(frozen=True)
class Done(Generic[ResultT]):
    """What came of a unit."""

    value: ResultT
    seconds: float
    """Seconds of the pass that it was in."""


@dataclass
class Ticket:
    """What an admitted request has open."""

    rows: int
    work: float
    finish: float = 0.0
    """Virtual time, in units of work, at which its units so far would be done."""


@dataclass(order=True)
class _Waiting(Generic[UnitT, ResultT]):
    start: float
    """Virtual time of its turn."""
    number: int
    """In order of arrival."""
    unit: UnitT = field(compare=False)
    result: "asyncio.Future[Done[ResultT]]" = field(compare=False)
    since: float = field(compare=False)


class MicroBatcher(Generic[UnitT, ResultT]):
    """Runs `work` on units of one kind, one pass at a time, in a thread of its own.

    Args:
        work: results of units of one kind, in their order; an exception in place of a result is raised to
            whoever submitted it. Where it raises for a pass, its units are tried one by one, so that a unit
            cannot spoil those it shares a pass with.
        max_queue: rows of admitted requests that are not done. max_work: their work.
        observe: called after each pass, in the event loop.
    """

    def __init__(
        self,
        work: Callable[[list[UnitT]], Sequence[ResultT | Exception]],
        *,
        max_batch_size: int,
        max_wait_ms: float,
        max_queue: int,
        max_work: float = math.inf,
        max_pass_seconds: float = math.inf,
        observe: Callable[[BatchStats], None] = lambda stats: None,
    ) -> None:
        self._work, self._observe = work, observe
        self._max_batch_size = max_batch_size
        self._max_wait = max_wait_ms / 1000
        self._max_queue, self._max_work = max_queue, max_work
        self._max_pass_seconds = max_pass_seconds
        self._lines: dict[Hashable, list[_Waiting[UnitT, ResultT]]] = {}
        """Heaps of what waits, by kind; what was given up is taken out when it comes to the front."""
        self._tickets: set[int] = set()
        self._rows, self._admitted_work = 0, 0.0
        self._virtual, self._number = 0.0, 0
        self._pace: dict[str, float] = {}
        """Seconds for a unit of work, by stage."""
        self._row_seconds = 0.05
        """Seconds of a row, from admission to answer divided by the rows beside it; for Retry-After."""
        self._changed = asyncio.Event()
        self._free = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._jobs = 0
        self._busy_since: float | None = None
        self._expected = 0.0
        self._closing = False
        self._loop: asyncio.Task[None] | None = None

    @property
    def queued(self) -> int:
        """Rows that were taken and are not done."""
        return self._rows

    @property
    def work(self) -> float:
        """Work of the requests that were taken and are not done."""
        return self._admitted_work

    @property
    def full(self) -> bool:
        return self._rows >= self._max_queue or self._admitted_work >= self._max_work

    @property
    def overdue_seconds(self) -> float:
        """How long the model has been at what it is doing, above ten times what it should take."""
        busy = 0.0 if self._busy_since is None else time.monotonic() - self._busy_since
        return max(0.0, busy - 10 * self._expected)

    def start(self) -> None:
        """Begin to work; needs a running event loop."""
        self._loop = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        """Take no more, finish all that was taken, and end."""
        self._closing = True
        self._changed.set()
        if self._loop is not None:
            await self._loop
        async with self._free:
            self._thread.shutdown()

    def check_room(self, rows: int, work: float) -> None:
        """As `admit`, without taking anything."""
        if self._closing:
            raise Draining
        over_work = self._admitted_work > 0 and self._admitted_work + work > self._max_work
        if self._rows + self._jobs + rows > self._max_queue or over_work:
            raise QueueFull(max(1, min(60, math.ceil(self._rows * self._row_seconds))))

    @contextmanager
    def admit(self, rows: int, work: float) -> Iterator[Ticket]:
        """Room for a request, until the block ends.

        Raises:
            QueueFull: it does not fit beside what was taken already.
            Draining: the server is shutting down.
        """
        self.check_room(rows, work)
        ticket, began = Ticket(rows, work), time.monotonic()
        beside = self._rows
        self._rows += rows
        self._admitted_work += work
        self._tickets.add(id(ticket))
        try:
            yield ticket
        finally:
            self._tickets.discard(id(ticket))
            self._rows -= rows
            self._admitted_work -= work
            seconds = (time.monotonic() - began) / (beside + rows)
            self._row_seconds += 0.1 * (seconds - self._row_seconds)
            self._changed.set()

    async def submit(self, unit: UnitT, ticket: Ticket) -> Done[ResultT]:
        """The result of a unit of an admitted request."""
        waiting = _Waiting[UnitT, ResultT](
            max(self._virtual, ticket.finish),
            self._number,
            unit,
            asyncio.get_running_loop().create_future(),
            time.monotonic(),
        )
        self._number += 1
        ticket.finish = waiting.start + unit.work
        heapq.heappush(self._lines.setdefault(unit.kind, []), waiting)
        self._changed.set()
        try:
            return await waiting.result
        finally:
            waiting.result.cancel()  # where the client has left

    async def run(self, job: Callable[[], T]) -> T:
        """Something else that needs the model, between two passes.

        Raises:
            QueueFull, Draining: as in `admit`; jobs that wait are counted as rows.
        """
        self.check_room(1, 0.0)
        self._jobs += 1
        try:
            async with self._free:
                return await self._in_thread(job)
        finally:
            self._jobs -= 1

    # ------------------------------------------------------------------------------------- inside

    async def _serve(self) -> None:
        while True:
            await self._free.acquire()  # whoever holds it has the model; jobs get their turn between passes
            try:
                batch = self._next_batch()
                if batch:
                    await self._run_batch(batch)
                    continue
            finally:
                self._free.release()
            if self._closing and not self._lines and not self._tickets:
                return
            self._changed.clear()
            with_deadline = self._deadline()
            try:
                await asyncio.wait_for(self._changed.wait(), with_deadline)
            except TimeoutError:
                pass

    def _next_batch(self) -> list[_Waiting[UnitT, ResultT]]:
        """Units of the kind whose turn is first, if it has a full pass or has waited long enough."""
        self._drop_given_up()
        now = time.monotonic()
        ready = [
            line
            for line in self._lines.values()
            if self._closing or len(line) >= self._max_batch_size or now - line[0].since >= self._max_wait
        ]
        if not ready:
            return []
        line = min(ready, key=lambda line: line[0])
        batch: list[_Waiting[UnitT, ResultT]] = []
        while line and len(batch) < self._max_batch_size:
            if line[0].result.done():
                heapq.heappop(line)
            elif batch and self._seconds([*(one.unit for one in batch), line[0].unit]) > (
                self._max_pass_seconds
            ):
                break
            else:
                batch.append(heapq.heappop(line))
        self._drop_given_up()
        return batch

    def _drop_given_up(self) -> None:
        for kind, line in list(self._lines.items()):
            while line and line[0].result.done():
                heapq.heappop(line)
            if not line:
                del self._lines[kind]

    def _seconds(self, units: Sequence[UnitT]) -> float:
        """What a pass of such units should take; 0 before there was one."""
        return self._pace.get(units[0].stage, 0.0) * sum(unit.work for unit in units)

    def _deadline(self) -> float | None:
        """Seconds until a unit has waited long enough; None where none waits."""
        if not self._lines:
            return None
        oldest = min(line[0].since for line in self._lines.values())
        return max(0.0, oldest + self._max_wait - time.monotonic())

    async def _run_batch(self, batch: list[_Waiting[UnitT, ResultT]]) -> None:
        started = time.monotonic()
        units = [one.unit for one in batch]
        expected = self._seconds(units)
        # Virtual time goes on by the work of a pass, shared by all that are waiting, so that a stream of
        # small requests, each of which is new, does not keep a large one waiting for ever.
        done = sum(unit.work for unit in units)
        self._virtual = max(self._virtual, batch[0].start) + done / max(1, len(self._tickets))
        results = await self._in_thread(lambda: self._results(units), expected)
        seconds = time.monotonic() - started
        pace = seconds / done
        before = self._pace.get(units[0].stage)
        self._pace[units[0].stage] = pace if before is None else before + 0.3 * (pace - before)
        for one, result in zip(batch, results, strict=True):
            if one.result.done():
                continue
            if isinstance(result, Exception):
                one.result.set_exception(result)
            else:
                one.result.set_result(Done(result, seconds))
        self._observe(
            BatchStats(units[0].stage, len(batch), seconds, tuple(started - one.since for one in batch))
        )

    def _results(self, units: list[UnitT]) -> Sequence[ResultT | Exception]:
        try:
            return self._work(units)
        except Exception as error:
            if len(units) == 1:
                return [error]
        found: list[ResultT | Exception] = []
        for unit in units:
            found += self._results([unit])
        return found

    async def _in_thread(self, job: Callable[[], T], expected: float = 0.0) -> T:
        self._busy_since, self._expected = time.monotonic(), expected
        try:
            # Shielded: a thread cannot be interrupted, and the model is not free before it is done.
            running = asyncio.get_running_loop().run_in_executor(self._thread, job)
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                await asyncio.wait([running])
                raise
        finally:
            self._busy_since = None
