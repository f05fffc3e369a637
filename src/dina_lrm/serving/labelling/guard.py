"""Who may talk to the labelling page: its own pages, and, where there is a token, those who hold it."""

from collections.abc import Sequence
from importlib.resources import files
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dina_lrm.serving.entrance import Entrance

__all__ = ["Guard", "page_file"]

MAX_BODY = 16 * 1024
"""Bytes of a request."""
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
        token: see `Entrance`.
        hosts: names under which the server may be called, so that a page elsewhere cannot reach it through a
            name of its own; None: any.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, hosts: Sequence[str] | None) -> None:
        self.app = app
        self.entrance = Entrance(token, cookie="dina_lrm_label", title="Which picture is better?")
        self.hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page has no web socket
            return await send({"type": "websocket.close", "code": 1008})

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        answer = await self._own_answer(Request(scope, receive))
        await (self.app if answer is None else answer)(scope, receive, send_with_headers)

    async def _own_answer(self, request: Request) -> Response | None:
        """What the guard itself says; None lets the request in."""
        host = request.headers.get("host", "")
        if self.hosts is not None and _hostname(host) not in self.hosts:
            return _error(403, f"host: this server is not called {host[:80]!r}")
        if request.method not in ("GET", "HEAD"):
            refusal = _foreign(request, host) or _oversized(request)
            if refusal is not None:
                return refusal
        if self.entrance.knows(request.headers):
            return RedirectResponse("/", status_code=303) if request.url.path == "/login" else None
        if request.url.path == "/login" and request.method == "POST":
            return await self.entrance.login(request)
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return self.entrance.form()
        refusal = _error(401, "authorization: a bearer token is needed")
        refusal.headers["www-authenticate"] = "Bearer"
        return refusal


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _foreign(request: Request, host: str) -> Response | None:
    """A refusal of what another site made the browser send."""
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "none")
    if origin is None and site in ("same-origin", "none"):
        return None  # no browser, or one that says it is our own page
    if origin is not None and urlsplit(origin).netloc.lower() == host.lower():
        return None
    return _error(403, f"origin: requests from {(origin or site)[:80]!r} are refused")


def _oversized(request: Request) -> Response | None:
    length = request.headers.get("content-length", "")
    if not length.isdigit():
        return _error(411, "content-length: the size of the body must be stated")
    if int(length) > MAX_BODY:
        return _error(413, f"body: {int(length)} bytes, at most {MAX_BODY} are taken")
    return None


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)
