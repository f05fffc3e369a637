"""Rows in, batches out: sharing, order, limits, cancellation, failures, draining."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

from dina_lrm.serving.batching import BatchStats, Draining, MicroBatcher, QueueFull


@dataclass(frozen=True)
class Number:
    """A row whose result is twice its value; negative ones fail."""

    value: int
    kind: str = "a"


class Doubler:
    """What the batcher runs; it may be held up."""

    def __init__(self) -> None:
        self.batches: list[list[Number]] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, rows: list[Number]) -> list[int | Exception]:
        self.batches.append(rows)
        assert self.go.wait(10)
        if any(row.value < 0 for row in rows):
            raise ValueError("negative")
        return [2 * row.value for row in rows]


Story = Callable[[MicroBatcher[Number, int], Doubler], Coroutine[Any, Any, None]]


def tell(story: Story, **settings: Any) -> Doubler:
    """Run a story with a batcher that is started and stopped around it."""
    work = Doubler()

    async def run() -> None:
        options = {"max_batch_size": 4, "max_wait_ms": 20.0, "max_queue": 16} | settings
        batcher = MicroBatcher[Number, int](work, **options)
        batcher.start()
        try:
            await story(batcher, work)
        finally:
            work.go.set()
            await batcher.stop()

    asyncio.run(asyncio.wait_for(run(), 20))
    return work


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def test_requests_share_batches_and_get_their_own_results() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        found = await asyncio.gather(*(batcher.submit([Number(2 * i), Number(2 * i + 1)]) for i in range(6)))
        assert found == [[4 * i, 4 * i + 2] for i in range(6)]

    work = tell(story)
    assert [len(batch) for batch in work.batches] == [4, 4, 4]


def test_rows_of_one_kind_go_together_and_the_longest_waiting_goes_first() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        work.go.clear()
        first = asyncio.create_task(batcher.submit([Number(0, "busy")]))
        await _until(lambda: len(work.batches) == 1)
        waiting = [asyncio.create_task(batcher.submit([Number(i, "ab"[i % 2])])) for i in range(4)]
        await asyncio.sleep(0.05)
        work.go.set()
        await asyncio.gather(first, *waiting)

    work = tell(story)
    assert [[row.value for row in batch] for batch in work.batches] == [[0], [0, 2], [1, 3]]


def test_a_lonely_row_waits_no_longer_than_it_may() -> None:
    stats: list[BatchStats] = []

    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        assert await batcher.submit([Number(1)]) == [2]

    tell(story, max_wait_ms=50.0, observe=stats.append)
    assert stats[0].rows == 1
    assert stats[0].waits[0] >= 0.05


def test_what_does_not_fit_is_refused_whole_and_the_rest_is_served() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        work.go.clear()
        taken = [asyncio.create_task(batcher.submit([Number(i)])) for i in range(4)]
        await _until(lambda: len(work.batches) == 1)
        taken.append(asyncio.create_task(batcher.submit([Number(9)] * 3)))
        await _until(lambda: batcher.queued == 3)
        with pytest.raises(QueueFull) as refusal:
            await batcher.submit([Number(5)] * 2)
        assert refusal.value.retry_after_seconds >= 1
        assert batcher.queued == 3
        taken.append(asyncio.create_task(batcher.submit([Number(7)])))
        await _until(lambda: batcher.full)
        work.go.set()
        assert (await asyncio.gather(*taken))[-2:] == [[18, 18, 18], [14]]

    tell(story, max_queue=4, max_wait_ms=0.0)


def test_a_request_that_is_given_up_frees_its_place() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        work.go.clear()
        first = asyncio.create_task(batcher.submit([Number(0)]))
        await _until(lambda: len(work.batches) == 1)
        gone = asyncio.create_task(batcher.submit([Number(100), Number(101)]))
        stays = asyncio.create_task(batcher.submit([Number(3)]))
        await _until(lambda: batcher.queued == 3)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        work.go.set()
        assert await first == [0]
        assert await stays == [6]

    work = tell(story, max_wait_ms=0.0)
    assert all(row.value < 100 for batch in work.batches for row in batch)


def test_a_row_that_fails_does_not_spoil_those_beside_it() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        found = await asyncio.gather(
            *(batcher.submit([Number(value)]) for value in (1, -1, 3)), return_exceptions=True
        )
        assert found[0] == [2]
        assert found[2] == [6]
        assert isinstance(found[1], ValueError)

    tell(story)


def test_what_was_taken_is_finished_and_then_nothing_is_taken() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        work.go.clear()
        taken = [asyncio.create_task(batcher.submit([Number(i)])) for i in range(7)]
        await _until(lambda: len(work.batches) == 1)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await batcher.submit([Number(1)])
        with pytest.raises(Draining):
            await batcher.run(lambda: 1)
        work.go.set()
        assert await asyncio.gather(*taken) == [[2 * i] for i in range(7)]
        await stopping

    tell(story)


def test_jobs_have_the_model_to_themselves() -> None:
    running: list[str] = []

    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        def job() -> str:
            running.append("job")
            time.sleep(0.05)
            assert len(work.batches) in (1, 2)
            return threading.current_thread().name

        rows = [asyncio.create_task(batcher.submit([Number(i)])) for i in range(4)]
        await _until(lambda: len(work.batches) == 1)
        name = await batcher.run(job)
        assert name.startswith("model")
        assert await asyncio.gather(*rows) == [[0], [2], [4], [6]]
        assert batcher.busy_seconds == 0.0

    tell(story, max_wait_ms=0.0)
    assert running == ["job"]


def test_a_failing_job_fails_its_caller_only() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        def job() -> None:
            raise ValueError("of the job")

        with pytest.raises(ValueError, match="of the job"):
            await batcher.run(job)
        assert await batcher.submit([Number(4)]) == [8]

    tell(story)
