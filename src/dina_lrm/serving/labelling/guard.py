"""Who may talk to the labelling page: its own pages, and, where there is a token, those who hold it; and what
is written down about every request."""

import logging
import time
import uuid
from collections.abc import Sequence
from importlib.resources import files

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dina_lrm.serving.login import Login
from dina_lrm.serving.origins import foreign_site, host_name

__all__ = ["HEALTH_PATH", "Guard", "error_answer", "page_file"]

log = logging.getLogger("dina_lrm.serving.labelling")

MAX_BODY = 16 * 1024
"""Bytes of a request."""
HEALTH_PATH = "/healthz"
"""What an orchestrator asks for every few seconds, without a token and by whatever name."""
_LOGGED = 500
"""Characters of a path that go into the log."""
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with no-referrer the login form would come from origin "null"
}


def page_file(name: str) -> str:
    """A file of the page as text."""
    return (files("dina_lrm.serving.labelling") / "page" / name).read_text(encoding="utf-8")


class Guard:
    """ASGI middleware around the whole app.

    Args:
        token: see `Login`.
        hosts: names that it is known by, such as label.example.org, whatever Host a proxy sends.
        local_hosts: names of a server that listens on this machine alone. Where there are hosts of either
            kind, it is called by no other name: a page elsewhere could reach it through a name of its own.
        root_path: prefix under which a proxy offers the page, such as "/label", whether the proxy leaves it
            in the path or not.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        hosts: Sequence[str],
        local_hosts: Sequence[str],
        root_path: str,
    ) -> None:
        self.app = app
        self.login = Login(token, cookie="dina_lrm_label", title="Which picture is better?")
        self.hosts = {host.lower() for host in hosts}
        self.known_hosts = self.hosts | {host.lower() for host in local_hosts}
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page has no web socket
            return await send({"type": "websocket.close", "code": 1008})
        root = self.root_path or scope.get("root_path", "").rstrip("/")
        path = scope["path"].removeprefix(root) if scope["path"].startswith(f"{root}/") else scope["path"]
        scope = {**scope, "root_path": root, "path": root + path}
        request_id, started, status = uuid.uuid4().hex, time.monotonic(), 0
        scope["state"] = scope.get("state", {}) | {"request_id": request_id}

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
                headers["x-request-id"] = request_id
            await send(message)

        try:
            answer = await self._own_answer(Request(scope, receive), path)
            await (self.app if answer is None else answer)(scope, receive, send_with_headers)
        except Exception:
            log.exception("request failed", extra={"request_id": request_id})
            if not status:
                answer = error_answer(500, "a fault of the server; its log tells more")
                await answer(scope, receive, send_with_headers)
        finally:
            client = scope.get("client")
            log.log(
                logging.DEBUG if path == HEALTH_PATH else logging.INFO,
                "request",
                extra={
                    "request_id": request_id,
                    "method": scope["method"],
                    "path": path[:_LOGGED],
                    "status": status,
                    "seconds": round(time.monotonic() - started, 6),
                    "client": client[0] if client else None,
                },
            )

    async def _own_answer(self, request: Request, path: str) -> Response | None:
        """What the guard itself says; None lets the request in."""
        if path == HEALTH_PATH:
            return None
        host = request.headers.get("host", "")
        if self.known_hosts and host_name(host) not in self.known_hosts:
            return error_answer(403, f"host: this server is not called {host[:80]!r}")
        if request.method not in ("GET", "HEAD"):
            site = foreign_site(request.headers, host, hosts=self.hosts)
            if site is not None:
                return error_answer(403, f"origin: requests from {site[:80]!r} are refused")
            refusal = _oversized(request)
            if refusal is not None:
                return refusal
        root = request.scope["root_path"]
        if self.login.knows(request.headers):
            return RedirectResponse(f"{root}/", status_code=303) if path == "/login" else None
        if path == "/login" and request.method == "POST":
            return await self.login.login(request)
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return self.login.form(prefix=root)
        refusal = error_answer(401, "authorization: a bearer token is needed")
        refusal.headers["www-authenticate"] = "Bearer"
        return refusal


def _oversized(request: Request) -> Response | None:
    length = request.headers.get("content-length", "")
    if not length.isdigit():
        return error_answer(411, "content-length: the size of the body must be stated")
    if int(length[:20]) > MAX_BODY:
        return error_answer(413, f"body: {length[:20]} bytes, at most {MAX_BODY} are taken")
    return None


def error_answer(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)
