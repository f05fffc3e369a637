"""Who may come in: a token, shown by programs in a header and by people once, in a form."""

import base64
import hashlib
import hmac
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from urllib.parse import parse_qs

from starlette.requests import Request, cookie_parser
from starlette.responses import HTMLResponse, RedirectResponse, Response

from dina_lrm.serving.callers import Caller, Callers, read_callers

__all__ = ["Login"]

MAX_FORM = 4096
"""Bytes of the login form."""
COOKIE_SECONDS = 30 * 24 * 3600


class Login:
    """A token, asked for as `Authorization: Bearer TOKEN`, or of a browser once, which then holds a cookie
    made from it. Compared in constant time.

    Args:
        token: None lets everybody in, unless there are callers.
        cookie: its name.
        title: the heading of the form.
        callers: several, each with a token of its own, in place of `token`.
    """

    def __init__(self, token: str | None, *, cookie: str, title: str, callers: Callers | None = None) -> None:
        self._callers = read_callers(token, None) if callers is None else callers
        self._cookie, self._title = cookie, title

    @property
    def is_open(self) -> bool:
        """Whether no token is asked for."""
        return not self._callers.all

    def knows(self, headers: Mapping[str, str]) -> bool:
        """Whether a request shows a token, or the cookie made from it; always where none is asked for."""
        return self.is_open or self.caller(headers) is not None

    def caller(self, headers: Mapping[str, str]) -> Caller | None:
        """Whose token, or cookie made from it, a request shows; None where there are no tokens."""
        if self.is_open:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Header values arrive as Latin-1 text of the bytes that were sent.
        if scheme.lower() == "bearer" and (found := self._callers.find(given.strip().encode("latin-1"))):
            return found
        cookie = cookie_parser(headers.get("cookie", "")).get(self._cookie, "").encode("latin-1", "replace")
        shown = [one for one in self._callers.all if hmac.compare_digest(cookie, self._shown(one))]
        return shown[0] if shown else None

    def _shown(self, caller: Caller) -> bytes:
        """The cookie of a caller: it does not tell the token."""
        return hmac.digest(caller.digest, self._cookie.encode(), hashlib.sha256).hex().encode()

    def form(self, message: str = "", *, prefix: str = "") -> Response:
        """The page that asks for the token; `prefix` is the path under which a proxy offers the server."""
        page = (files("dina_lrm.serving") / "login.html").read_text(encoding="utf-8")
        style = page.partition("<style>")[2].partition("</style>")[0]
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        for name, text in (("title", self._title), ("message", message), ("prefix", prefix)):
            page = page.replace(f"{{{name}}}", escape(text))
        policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; form-action 'self'"
        return HTMLResponse(
            page, status_code=401, headers={"content-security-policy": f"{policy}; frame-ancestors 'none'"}
        )

    async def login(self, request: Request) -> Response:
        """The answer to the form: to the page with the cookie, or the form again."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_FORM:
                break
        given = parse_qs(body[:MAX_FORM].decode(errors="replace")).get("token", [""])[0]
        prefix = request.scope.get("root_path", "").rstrip("/")
        caller = self._callers.find(given.encode())
        if caller is None:
            return self.form("This is not the token.", prefix=prefix)
        answer = RedirectResponse(f"{prefix}/", status_code=303)
        answer.set_cookie(
            self._cookie,
            self._shown(caller).decode(),
            max_age=COOKIE_SECONDS,
            path=f"{prefix}/",
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer
