"""Reloads, and the end of a server: no request is lost, nothing is kept."""

import asyncio
import gc
import threading
import weakref
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from dina_lrm import RewardModel
from dina_lrm.errors import InvalidInputError
from dina_lrm.serving.app import create_app
from dina_lrm.serving.login import Login
from dina_lrm.serving.metrics import Metrics
from dina_lrm.serving.middleware import ServerMiddleware
from dina_lrm.serving.server import Reloadable
from tests.unit.serving.conftest import calling, listening
from tests.unit.serving.test_operators import SETTINGS


async def _asked(app: Any, path: str) -> tuple[int, bytes]:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://127.0.0.1"
    ) as client:
        reply = await client.get(path)
        return reply.status_code, reply.content


def _app(name: str, log: list[str], hold: asyncio.Event) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        log.append(f"{name} starts")
        yield
        log.append(f"{name} stops")

    app = FastAPI(lifespan=lifespan)
    app.state.service = SimpleNamespace(closing=asyncio.Event())

    @app.get("/name")
    async def tell() -> str:
        return name

    @app.get("/held")
    async def held() -> str:
        await hold.wait()
        return name

    return app


def test_a_reload_loses_no_request() -> None:
    log = list[str]()

    async def story() -> None:
        hold = asyncio.Event()
        made = iter(["second", "broken", "third"])

        def make() -> FastAPI:
            name = next(made)
            if name == "broken":
                raise InvalidInputError("no such model")
            return _app(name, log, hold)

        app = Reloadable(_app("first", log, hold), make)
        messages = iter(["startup", "shutdown"])
        done = asyncio.Event()

        async def receive() -> Any:
            if (kind := next(messages)) == "shutdown":
                await done.wait()
            return {"type": f"lifespan.{kind}"}

        async def send(message: Any) -> None:
            log.append(message["type"])

        life = asyncio.create_task(app({"type": "lifespan"}, receive, send))
        while "lifespan.startup.complete" not in log:
            await asyncio.sleep(0.001)
        under_way = asyncio.create_task(_asked(app, "/held"))
        await asyncio.sleep(0.01)
        app.reload()
        while (await _asked(app, "/name"))[1] != b'"second"':
            await asyncio.sleep(0.001)
        assert "first stops" not in log
        hold.set()
        assert await under_way == (200, b'"first"')
        while "first stops" not in log:
            await asyncio.sleep(0.001)
        app.reload()  # which fails
        await asyncio.sleep(0.05)
        assert await _asked(app, "/name") == (200, b'"second"')
        app.reload()
        while (await _asked(app, "/name"))[1] != b'"third"':
            await asyncio.sleep(0.001)
        done.set()
        await life

    asyncio.run(asyncio.wait_for(story(), 20))
    assert log[-2:] == ["third stops", "lifespan.shutdown.complete"]


@pytest.fixture
def gated() -> tuple[FastAPI, asyncio.Event]:
    app, closing = FastAPI(), asyncio.Event()

    @app.get("/v1/slow")
    async def slow() -> None:
        await asyncio.sleep(60)

    @app.get("/beats")
    async def beats() -> StreamingResponse:
        async def forever() -> Any:
            while True:
                yield b"data: x\n\n"
                await asyncio.sleep(0.01)

        return StreamingResponse(forever(), media_type="text/event-stream")

    app.add_middleware(
        ServerMiddleware,
        settings=SETTINGS,
        login=Login(None, cookie="c", title="t"),
        metrics=Metrics(),
        closing=closing,
    )
    return app, closing


@pytest.mark.parametrize("page", [False, True])
def test_a_server_that_has_ended_lets_go_of_its_model(page: bool) -> None:
    """A reload would otherwise keep every model that was ever served in memory."""

    async def made() -> FastAPI:  # inside a loop, because Gradio would make one, and never close it
        return create_app(replace(SETTINGS, page=page))

    app = asyncio.run(made())
    alive = weakref.ref(app.state.service.first.model)
    with calling(app) as client:
        assert client.get("/healthz").status_code == 200
    del app
    del client
    gc.collect()
    assert alive() is None


def test_a_reload_during_a_reload_is_done_after_it() -> None:
    made = list[str]()

    async def story() -> None:
        hold = threading.Event()

        def make() -> FastAPI:
            made.append("made")
            hold.wait()
            return _app("next", [], asyncio.Event())

        app = Reloadable(_app("first", [], asyncio.Event()), make)
        app.reload()
        while not made:
            await asyncio.sleep(0.001)
        app.reload()  # of what was changed since the first one read it
        app.reload()
        hold.set()
        while len(made) < 2:
            await asyncio.sleep(0.001)
        await app._reloading

    asyncio.run(story())
    assert len(made) == 2


def test_what_is_cut_off_at_the_end_is_told_to_come_again(gated: Any) -> None:
    app, _ = gated
    sent = list[dict[str, Any]]()

    async def story() -> None:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/slow",
            "headers": [(b"host", b"127.0.0.1")],
            "query_string": b"",
            "root_path": "",
        }

        async def receive() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        task = asyncio.create_task(app(scope, receive, send))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(story())
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"1") in sent[0]["headers"]


def test_a_stream_without_end_is_ended_with_the_server(gated: Any) -> None:
    app, closing = gated

    async def story() -> None:
        task = asyncio.create_task(_asked(app, "/beats"))
        await asyncio.sleep(0.05)
        assert not task.done()
        closing.set()
        async with asyncio.timeout(2):
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(story())


def test_the_listening_server_is_told_of_by_models(reward: RewardModel) -> None:
    with listening(SETTINGS, reward) as port:
        limits = httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["limits"]
    assert limits["max_request_tokens"] == SETTINGS.max_request_tokens
    assert limits["max_inflight_mib"] == SETTINGS.max_inflight_mib
