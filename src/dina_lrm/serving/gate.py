"""What every request passes: who may come in, how much may be sent, and what is written down about it."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dina_lrm.serving.entrance import Entrance
from dina_lrm.serving.metrics import Metrics
from dina_lrm.serving.schemas import RequestError

__all__ = ["Gate", "log"]

log = logging.getLogger("dina_lrm.serving")

OPEN_PATHS = ("/healthz", "/readyz")
"""What an orchestrator asks for without a token."""
_WATCHED = (*OPEN_PATHS, "/metrics")
"""Asked for every few seconds, and logged at level debug."""
_GRACE_SECONDS = 5.0
"""How long a body that is too large is read and thrown away, so that its sender hears why."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Gate:
    """ASGI middleware around the whole app, the page included.

    Args:
        token: see `Entrance`.
        max_body: bytes of a request.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, max_body: int, metrics: Metrics) -> None:
        self.app = app
        self.entrance = Entrance(token, cookie="dina_lrm_page", title="Reward server")
        self.max_body = max_body
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the server has no web socket
            return await send({"type": "websocket.close", "code": 1008})
        await _Passage(self, scope, receive, send).run()


class _Passage:
    """One request on its way through the gate."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self.gate, self.scope = gate, scope
        self._receive, self._send = receive, send
        self.headers = Headers(scope=scope)
        given = self.headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.started = time.monotonic()
        self.status = 0
        self.received = 0
        scope.setdefault("state", {})
        self.facts: dict[str, Any] = {}
        scope["state"] |= {"request_id": self.request_id, "facts": self.facts}

    async def run(self) -> None:
        answer = await self._own_answer()
        app: Callable[[Scope, Receive, Send], Awaitable[None]] = self.gate.app if answer is None else answer
        try:
            await app(self.scope, self.receive, self.send)
        except Exception:
            log.exception("request failed", extra={"request_id": self.request_id})
            if not self.status:
                self.gate.metrics.rejected.labels("fault").inc()
                await self._error(500, "a fault of the server; its log tells more", None)(
                    self.scope, self.receive, self.send
                )
        finally:
            self._write_down()

    async def _own_answer(self) -> Response | None:
        """What the gate itself says; None lets the request in."""
        path, method = self.scope["path"], self.scope["method"]
        length = self.headers.get("content-length", "0")
        if not length.isdigit():
            return self._refuse(
                400, f"content-length: {length[:40]!r} is not a number", "content-length", "bad"
            )
        if int(length) > self.gate.max_body:
            if "expect" not in self.headers:
                await self._throw_away()
            return self._refuse(
                413, f"body: {int(length)} bytes, at most {self.gate.max_body} are taken", "body", "too_large"
            )
        entrance = self.gate.entrance
        if path in OPEN_PATHS or entrance.knows(self.headers):
            return None
        if path == "/login" and method == "POST":
            answer = await entrance.login(Request(self.scope, self.receive))
            if answer.status_code == 401:
                self.gate.metrics.rejected.labels("no_token").inc()
            return answer
        if method == "GET" and "text/html" in self.headers.get("accept", ""):
            return entrance.form()
        refusal = self._refuse(401, "authorization: a bearer token is needed", "authorization", "no_token")
        refusal.headers["www-authenticate"] = "Bearer"
        return refusal

    async def receive(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        if self.received > self.gate.max_body:
            raise RequestError(
                f"body: more than the {self.gate.max_body} bytes that are taken", field="body", status=413
            )
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)

    async def _throw_away(self) -> None:
        try:
            async with asyncio.timeout(_GRACE_SECONDS):
                while (await self._receive()).get("more_body", False):
                    pass
        except TimeoutError:
            pass

    def _error(self, status: int, message: str, field: str | None) -> JSONResponse:
        content = {"error": message, "field": field, "request_id": self.request_id}
        return JSONResponse(content, status_code=status)

    def _refuse(self, status: int, message: str, field: str | None, reason: str) -> JSONResponse:
        self.gate.metrics.rejected.labels(reason).inc()
        return self._error(status, message, field)

    def _write_down(self) -> None:
        seconds = time.monotonic() - self.started
        route = getattr(self.scope.get("route"), "path", "other")
        self.gate.metrics.requests.labels(route, str(self.status)).inc()
        self.gate.metrics.duration.labels(route).observe(seconds)
        client = self.scope.get("client")
        log.log(
            logging.DEBUG if self.scope["path"] in _WATCHED else logging.INFO,
            "request",
            extra={
                "request_id": self.request_id,
                "method": self.scope["method"],
                "path": self.scope["path"],
                "status": self.status,
                "seconds": round(seconds, 6),
                "bytes": self.received,
                "client": client[0] if client else None,
                **self.facts,
            },
        )
