"""Connections that strangers hold open: how long, how many, and how large their headers may be.

uvicorn's protocol over h11, which refuses a header of more than `HEADER_BYTES` at once. (Its protocol over
httptools has no such limit, and copies an endless header again with every piece of it.) What the two leave
out is here: a time for the header, a number of connections, headers that come in one piece and are larger,
two lengths for one body, and targets that name the host.
"""

import asyncio
import json
import logging
import resource
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

import h11
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dina_lrm.serving.forwarded import ForwardedHeaders
from dina_lrm.serving.settings import ServerSettings

__all__ = ["PlainRequests", "bounded_protocol", "descriptors_allow", "uvicorn_config"]

log = logging.getLogger("uvicorn.error")

HEADER_BYTES = 32 * 1024
"""Bytes of a request line with its headers."""
KEEP_ALIVE_SECONDS = 75
"""How long a connection is kept that says nothing, after an answer."""
ACCEPTED_AT_ONCE = 1
"""Connections in one turn of the event loop. By default asyncio takes all that wait, up to 2048: then it is
out of files before the first one that is too many has been closed, and tries, and logs, as often again."""
SPARE_DESCRIPTORS = 64
"""Open files that a server needs beside its connections."""
_LOG_EVERY_SECONDS = 5.0


def _told(message: str) -> dict[str, str | None]:
    """An error outside any request, in the words of all the others."""
    return {"error": message, "field": None, "request_id": None}


_BUSY = json.dumps(_told("too many connections: try again in a moment")).encode()
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: " + str(len(_BUSY)).encode() + b"\r\n\r\n" + _BUSY
)


def uvicorn_config(
    app: ASGIApp,
    *,
    drain_seconds: int,
    header_seconds: float = ServerSettings.header_seconds,
    max_connections: int = ServerSettings.max_connections,
    proxies: Sequence[str] = (),
) -> uvicorn.Config:
    """How every server of ours is run: over h11 with limits, believing named proxies only.

    Args:
        drain_seconds: how long requests that were accepted may take after a signal.
        header_seconds, max_connections, proxies: as in `ServerSettings`.
    """
    return uvicorn.Config(
        PlainRequests(ForwardedHeaders(app, proxies) if proxies else app),  # type: ignore[arg-type]
        http=bounded_protocol(
            header_seconds=header_seconds, max_connections=descriptors_allow(max_connections)
        ),
        h11_max_incomplete_event_size=HEADER_BYTES,
        backlog=ACCEPTED_AT_ONCE,
        loop="asyncio",  # which says when it is out of files, and goes on
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=drain_seconds,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        server_header=False,
        proxy_headers=False,
    )


class PlainRequests:
    """ASGI middleware: every request has one length and a header of at most `HEADER_BYTES`, and its target is
    a path (RFC 9112, 3.2.2 and 6.1)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        target = scope["raw_path"]
        size = len(target) + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in headers)  # with ": " and the line's end
        names = {name for name, _ in headers}
        if size > HEADER_BYTES:
            answer = _closing(431, f"headers: {size} bytes with the target, at most {HEADER_BYTES} are taken")
            return await answer(scope, receive, send)
        if {b"content-length", b"transfer-encoding"} <= names:
            answer = _closing(400, "content-length and transfer-encoding: a body has one of them")
            return await answer(scope, receive, send)
        if target[:8].lower().startswith((b"http://", b"https://")):
            host, slash, path = target.partition(b"://")[2].partition(b"/")
            headers = [(name, value) for name, value in headers if name != b"host"]
            scope["raw_path"] = slash + path or b"/"
            scope["path"] = unquote(slash + path) or "/"
            scope["headers"] = [(b"host", host), *headers]
        await self.app(scope, receive, send)


def _closing(status: int, message: str) -> JSONResponse:
    """An answer after which the connection is closed: where the next request would begin is not known."""
    return JSONResponse(_told(message), status_code=status, headers={"connection": "close"})


def descriptors_allow(max_connections: int) -> int:
    """`max_connections`, or fewer where this process may not open so many files; the limit is raised as far
    as the system lets it, and what is left is logged."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    allowed = max(1, soft - SPARE_DESCRIPTORS)
    log.warning("at most %d connections: this process may open %d files only", allowed, soft)
    return allowed


def bounded_protocol(*, header_seconds: float, max_connections: int) -> type[H11Protocol]:
    """A protocol class for `uvicorn.Config(http=...)`.

    Args:
        header_seconds: from the opening of a connection, or the end of the answer before, to the end of a
            request's headers. A connection that is kept without a byte is closed after uvicorn's own
            `timeout_keep_alive`.
        max_connections: further ones are answered with 503 and closed.
    """
    last_logged = [float("-inf")]

    class BoundedProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _refused = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                self._refused = True
                transport.write(_REFUSAL)
                transport.close()
                if time.monotonic() - last_logged[0] > _LOG_EVERY_SECONDS:
                    last_logged[0] = time.monotonic()
                    log.warning("%d connections are open: further ones are refused", max_connections)
                return
            self._arm()

        def data_received(self, data: bytes) -> None:
            if self._refused or self.transport.is_closing():
                return
            before = self.cycle
            if self._deadline is None and (before is None or before.response_complete):
                # The first bytes of the next request, or of a body that was answered before it was read.
                self._arm()
            super().data_received(data)
            idle = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
            if self.cycle is not before or idle:  # a request's headers are there, or its last body has ended
                self._disarm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._say(400, "this is no HTTP request, or its headers are too large")

        def _arm(self) -> None:
            self._deadline = self.loop.call_later(header_seconds, self._too_slow)

        def _disarm(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _too_slow(self) -> None:
            self._deadline = None
            if not self.transport.is_closing():
                self._say(408, f"no complete request within {header_seconds:g} s")

        def _say(self, status: int, message: str) -> None:
            """An answer outside any request; nothing may follow it."""
            content = json.dumps(_told(message)).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(content))),
                ("connection", "close"),
            ]
            try:
                for event in (
                    h11.Response(status_code=status, headers=headers),
                    h11.Data(data=content),
                    h11.EndOfMessage(),
                ):
                    self.transport.write(self.conn.send(event) or b"")
            except h11.LocalProtocolError:
                pass  # in the middle of another answer: closing is all that can be said
            self.transport.close()

    return BoundedProtocol
