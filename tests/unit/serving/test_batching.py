"""Rows in, batches out: sharing, order, limits, cancellation, failures, draining."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from dina_lrm.serving.batching import BatchStats, Draining, MicroBatcher, QueueFull
from dina_lrm.serving.windows import Budget, in_window


@dataclass(frozen=True)
class Number:
    """A row whose result is twice its value; negative ones fail."""

    value: int
    kind: str = "a"
    work: int = 1

    stage = "score"


class Doubler:
    """What the batcher runs; it may be held up."""

    def __init__(self, slow: float = 0.0, per_work: bool = False) -> None:
        self.slow, self.per_work = slow, per_work
        self.batches: list[list[Number]] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, rows: list[Number]) -> list[int | Exception]:
        self.batches.append(rows)
        assert self.go.wait(10)
        time.sleep(self.slow * (sum(row.work for row in rows) if self.per_work else 1))
        if any(row.value < 0 for row in rows):
            raise ValueError("negative")
        return [2 * row.value for row in rows]


async def submit(batcher: MicroBatcher[Number, int], numbers: list[Number]) -> list[int]:
    """A request of so many rows."""
    with batcher.admit(len(numbers), sum(one.work for one in numbers)) as ticket:
        done = await in_window((partial(batcher.submit, one, ticket) for one in numbers), len(numbers))
    return [one.value for one in done]


Story = Callable[[MicroBatcher[Number, int], Doubler], Coroutine[Any, Any, None]]


def tell(story: Story, *, slow: float = 0.0, per_work: bool = False, **settings: Any) -> Doubler:
    """Run a story with a batcher that is started and stopped around it."""
    work = Doubler(slow, per_work)

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
        found = await asyncio.gather(*(submit(batcher, [Number(2 * i), Number(2 * i + 1)]) for i in range(6)))
        assert found == [[4 * i, 4 * i + 2] for i in range(6)]

    work = tell(story)
    assert [len(batch) for batch in work.batches] == [4, 4, 4]


def test_rows_of_one_kind_go_together_and_the_longest_waiting_goes_first() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        work.go.clear()
        first = asyncio.create_task(submit(batcher, [Number(0, "busy")]))
        await _until(lambda: len(work.batches) == 1)
        waiting = [asyncio.create_task(submit(batcher, [Number(i, "ab"[i % 2])])) for i in range(4)]
        await asyncio.sleep(0.05)
        work.go.set()
        await asyncio.gather(first, *waiting)

    work = tell(story)
    assert [[row.value for row in batch] for batch in work.batches] == [[0], [0, 2], [1, 3]]


def test_a_lonely_row_waits_no_longer_than_it_may() -> None:
    stats: list[BatchStats] = []

    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        assert await submit(batcher, [Number(1)]) == [2]

    tell(story, max_wait_ms=50.0, observe=stats.append)
    assert stats[0].units == 1
    assert stats[0].waits[0] >= 0.05


def test_what_does_not_fit_is_refused_whole_and_the_rest_is_served() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        work.go.clear()
        taken = [asyncio.create_task(submit(batcher, [Number(i)])) for i in range(4)]
        await _until(lambda: len(work.batches) == 1)
        taken.append(asyncio.create_task(submit(batcher, [Number(9)] * 3)))
        await _until(lambda: batcher.queued == 7)
        with pytest.raises(QueueFull) as refusal:
            await submit(batcher, [Number(5)] * 2)
        assert refusal.value.retry_after_seconds >= 1
        assert batcher.queued == 7
        taken.append(asyncio.create_task(submit(batcher, [Number(7)])))
        await _until(lambda: batcher.full)
        work.go.set()
        assert (await asyncio.gather(*taken))[-2:] == [[18, 18, 18], [14]]

    tell(story, max_queue=8, max_wait_ms=0.0)


def test_a_request_that_is_given_up_frees_its_place() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        work.go.clear()
        first = asyncio.create_task(submit(batcher, [Number(0)]))
        await _until(lambda: len(work.batches) == 1)
        gone = asyncio.create_task(submit(batcher, [Number(100), Number(101)]))
        stays = asyncio.create_task(submit(batcher, [Number(3)]))
        await _until(lambda: batcher.queued == 4)
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
            *(submit(batcher, [Number(value)]) for value in (1, -1, 3)), return_exceptions=True
        )
        assert found[0] == [2]
        assert found[2] == [6]
        assert isinstance(found[1], ValueError)

    tell(story)


def test_what_was_taken_is_finished_and_then_nothing_is_taken() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        work.go.clear()
        taken = [asyncio.create_task(submit(batcher, [Number(i)])) for i in range(7)]
        await _until(lambda: len(work.batches) == 1)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await submit(batcher, [Number(1)])
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

        rows = [asyncio.create_task(submit(batcher, [Number(i)])) for i in range(4)]
        await _until(lambda: len(work.batches) == 1)
        name = await batcher.run(job)
        assert name.startswith("model")
        assert await asyncio.gather(*rows) == [[0], [2], [4], [6]]
        assert batcher.overdue_seconds == 0.0

    tell(story, max_wait_ms=0.0)
    assert running == ["job"]


def test_a_failing_job_fails_its_caller_only() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        def job() -> None:
            raise ValueError("of the job")

        with pytest.raises(ValueError, match="of the job"):
            await batcher.run(job)
        assert await submit(batcher, [Number(4)]) == [8]

    tell(story)


def test_a_small_request_does_not_wait_for_the_rest_of_a_large_one() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        large = asyncio.create_task(submit(batcher, [Number(100 + i) for i in range(40)]))
        await _until(lambda: len(work.batches) == 2)
        assert await submit(batcher, [Number(1)]) == [2]
        assert not large.done()
        assert len(await large) == 40

    work = tell(story, max_queue=64, max_wait_ms=0.0, slow=0.01)
    place = next(place for place, batch in enumerate(work.batches) if Number(1) in batch)
    assert place < 6


def test_a_stream_of_small_requests_does_not_starve_a_large_one() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        done = False

        async def small() -> None:
            while not done:
                await submit(batcher, [Number(1, "small")] * 4)

        others = [asyncio.create_task(small()) for _ in range(3)]
        await _until(lambda: len(work.batches) > 3)
        async with asyncio.timeout(5):
            assert len(await submit(batcher, [Number(100 + i) for i in range(16)])) == 16
        done = True
        await asyncio.gather(*others)

    tell(story, max_queue=64, max_wait_ms=0.0, slow=0.01)


def test_a_pass_is_cut_where_it_would_take_too_long() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        await submit(batcher, [Number(0, work=10)])  # shows the pace: 0.01 s for 10
        await submit(batcher, [Number(i, work=100) for i in range(4)])

    work = tell(story, max_pass_seconds=0.15, max_wait_ms=0.0, slow=0.001, per_work=True)
    assert [len(batch) for batch in work.batches] == [1, 1, 1, 1, 1]


def test_work_that_does_not_fit_is_refused_and_a_single_request_never_is() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        work.go.clear()
        first = asyncio.create_task(submit(batcher, [Number(0, work=90)]))
        await _until(lambda: len(work.batches) == 1)
        with pytest.raises(QueueFull):
            await submit(batcher, [Number(1, work=20)])
        work.go.set()
        await first
        assert await submit(batcher, [Number(1, work=200)]) == [2]

    tell(story, max_work=100, max_wait_ms=0.0)


def test_a_pass_that_takes_much_longer_than_it_should_is_overdue() -> None:
    async def story(batcher: MicroBatcher[Number, int], work: Doubler) -> None:
        await submit(batcher, [Number(0)])
        work.go.clear()
        held = asyncio.create_task(submit(batcher, [Number(1)]))
        await _until(lambda: batcher.overdue_seconds > 0.05)
        work.go.set()
        await held
        assert batcher.overdue_seconds == 0.0

    tell(story, max_wait_ms=0.0)


def test_a_budget_serves_in_order_and_counts_the_largest_as_all() -> None:
    async def story() -> None:
        budget, order, most = Budget(10), list[int](), [0, 0]

        async def take(number: int, amount: int) -> None:
            async with budget.take(amount):
                order.append(number)
                most[0] += min(amount, 10)
                most[1] = max(most)
                await asyncio.sleep(0.001)
                most[0] -= min(amount, 10)

        async with asyncio.TaskGroup() as group:
            for number, amount in enumerate((4, 4, 99, 1, 1)):
                task = group.create_task(take(number, amount))
            await asyncio.sleep(0)
            task.cancel()  # one that waits may leave
        assert order == [0, 1, 2, 3]
        assert most[1] == 10

    asyncio.run(story())
