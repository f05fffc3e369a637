"""Much work in little room: a few pieces at a time, whatever the whole comes to."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import chain, islice
from typing import Any, TypeVar

__all__ = ["Budget", "in_window"]

T = TypeVar("T")


async def in_window(jobs: Iterable[Callable[[], Awaitable[T]]], limit: int) -> list[T]:
    """Results of jobs in their order, at most `limit` of which run at once; a job is made when it begins.

    The first error ends all, and is raised.
    """
    waiting = iter(jobs)
    first = list(islice(waiting, 1 if limit == 1 else 2))
    if len(first) < 2:  # one after another: no tasks are needed, which most requests are too small for
        return [await job() for job in chain(first, waiting)]
    found: dict[int, T] = {}
    numbered = enumerate(chain(first, waiting))

    async def worker() -> None:
        for index, job in numbered:
            found[index] = await job()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(limit):
                group.create_task(worker())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [found[index] for index in sorted(found)]


class Budget:
    """So much of something at once; who asks first is served first. More than all of it counts as all."""

    def __init__(self, capacity: float) -> None:
        self._capacity, self._used = capacity, 0.0
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def take(self, amount: float) -> AsyncIterator[None]:
        amount = min(amount, self._capacity)
        turn: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        self._grant()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._used -= amount
            turn.cancel()
            self._grant()

    def _grant(self) -> None:
        while self._waiting:
            amount, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
            elif self._used + amount <= self._capacity:
                self._waiting.popleft()
                self._used += amount
                turn.set_result(None)
            else:
                return
