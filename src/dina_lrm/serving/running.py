"""A server that can be stopped at any moment, and the address it listens at."""

import contextlib
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from dina_lrm.errors import InvalidInputError

__all__ = ["Server", "bound"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """Until it answers, a signal does what it did before, which ends the command. From then on it lets
    requests that were accepted finish, and `run` returns.

    Args:
        listener: bound to the address; it is closed at the end.
        on_start: told the address once the server answers there.
    """

    def __init__(
        self, config: uvicorn.Config, listener: socket.socket, on_start: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._listener, self._on_start = listener, on_start
        self._before: dict[int, Any] = {}

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until `should_exit` or a signal. `started` says whether it ever answered: not where the app
        did not start, and then the log says why.

        Raises:
            KeyboardInterrupt: SIGINT, or whatever SIGTERM raises, before the server was up.
        """
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        with self._listener, contextlib.suppress(SystemExit):  # uvicorn's own end for an app that fails
            try:
                super().run([self._listener])
            except KeyboardInterrupt:  # a signal that was handed on after the last request was finished
                if not self.started:
                    raise

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self._listener.getsockname()[:2]
        self._on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.started:
            super().handle_exit(sig, frame)
        else:
            signal.signal(sig, self._before[sig])
            signal.raise_signal(sig)


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, not listening yet: nobody is kept waiting while a model is loaded.

    Args:
        port: 0 for any that is free.

    Raises:
        InvalidInputError: no such address on this machine, or the port is taken.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise InvalidInputError(f"cannot listen at --host {host} --port {port}: {reason}") from error
    return listener
