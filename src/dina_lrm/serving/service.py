"""What the routes of one server share: its models, its limits, and how a request is scored."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from anyio import to_thread
from fastapi import Request

from dina_lrm.core.ensemble import mean_and_standard_error
from dina_lrm.errors import ScoringError
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.serving.batching import Done, Draining, QueueFull, Ticket
from dina_lrm.serving.callers import Caller, read_callers
from dina_lrm.serving.engine import Draws, Encode, Encoded, Row, Unit
from dina_lrm.serving.login import Login
from dina_lrm.serving.metrics import Metrics
from dina_lrm.serving.pictures import open_picture
from dina_lrm.serving.schemas import RequestError
from dina_lrm.serving.served import PictureRow, Served
from dina_lrm.serving.settings import ServerSettings
from dina_lrm.serving.windows import Budget, in_window

__all__ = ["ClientGone", "RowScore", "Service"]

STALLED_SECONDS = 60.0
"""A model that is at one pass for so much longer than ten times what it should take is given up as dead."""
ENCODED_BYTES = 256 * 2**20
"""Bytes of pictures that are decoded and wait to be encoded, of all requests together."""
DECODED_PIXELS = 16e6
"""Pixels of pictures that are being decoded at once: many small ones, or one large one."""
PARTS_AT_ONCE = 2
"""Parts of a request that are under way at once: while one is scored, the next can be decoded."""
T = TypeVar("T")


class ClientGone(Exception):
    """Nobody is there to be answered."""


@dataclass(frozen=True)
class RowScore:
    """What came of a row."""

    score: float
    standard_error: float | None
    encode_seconds: float
    """Seconds of the pass that encoded it: text encoders and VAE."""
    forward_seconds: float
    """Seconds of the passes that scored it: backbone and head."""
    notes: tuple[str, ...] = ()


class Service:
    """Models, callers, counters."""

    def __init__(self, settings: ServerSettings, models: dict[str, RewardModel]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.login = Login(
            None,
            cookie="dina_lrm_page",
            title="Reward server",
            callers=read_callers(settings.token, settings.tokens),
        )
        self.models = {name: Served(name, model, settings, self.metrics) for name, model in models.items()}
        self.first = next(iter(self.models.values()))
        self.closing = asyncio.Event()
        self.warm = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self._encoded, self._decoding = Budget(ENCODED_BYTES), Budget(DECODED_PIXELS)

    @property
    def queued(self) -> int:
        return sum(model.batcher.queued for model in self.models.values())

    @property
    def healthy(self) -> bool:
        return self.warm and all(
            model.batcher.overdue_seconds < STALLED_SECONDS for model in self.models.values()
        )

    @property
    def ready(self) -> bool:
        return self.healthy and not any(model.batcher.full for model in self.models.values())

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        for one in self.models.values():
            one.batcher.start()
            await one.batcher.run(one.engine.warm_up)
        self.warm = True

    async def stop(self) -> None:
        """Finish what was taken, and let go of the models: FastAPI remembers the functions of every app's
        routes, and those this service."""
        self.warm = False
        self.closing.set()
        await asyncio.gather(*(model.batcher.stop() for model in self.models.values()))
        for one in self.models.values():
            one.engine.release()

    def run(self, job: Callable[[], T]) -> T:
        """`job()` on the first model's thread, for callers in other threads.

        Raises:
            ScoringError: the server is too busy, or shutting down.
        """
        if self.loop is None:
            raise ScoringError("the server has not started")
        try:
            return asyncio.run_coroutine_threadsafe(self.first.batcher.run(job), self.loop).result()
        except (QueueFull, Draining) as error:
            raise ScoringError("the server is busy: try again in a moment") from error

    def find(self, name: str | None) -> Served:
        """The model of a name.

        Raises:
            RequestError: 422; there is none of that name.
        """
        if name is None:
            return self.first
        if name not in self.models:
            raise RequestError(
                f"model: there is no {name[:80]!r}, only {', '.join(self.models)}", field="model", status=422
            )
        return self.models[name]

    def find_for(self, request: Request, name: str | None = None) -> Served:
        """The model that a request names, in its address or in its body.

        Args:
            name: in its body.

        Raises:
            RequestError: 422; there is none of that name, or the two differ.
        """
        named = {one for one in (*request.query_params.getlist("model"), name) if one is not None}
        if len(named) > 1:
            raise RequestError(
                f"model: the request names {' and '.join(repr(one[:80]) for one in sorted(named))}",
                field="model",
                status=422,
            )
        return self.find(next(iter(named), None))

    async def score(
        self, request: Request, served: Served, rows: Sequence[Row | PictureRow], name: str
    ) -> list[RowScore]:
        """Scores of the rows of a request; what they cost goes into its log line.

        Raises:
            RequestError: 413, the request is too large.
            QueueFull, Draining, CallerFull: it was not taken.
            ClientGone: whoever sent it has left; what was under way was dropped.
        """
        caller: Caller | None = request.state.caller
        work = served.check_cost(rows, name, caller)
        request.state.facts |= {"rows": len(rows), "tokens": work, "model": served.name}
        scores = await _unless_gone(request, self.score_rows(served, rows, caller, work))
        for stage in ("encode", "forward"):
            seconds = sum(getattr(score, f"{stage}_seconds") for score in scores) / len(scores)
            request.state.facts[f"{stage}_seconds"] = round(seconds, 6)
        return scores

    async def score_rows(
        self, served: Served, rows: Sequence[Row | PictureRow], caller: Caller | None, work: int
    ) -> list[RowScore]:
        """Scores of rows whose cost was checked.

        Raises:
            QueueFull, Draining, CallerFull: they were not taken.
        """
        with _counted(caller, len(rows)), served.batcher.admit(len(rows), work) as ticket:
            scores = await self._score(served, ticket, rows)
        self.metrics.scores.labels(served.name).inc(len(scores))
        if caller is not None:
            self.metrics.callers.labels(caller.name).inc(len(scores))
        return scores

    async def _score(
        self, served: Served, ticket: Ticket, rows: Sequence[Row | PictureRow]
    ) -> list[RowScore]:
        """Part after part, so that what a request holds in memory does not grow with it. The rows of a part
        are encoded and scored together."""
        parts = await in_window(
            (partial(self._part, served, ticket, part) for part in self._parts(served, rows)), PARTS_AT_ONCE
        )
        return [one for part in parts for one in part]

    def _parts(self, served: Served, rows: Sequence[Row | PictureRow]) -> Iterator[list[Row | PictureRow]]:
        """At most a pass's worth of rows, and so many pictures as may wait to be encoded."""
        part: list[Row | PictureRow] = []
        size = 0
        for row in rows:
            own = 0 if isinstance(row, Row) else served.encoded_bytes(row.picture)
            if part and (len(part) == self.settings.max_batch_size or size + own > ENCODED_BYTES / 2):
                yield part
                part, size = [], 0
            part.append(row)
            size += own
        yield part

    async def _part(self, served: Served, ticket: Ticket, part: Sequence[Row | PictureRow]) -> list[RowScore]:
        pictures = [row for row in part if isinstance(row, PictureRow)]
        encoded = await self._encode(served, ticket, pictures) if pictures else []
        rows = [row for row in part if isinstance(row, Row)] + [
            Row(done.value.latent, done.value.conditioning, row.noise_levels, row.seed, row.num_draws)
            for done, row in zip(encoded, pictures, strict=True)
        ]
        noise = [Draws(row) for row in rows]

        async def draw(index: int) -> list[Done[float]]:
            units = [served.engine.score_unit(row, own, index) for row, own in zip(rows, noise, strict=True)]
            done = await self._together(served, ticket, units)
            for own in noise:
                own.drop(index)
            return done

        num_draws = rows[0].num_draws
        at_once = max(1, self.settings.max_batch_size // len(rows))
        draws = await in_window((partial(draw, index) for index in range(num_draws)), min(at_once, num_draws))
        means, errors = _over_draws([[done.value for done in one] for one in draws])
        return [
            RowScore(
                score=means[index],
                standard_error=None if errors is None else errors[index],
                encode_seconds=encoded[index].seconds if encoded else 0.0,
                forward_seconds=sum(one[index].seconds for one in draws),
                notes=encoded[index].value.notes if encoded else (),
            )
            for index in range(len(rows))
        ]

    async def _encode(
        self, served: Served, ticket: Ticket, rows: Sequence[PictureRow]
    ) -> list[Done[Encoded]]:
        """Decode, shrink and encode pictures; of all requests only so many pixels are in memory at once."""

        async def decode(row: PictureRow) -> Encode:
            picture = row.picture
            async with self._decoding.take(picture.pixels):
                tensor = await to_thread.run_sync(
                    lambda: open_picture(
                        picture.data,
                        self.settings.max_megapixels,
                        picture.name,
                        lambda height, width: served.model.picture_size(height, width, picture.name),
                    )
                )
            return Encode(tensor, row.prompt)

        async with self._encoded.take(sum(served.encoded_bytes(row.picture) for row in rows)):
            units = await in_window((partial(decode, row) for row in rows), len(rows))
            return await self._together(served, ticket, units)

    async def _together(self, served: Served, ticket: Ticket, units: Sequence[Unit]) -> list[Done[Any]]:
        """Results of units that are to share a pass, where they can."""
        return await in_window((partial(served.batcher.submit, unit, ticket) for unit in units), len(units))


def _over_draws(scores: list[list[float]]) -> tuple[list[float], list[float] | None]:
    """Mean of each row over the draws, and its standard error where there are several."""
    if len(scores) == 1:  # without a tensor: the thread that computes one would be waited for
        return scores[0], None
    means, errors = mean_and_standard_error(torch.tensor(scores))
    return means.tolist(), None if errors is None else errors.tolist()


@contextmanager
def _counted(caller: Caller | None, rows: int) -> Iterator[None]:
    """Rows of a caller, as long as they are under way."""
    if caller is None:
        yield
        return
    caller.check_room(rows)
    caller.rows += rows
    try:
        yield
    finally:
        caller.rows -= rows


async def _unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """The answer, unless the client leaves before it is there."""
    working = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
