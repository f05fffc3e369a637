"""What every request passes: who may come in, how much may be sent, and what is written down about it."""

import asyncio
import contextlib
import errno
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dina_lrm.serving.login import Login
from dina_lrm.serving.metrics import Metrics
from dina_lrm.serving.origins import foreign_site, host_name
from dina_lrm.serving.schemas import RequestError
from dina_lrm.serving.settings import ServerSettings
from dina_lrm.serving.trace import trace_of

__all__ = ["DISK_FULL", "ServerMiddleware", "log"]

log = logging.getLogger("dina_lrm.serving")

OPEN_PATHS = ("/healthz", "/readyz")
"""What an orchestrator asks for, without a token and by whatever address."""
_WATCHED = (*OPEN_PATHS, "/metrics")
"""Asked for every few seconds, and logged at level debug."""
_GRACE_SECONDS = 5.0
"""How long a body that is too large is read and thrown away, so that its sender hears why."""
BODY_STEP_BYTES = 256 * 1024
"""By which a body has to come forward in every `body_seconds`."""
_ANSWER_SECONDS = 60.0
"""Longest that a client may leave a piece of an answer unread."""
_RETRY_SECONDS = "1"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOGGED = 500
"""Characters of a text from outside that go into the log."""


class ServerMiddleware:
    """ASGI middleware around the whole app, the page included.

    Args:
        settings: limits, names and prefix of the server.
        names_requests: whether answers carry x-request-id; Ray Serve's proxy adds it by itself.

    Attributes:
        closing: set when the server is to end: streams that would go on for ever are ended.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: ServerSettings,
        login: Login,
        metrics: Metrics,
        closing: asyncio.Event,
        names_requests: bool = True,
    ) -> None:
        self.app = app
        self.settings, self.metrics, self.login = settings, metrics, login
        self.max_body = int(settings.max_body_mib * 2**20)
        self.max_inflight = int(settings.max_inflight_mib * 2**20)
        self.hosts = None if settings.known_hosts is None else {host.lower() for host in settings.known_hosts}
        self.closing, self.names_requests = closing, names_requests
        self.inflight_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the server has no web socket
            return await send({"type": "websocket.close", "code": 1008})
        self._place(scope)
        self.metrics.inflight.inc()
        try:
            await _Request(self, scope, receive, send).run()
        finally:
            self.metrics.inflight.dec()

    def _place(self, scope: Scope) -> None:
        """Put the prefix of a proxy before the path, whether the proxy has left it there or not."""
        root = self.settings.root_path or scope.get("root_path", "").rstrip("/")
        scope["root_path"] = root
        path = scope["path"]
        if root and path != root and not path.startswith(f"{root}/"):
            scope["path"] = root + path


class _Request:
    """One request on its way through the server."""

    def __init__(self, server: ServerMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        self.server, self.scope = server, scope
        self._receive, self._send = receive, send
        # The first of each name, as starlette reads them; it decodes them all at every look.
        self.headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])
        }
        given = self.headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.trace = trace_of(self.headers.get("traceparent", ""))
        self.path = scope["path"].removeprefix(scope["root_path"]) or "/"
        self.started = time.monotonic()
        self.status = 0
        self.received = 0
        self.complete = False
        """Whether all of the body was received."""
        self._step_ends, self._step_bytes = self.started + server.settings.body_seconds, 0
        scope.setdefault("state", {})
        self.facts: dict[str, Any] = {}
        scope["state"] |= {"request_id": self.request_id, "facts": self.facts, "caller": None}

    async def run(self) -> None:
        try:
            answer = await self._own_answer()
            app: Callable[[Scope, Receive, Send], Awaitable[None]] = (
                self.server.app if answer is None else answer
            )
            await self._unless_closing(app)
        except ClientDisconnect:
            self._refuse(499, "the client has left", None, "gone")
            self.status = self.status or 499
        except asyncio.CancelledError:  # the time for the last answers is over
            if not self.status:
                answer = self._refuse(503, "the server is shutting down", None, "draining")
                answer.headers["retry-after"] = _RETRY_SECONDS
                with contextlib.suppress(Exception):
                    await answer(self.scope, self.receive, self.send)
        except RequestError as error:  # of the body, where no route was there to say it
            await self._answer_once(self._refuse(error.status, str(error), error.field, "bad"))
        except TimeoutError:
            log.warning("an answer was not read", extra={"request_id": self.request_id})
        except Exception as error:
            log.exception("request failed", extra={"request_id": self.request_id})
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                return await self._answer_once(
                    self._refuse(503, "the server's disk is full; try again later", None, "full")
                )
            await self._answer_once(
                self._refuse(500, "a fault of the server; its log tells more", None, "fault")
            )
        finally:
            self.server.inflight_bytes -= self.received
            self._write_down()

    async def _answer_once(self, answer: Response) -> None:
        if not self.status:
            await answer(self.scope, self.receive, self.send)

    async def _unless_closing(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        """Run the app; where the server is to end, an answer that is a stream without end is cut off."""
        if self.path.startswith("/v1/") or self.path in _WATCHED:
            return await app(self.scope, self.receive, self.send)
        running = asyncio.ensure_future(app(self.scope, self.receive, self.send))
        closing = asyncio.ensure_future(self.server.closing.wait())
        try:
            await asyncio.wait({running, closing}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                return running.result()
            if not self.facts.get("stream"):
                return await running
        finally:
            closing.cancel()
            if not running.done():
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    async def _own_answer(self) -> Response | None:
        """What the gate itself says; None lets the request in."""
        server, path, method = self.server, self.path, self.scope["method"]
        host = self.headers.get("host", "")
        if server.hosts is not None and path not in OPEN_PATHS and host_name(host) not in server.hosts:
            return self._refuse(403, f"host: this server is not called {host[:80]!r}", "host", "host")
        if method not in ("GET", "HEAD", "OPTIONS"):
            settings = server.settings
            site = foreign_site(self.headers, host, origins=settings.cors_origins, hosts=settings.hosts)
            if site is not None:
                return self._refuse(
                    403, f"origin: requests from {site[:80]!r} are refused", "origin", "origin"
                )
        length = self.headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) <= 20):
            return self._refuse(
                400, f"content-length: {length[:40]!r} is not a number", "content-length", "bad"
            )
        if int(length) > server.max_body:
            if "expect" not in self.headers:
                await self._throw_away()
            return self._refuse(
                413, f"body: {int(length)} bytes, at most {server.max_body} are taken", "body", "too_large"
            )
        if server.inflight_bytes and server.inflight_bytes + int(length) > server.max_inflight:
            return self._too_busy()
        coding = self.headers.get("content-encoding", "identity").strip().lower()
        if coding != "identity":
            return self._refuse(
                415,
                f"content-encoding: {coding[:40]!r}; a body is taken as it is, without compression",
                "content-encoding",
                "content_type",
            )
        if path in OPEN_PATHS:
            return None
        caller = server.login.caller(self.headers)
        if caller is not None or server.login.is_open:
            self.scope["state"]["caller"] = caller
            if caller is not None and caller.name:
                self.facts["caller"] = caller.name
            return None
        if path == "/login" and method == "POST":
            answer = await server.login.login(Request(self.scope, self.receive))
            if answer.status_code == 401:
                server.metrics.rejected.labels("no_token").inc()
            return answer
        if method == "GET" and "text/html" in self.headers.get("accept", ""):
            return server.login.form(prefix=self.scope["root_path"])
        refusal = self._refuse(401, "authorization: a bearer token is needed", "authorization", "no_token")
        refusal.headers["www-authenticate"] = "Bearer"
        return refusal

    async def receive(self) -> Message:
        if self.complete:
            return await self._receive()  # whether the client leaves
        try:
            async with asyncio.timeout(max(0.001, self._step_ends - time.monotonic())):
                message = await self._receive()
        except TimeoutError as error:
            raise RequestError(
                f"body: less than {BODY_STEP_BYTES} bytes came within "
                f"{self.server.settings.body_seconds:g} s",
                field="body",
                status=408,
            ) from error
        size = len(message.get("body", b""))
        self.received += size
        self.server.inflight_bytes += size
        self.complete = not message.get("more_body", False)
        self._step_bytes += size
        if self._step_bytes >= BODY_STEP_BYTES:
            self._step_ends, self._step_bytes = time.monotonic() + self.server.settings.body_seconds, 0
        if self.received > self.server.max_body:
            raise RequestError(
                f"body: more than the {self.server.max_body} bytes that are taken", field="body", status=413
            )
        if (
            self.server.inflight_bytes > self.server.max_inflight
            and self.received < self.server.inflight_bytes
        ):
            raise RequestError("overloaded: too many bytes are under way; try again", status=503)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            if self.server.names_requests:
                headers["x-request-id"] = self.request_id
            headers["traceparent"] = self.trace.header
            headers["x-content-type-options"] = "nosniff"
            if self.status == 503:
                headers.setdefault("retry-after", _RETRY_SECONDS)
            if self.status == 408:
                headers["connection"] = "close"
            self.facts["stream"] = headers.get("content-type", "").startswith("text/event-stream")
            return await self._send(message)  # a few bytes: only what follows can fill the connection
        async with asyncio.timeout(_ANSWER_SECONDS):
            await self._send(message)

    async def _throw_away(self) -> None:
        try:
            async with asyncio.timeout(_GRACE_SECONDS):
                while (await self._receive()).get("more_body", False):
                    pass
        except TimeoutError:
            pass

    def _too_busy(self) -> JSONResponse:
        answer = self._refuse(503, "overloaded: too many bytes are under way; try again", None, "full")
        answer.headers["retry-after"] = _RETRY_SECONDS
        return answer

    def _refuse(self, status: int, message: str, field: str | None, reason: str) -> JSONResponse:
        self.server.metrics.rejected.labels(reason).inc()
        self.facts["error"] = message[:_LOGGED]
        content = {"error": message, "field": field, "request_id": self.request_id}
        return JSONResponse(content, status_code=status)

    def _write_down(self) -> None:
        seconds = time.monotonic() - self.started
        route = getattr(self.scope.get("route"), "path", "other")
        self.server.metrics.requests.labels(route, str(self.status)).inc()
        self.server.metrics.duration.labels(route).observe(seconds)
        client = self.scope.get("client")
        facts = {name: value for name, value in self.facts.items() if name != "stream"}
        log.log(
            logging.DEBUG if self.path in _WATCHED else logging.INFO,
            "request",
            extra={
                "request_id": self.request_id,
                "trace_id": self.trace.trace_id,
                "span_id": self.trace.span_id,
                "parent_id": self.trace.parent_id,
                "method": self.scope["method"],
                "path": self.scope["path"][:_LOGGED],
                "status": self.status,
                "seconds": round(seconds, 6),
                "bytes": self.received,
                "client": client[0][:_LOGGED] if client else None,
                **facts,
            },
        )
