"""One server process: an app that can be loaded anew under way, and logs as JSON lines on stderr."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter
from starlette.types import Receive, Scope, Send

from dina_lrm.serving.connections import uvicorn_config
from dina_lrm.serving.running import Server
from dina_lrm.serving.settings import ServerSettings

__all__ = ["Reloadable", "log_as_json", "serve"]

log = logging.getLogger("dina_lrm.serving")

DRAIN_SECONDS = 30
"""How long requests that were accepted may take after SIGTERM."""
AT_START = ("host", "port", "max_connections", "header_seconds", "proxies")
"""Settings of the connections, which a reload leaves as they were."""


def log_as_json() -> None:
    """Log lines, and warnings of the libraries, as one JSON object each, on stderr."""
    logging.captureWarnings(True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            "{levelname}{name}{message}",
            style="{",
            timestamp=True,
            rename_fields={"levelname": "level", "name": "logger"},
            reserved_attrs=[*RESERVED_ATTRS, "color_message"],
        )
    )
    logging.basicConfig(handlers=[handler])  # for all the others, from level warning on
    for name in ("dina_lrm.serving", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


class Reloadable:
    """ASGI application that stands for another, and can change it under way: requests that came before the
    change are finished by the old one, later ones go to the new one.

    Args:
        make: a new application, from settings and models as they are now; called in a thread.
    """

    def __init__(self, app: FastAPI, make: Callable[[], FastAPI]) -> None:
        self._make = make
        self._current = _Running(app)
        self._reloading: asyncio.Task[None] | None = None
        self._once_more = False
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def app(self) -> FastAPI:
        return self._current.app

    def close(self) -> None:
        """End streams that would go on for ever."""
        self.app.state.service.closing.set()

    def reload(self) -> None:
        """Load anew; where that is under way already, once more after it."""
        if self._reloading is None or self._reloading.done():
            self._reloading = asyncio.create_task(self._reload())
        else:
            self._once_more = True

    async def _reload(self) -> None:
        await self._load()
        while self._once_more:
            self._once_more = False
            await self._load()

    async def _load(self) -> None:
        log.info("reloading")
        try:
            fresh = _Running(await asyncio.to_thread(self._make))
            await fresh.start()
        except Exception:
            log.exception("the reload failed; what was loaded before is served on")
            return
        old, self._current = self._current, fresh
        self._ending.add(ending := asyncio.create_task(old.stop()))
        ending.add_done_callback(self._ending.discard)
        log.info("reloaded")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            return await self._current(scope, receive, send)
        await receive()
        try:
            await self._current.start()
        except Exception as error:
            log.exception("the server does not start")
            return await send({"type": "lifespan.startup.failed", "message": str(error)})
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self._reloading is not None:
            self._reloading.cancel()
            await asyncio.gather(self._reloading, return_exceptions=True)
        await asyncio.gather(self._current.stop(), *self._ending)
        await send({"type": "lifespan.shutdown.complete"})


class _Running:
    """An application that was started, and how many requests it has."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self._lifespan = contextlib.AsyncExitStack()
        self._requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        await self._lifespan.enter_async_context(self.app.router.lifespan_context(self.app))

    async def stop(self) -> None:
        """When its last request is answered."""
        self.app.state.service.closing.set()
        await self._idle.wait()
        await self._lifespan.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._requests += 1
        self._idle.clear()
        try:
            await self.app(scope, receive, send)
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()


class _Server(Server):
    """Tells the app when it is to end, while requests are still under way, and takes SIGHUP.

    Args:
        hung_up: whether one has come while the first app was made.
    """

    def __init__(
        self, config: uvicorn.Config, listener: socket.socket, app: Reloadable, hung_up: Callable[[], bool]
    ) -> None:
        super().__init__(config, listener, lambda address: log.info("serving at %s", address))
        self._app, self._hung_up = app, hung_up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._app.reload)
        if self._hung_up():
            self._app.reload()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.close()
        await super().shutdown(sockets)


def serve(make: Callable[[], FastAPI], settings: ServerSettings, listener: socket.socket) -> bool:
    """Serve until SIGTERM or SIGINT, then finish what was accepted; SIGHUP loads all anew.

    Args:
        make: the application, from settings and models as they are when it is called.
        settings: of the connections; a reload does not change these.
        listener: bound to the address; it is closed at the end.

    Returns:
        Whether it had started: False where the warm-up failed; the log says why.

    Raises:
        KeyboardInterrupt: stopped before it was up.
    """
    early = list[int]()
    signal.signal(signal.SIGHUP, lambda number, _: early.append(number))

    def remade() -> FastAPI:
        fresh = make()
        now: ServerSettings = fresh.state.service.settings
        if changed := [name for name in AT_START if getattr(now, name) != getattr(settings, name)]:
            log.warning("changed, and taken at the next start only: %s", ", ".join(changed))
        return fresh

    app = Reloadable(make(), remade)
    config = uvicorn_config(
        app,
        drain_seconds=DRAIN_SECONDS,
        header_seconds=settings.header_seconds,
        max_connections=settings.max_connections,
        proxies=settings.proxies,
    )
    server = _Server(config, listener, app, lambda: bool(early))
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, once all is answered
    server.run()
    return server.answered
