"""A server that answers as it is told, and both clients."""

import asyncio
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx_retries.retry
import pytest

from dina_lrm import AsyncClient, Client
from tests.local_server import answering
from tests.unit.remote.fake import Call, Fake, Request


@pytest.fixture
def fake() -> Iterator[Fake]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            server.connections += 1

        def do_POST(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            request = Request(self.path, headers, body)
            server.requests.append(request)
            reply = server.plan.pop(0) if server.plan else server.answer(request)
            if isinstance(reply, str):
                if reply == "break":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
                self.close_connection = True
                return
            status, extra, content = reply
            self.send_response(status)
            for name, value in ({"content-length": str(len(content))} | extra).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = Fake("")
    with answering(Handler) as server.url:
        yield server


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "DINA_LRM_TOKEN",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
        "no_proxy",
        "NO_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a client would have waited between attempts."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(httpx_retries.retry, "time", types.SimpleNamespace(sleep=found.append))
    monkeypatch.setattr(httpx_retries.retry, "asyncio", types.SimpleNamespace(sleep=sleep))
    return found


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    def sync(url: str, method: str, *arguments: Any, **settings: Any) -> Any:
        with Client(url, **settings) as one:
            return getattr(one, method)(*arguments)

    async def awaited(url: str, method: str, *arguments: Any, **settings: Any) -> Any:
        async with AsyncClient(url, **settings) as one:
            return await getattr(one, method)(*arguments)

    if request.param == "sync":
        return sync
    return lambda *arguments, **settings: asyncio.run(awaited(*arguments, **settings))
