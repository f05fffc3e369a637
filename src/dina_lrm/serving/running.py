"""A server that can be stopped at any moment, and the address it listens at."""

import contextlib
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from dina_lrm.errors import InvalidInputError

__all__ = ["Server", "bound"]

WAITING_CONNECTIONS = 2048
"""That the system keeps until they are accepted."""


class Server(uvicorn.Server):
    """A signal lets requests that were accepted finish, and `run` returns. One that comes before the server
    answers is handed on when the app has started and stopped again, and then ends the command; a second one
    ends it at once.

    Args:
        listener: bound to the address; it is closed at the end.
        on_start: told the address once the server answers there.
    """

    def __init__(
        self, config: uvicorn.Config, listener: socket.socket, on_start: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._listener, self._on_start = listener, on_start
        self._early: int | None = None
        """A signal that came before the server answered."""
        self.answered = False
        """Whether the server ever answered: not where the app did not start, and then the log says why."""

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until `should_exit` or a signal.

        Raises:
            KeyboardInterrupt: SIGINT, or whatever SIGTERM raises, before the server answered.
        """
        with self._listener, contextlib.suppress(SystemExit):  # uvicorn's own end for an app that fails
            try:
                super().run([self._listener])
            except KeyboardInterrupt:  # a signal that was handed on after the last request was finished
                if not self.answered:
                    raise
        if self._early is not None:
            signal.raise_signal(self._early)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:  # the app did not start, which older versions of uvicorn do not raise for
            return
        # asyncio has taken the number that it takes at once for this one, too
        self._listener.listen(WAITING_CONNECTIONS)
        if self._early is None:
            self.answered = True
            host, port = self._listener.getsockname()[:2]
            self._on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.answered:
            super().handle_exit(sig, frame)
        elif self._early is None:
            self._early, self.should_exit = sig, True
        else:
            raise KeyboardInterrupt(sig)


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, not listening yet: nobody is kept waiting while a model is loaded.

    Args:
        port: 0 for any that is free.

    Raises:
        InvalidInputError: no such address on this machine, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named: for sockets without it asyncio leaves Nagle's delay of 40 ms between two writes.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise InvalidInputError(f"cannot listen at --host {host} --port {port}: {reason}") from error
    return listener
