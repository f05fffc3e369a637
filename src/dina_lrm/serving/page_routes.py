"""What may be asked of Gradio: its routes are cut down to those that the page uses, no file but uploads can
be read, uploads have a quota, the server fetches nothing, and errors look like the server's others."""

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder, is_in_or_equal
from gradio_client.utils import is_http_url_like, traverse
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dina_lrm.serving.middleware import DISK_FULL

__all__ = ["MAX_UPLOADED_BYTES", "PageBlocks", "PageRoutes"]

log = logging.getLogger("dina_lrm.serving")

ROUTES = (
    "/",
    "/assets/",
    "/config",
    "/favicon.ico",
    "/gradio_api/cancel",
    "/gradio_api/file=",
    "/gradio_api/heartbeat/",
    "/gradio_api/queue/data",
    "/gradio_api/queue/join",
    "/gradio_api/reset",
    "/gradio_api/startup-events",
    "/gradio_api/upload",
    "/gradio_api/upload_progress",
    "/static/",
    "/theme.css",
)
"""What the page asks of Gradio. A path that ends in "/" or "=" stands for all that begin with it, but "/"."""

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; object-src 'none'; base-uri 'self'"
)
"""The browser refuses whatever is not from this server. Gradio's templates are compiled in the browser."""

MAX_UPLOADED_BYTES = 2**30
"""Bytes of all uploads that lie on the server's disk at once; they go after an hour."""
PARTIAL_SECONDS = 60.0
"""An upload that has not grown for so long has ended; the server cuts slow ones off sooner."""
MAX_CALL_BYTES = 256 * 1024
"""Bytes of the request that a click makes: texts, numbers, and names of uploads."""


class PageBlocks(gr.Blocks):
    """Blocks whose inputs are uploads. Gradio checks that only for apps that it launches itself: a mounted
    one would open any file of the server, or fetch one from an address, that a request names."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **options: Any) -> Any:
        traverse(inputs, _refuse, _is_elsewhere)
        return await super().preprocess_data(block_fn, inputs, *args, **options)

    async def process_api(self, *args: Any, **options: Any) -> Any:
        """As Gradio's, but what goes wrong there goes into the log: Gradio prints a traceback, and shows the
        visitor its last line. (What goes wrong in a handler is told by the page itself.)"""
        try:
            return await super().process_api(*args, **options)
        except gr.Error as error:  # such as a number outside its range: the visitor is told
            error.print_exception = False
            raise
        except Exception as error:
            log.warning("a call of the page was refused: %s", error, exc_info=True)
            raise gr.Error(
                "An input is not what the page sends: reload it.", print_exception=False
            ) from error


def _is_elsewhere(value: Any) -> bool:
    """Does a part of a request name a file that is not an upload, or no longer there?"""
    if not isinstance(value, dict) or value.get("path") is None:
        return False
    path = str(value["path"])
    return not (is_in_or_equal(path, get_upload_folder()) and Path(path).is_file())


def _refuse(value: Any) -> None:
    raise gr.Error("This picture is not on the server: upload it, or upload it again.", print_exception=False)


class PageRoutes:
    """ASGI middleware around Gradio's app."""

    def __init__(self, app: ASGIApp, *, blocks: gr.Blocks) -> None:
        self.app, self.blocks = app, blocks
        self.uploading = 0
        """Bytes of uploads that are under way."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/"
        answer = _Answer(scope, send)
        if not _is_of_the_page(path):
            return await answer.error(404, f"{path[:80]}: there is nothing here")
        reserved = 0
        try:
            if path == "/gradio_api/upload":
                reserved = self._room_for(Headers(scope=scope))
                self.uploading += reserved
            elif path == "/gradio_api/queue/join" and scope["method"] == "POST":
                receive = await self._checked_call(receive)
            await self.app(_relative(scope, path), receive, answer.send)
        except _Refusal as refusal:
            await answer.error(refusal.status, str(refusal))
        except Exception as error:
            log.exception("the page failed")
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                await answer.error(503, "uploads: the server's disk is full; try again later")
            else:
                await answer.error(500, "a fault of the server; its log tells more")
        finally:
            self.uploading -= reserved

    def _room_for(self, headers: Headers) -> int:
        """The bytes of an upload, if there is room for them beside the others."""
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            raise _Refusal(411, "content-length: the size of the body must be stated")
        size = int(length[:20])
        _remove_partial(get_upload_folder())
        if _bytes_in(get_upload_folder()) + self.uploading + size > MAX_UPLOADED_BYTES:
            raise _Refusal(503, "uploads: no room for more; they are removed after an hour")
        return size

    async def _checked_call(self, receive: Receive) -> Receive:
        """The body of a call again, once it is known that it is one of the page's."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client has left
                return receive
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > MAX_CALL_BYTES:
                raise _Refusal(413, f"body: more than the {MAX_CALL_BYTES} bytes that are taken")
        try:
            call = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _Refusal(422, f"body: not JSON ({error})") from error
        if not isinstance(call, dict):
            raise _Refusal(422, "body: it must be a JSON object")
        number, data = call.get("fn_index"), call.get("data")
        function = self.blocks.fns.get(number) if type(number) is int else None
        if function is None:
            raise _Refusal(422, f"fn_index = {str(number)[:40]}: the page has no such function")
        if not isinstance(data, list) or len(data) != len(function.inputs):
            raise _Refusal(422, f"data: a list of {len(function.inputs)} values is expected")
        again: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return again.pop() if again else await receive()

        return replay


class _Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Answer:
    """The answer to one request: Gradio's, with our headers, and its errors in our words."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._started = False
        self._failed: int | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                self._failed = message["status"]
                return
            self._started = True
            _add_policy(message)
        elif message["type"] == "http.response.body" and self._failed is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self.error(self._failed, _words(self._body))
            return
        await self._send(message)

    async def error(self, status: int, message: str) -> None:
        if self._started:
            return
        self._started = True
        state = self._scope.get("state", {})
        if "facts" in state:
            state["facts"]["error"] = message
        content = {"error": message, "field": None, "request_id": state.get("request_id")}

        async def send(sent: Message) -> None:
            if sent["type"] == "http.response.start":
                _add_policy(sent)
            await self._send(sent)

        async def nothing() -> Message:
            return {"type": "http.disconnect"}

        await JSONResponse(content, status_code=status)(self._scope, nothing, send)


def _add_policy(start: Message) -> None:
    headers = MutableHeaders(scope=start)
    headers["content-security-policy"] = POLICY
    headers["referrer-policy"] = "same-origin"


def _words(body: bytes) -> str:
    """What an error of Gradio, or of FastAPI, says."""
    text = body[:2000].decode(errors="replace")
    try:
        content = json.loads(body)
    except ValueError:
        return text
    said = content.get("detail", content.get("error", text)) if isinstance(content, dict) else text
    if isinstance(said, list) and said and isinstance(said[0], dict):  # what pydantic found
        where = ".".join(str(part) for part in said[0].get("loc", ("body",)))
        return f"{where}: {said[0].get('msg', 'not valid')}"
    return str(said)


def _relative(scope: Scope, path: str) -> Scope:
    """The request as Gradio gets it: with "." as the address of the server, so that the page is reached by
    the way it came, whatever name, port, scheme and prefix a proxy has put before it. (Gradio would make an
    absolute address of headers that anybody can send.)"""
    ours = (b"x-gradio-server", b"x-forwarded-host", b"x-forwarded-proto")
    headers = [(name, value) for name, value in scope["headers"] if name not in ours]
    changed = {"path": path, "root_path": ".", "headers": [*headers, (b"x-gradio-server", b".")]}
    return {**scope, **changed}


def _remove_partial(folder: str) -> None:
    """Uploads that ended half-way: Gradio moves a complete one into a folder of its own, and leaves these."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                if entry.is_file() and time.time() - entry.stat().st_mtime > PARTIAL_SECONDS:
                    os.unlink(entry)


def _bytes_in(folder: str) -> int:
    """Size of all files below a folder; what is removed meanwhile counts as nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def _is_of_the_page(path: str) -> bool:
    if path.startswith("/gradio_api/file=") and is_http_url_like(path.removeprefix("/gradio_api/file=")):
        return False
    return any(
        path.startswith(route) if route != "/" and route[-1] in "/=" else path == route for route in ROUTES
    )
