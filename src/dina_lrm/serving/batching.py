"""Micro-batches: rows of many requests share a pass of the model.

A row waits until enough rows of its kind (equal shapes) are there for a full batch, or until it has waited
`max_wait_ms` and the model is free. Rows of one kind keep their order, and the kind whose first row has
waited longest goes first. At most `max_queue` rows wait; what comes on top is refused at once, a whole
request at a time. A request whose client has left takes its waiting rows along.
"""

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

__all__ = ["BatchStats", "Draining", "MicroBatcher", "QueueFull"]


class _Row(Protocol):
    @property
    def kind(self) -> Hashable: ...


RowT = TypeVar("RowT", bound=_Row)
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
    """What is told about each batch to whoever measures."""

    rows: int
    seconds: float
    waits: tuple[float, ...]
    """Seconds that each row waited."""


@dataclass
class _Waiting(Generic[RowT, ResultT]):
    row: RowT
    result: "asyncio.Future[ResultT]"
    since: float


class MicroBatcher(Generic[RowT, ResultT]):
    """Runs `work` on batches of rows of one kind, one batch at a time, in a thread of its own.

    Args:
        work: results of rows of one kind, in their order; an exception in place of a result is raised to
            the request that the row belongs to. Where it raises for a batch, its rows are tried one by one,
            so that a row cannot spoil those it shares a batch with.
        observe: called after each batch, in the event loop.
    """

    def __init__(
        self,
        work: Callable[[list[RowT]], Sequence[ResultT | Exception]],
        *,
        max_batch_size: int,
        max_wait_ms: float,
        max_queue: int,
        observe: Callable[[BatchStats], None] = lambda stats: None,
    ) -> None:
        self._work = work
        self._max_batch_size = max_batch_size
        self._max_wait = max_wait_ms / 1000
        self._max_queue = max_queue
        self._observe = observe
        self._waiting: OrderedDict[Hashable, deque[_Waiting[RowT, ResultT]]] = OrderedDict()
        self._count = 0
        self._jobs = 0
        self._seconds_per_row = 0.01
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._free = asyncio.Lock()
        self._busy_since: float | None = None
        self._closing = False
        self._loop: asyncio.Task[None] | None = None

    @property
    def queued(self) -> int:
        """Rows that wait, those in the model left out."""
        return self._count

    @property
    def full(self) -> bool:
        return self._count >= self._max_queue

    @property
    def busy_seconds(self) -> float:
        """How long the model has been at what it is doing; 0 when it is idle."""
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

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

    async def submit(self, rows: Sequence[RowT]) -> list[ResultT]:
        """Results of the rows of a request, in order.

        Raises:
            QueueFull: not all of them fit into the queue; none was taken.
            Draining: the server is shutting down.
        """
        if self._closing:
            raise Draining
        if self._count + len(rows) > self._max_queue:
            raise QueueFull(max(1, math.ceil(self._count * self._seconds_per_row)))
        loop, now = asyncio.get_running_loop(), time.monotonic()
        own = [_Waiting[RowT, ResultT](row, loop.create_future(), now) for row in rows]
        for one in own:
            self._waiting.setdefault(one.row.kind, deque()).append(one)
        self._count += len(own)
        self._changed.set()
        try:
            return list(await asyncio.gather(*(one.result for one in own)))
        finally:  # where the request was cancelled, or one of its rows has failed, others still wait
            for one in own:
                one.result.cancel()
            if any(one.result.cancelled() for one in own):
                self._forget_cancelled()

    async def run(self, job: Callable[[], T]) -> T:
        """Something else that needs the model, between two batches.

        Raises:
            QueueFull, Draining: as in `submit`; jobs that wait are counted as rows.
        """
        if self._closing:
            raise Draining
        if self._count + self._jobs >= self._max_queue:
            raise QueueFull(max(1, math.ceil((self._count + self._jobs) * self._seconds_per_row)))
        self._jobs += 1
        try:
            async with self._free:
                return await self._in_thread(job)
        finally:
            self._jobs -= 1

    # ------------------------------------------------------------------------------------- inside

    async def _serve(self) -> None:
        while True:
            await self._free.acquire()  # whoever holds it has the model; jobs get their turn between batches
            try:
                batch = self._next_batch()
                if batch:
                    await self._run_batch(batch)
                    continue
            finally:
                self._free.release()
            if self._closing and not self._count:
                return
            self._changed.clear()
            with_deadline = self._deadline()
            try:
                await asyncio.wait_for(self._changed.wait(), with_deadline)
            except TimeoutError:
                pass

    def _next_batch(self) -> list[_Waiting[RowT, ResultT]]:
        """Rows of the kind that has waited longest, if it has a full batch or has waited long enough."""
        now = time.monotonic()
        ready = [
            kind
            for kind, queue in self._waiting.items()
            if self._closing or len(queue) >= self._max_batch_size or now - queue[0].since >= self._max_wait
        ]
        if not ready:
            return []
        kind = min(ready, key=lambda kind: self._waiting[kind][0].since)
        queue = self._waiting[kind]
        batch = [queue.popleft() for _ in range(min(len(queue), self._max_batch_size))]
        if not queue:
            del self._waiting[kind]
        self._count -= len(batch)
        return batch

    def _forget_cancelled(self) -> None:
        for kind, queue in list(self._waiting.items()):
            if any(one.result.done() for one in queue):
                kept = deque(one for one in queue if not one.result.done())
                self._count -= len(queue) - len(kept)
                if kept:
                    self._waiting[kind] = kept
                else:
                    del self._waiting[kind]

    def _deadline(self) -> float | None:
        """Seconds until a row has waited long enough; None where no row waits."""
        if not self._waiting:
            return None
        oldest = min(queue[0].since for queue in self._waiting.values())
        return max(0.0, oldest + self._max_wait - time.monotonic())

    async def _run_batch(self, batch: list[_Waiting[RowT, ResultT]]) -> None:
        started = time.monotonic()
        rows = [one.row for one in batch]
        results = await self._in_thread(lambda: self._results(rows))
        seconds = time.monotonic() - started
        self._seconds_per_row += 0.1 * (seconds / len(batch) - self._seconds_per_row)
        for one, result in zip(batch, results, strict=True):
            if one.result.done():
                continue
            if isinstance(result, Exception):
                one.result.set_exception(result)
            else:
                one.result.set_result(result)
        self._observe(BatchStats(len(batch), seconds, tuple(started - one.since for one in batch)))

    def _results(self, rows: list[RowT]) -> Sequence[ResultT | Exception]:
        try:
            return self._work(rows)
        except Exception as error:
            if len(rows) == 1:
                return [error]
        found: list[ResultT | Exception] = []
        for row in rows:
            found += self._results([row])
        return found

    async def _in_thread(self, job: Callable[[], T]) -> T:
        self._busy_since = time.monotonic()
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
