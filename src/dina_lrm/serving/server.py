"""One server process: uvicorn around the app, logs as JSON lines on stderr."""

import logging
import socket
import sys

import uvicorn
from fastapi import FastAPI
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from dina_lrm.serving.running import Server

__all__ = ["log_as_json", "serve"]

DRAIN_SECONDS = 30
"""How long requests that were accepted may take after SIGTERM."""


def log_as_json() -> None:
    """Log lines of the server and of uvicorn as one JSON object each, on stderr."""
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
    for name in ("dina_lrm.serving", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def serve(app: FastAPI, listener: socket.socket) -> bool:
    """Serve until SIGTERM or SIGINT, then finish what was accepted.

    Args:
        listener: bound to the address; it is closed at the end.

    Returns:
        Whether it had started: False where the warm-up failed; the log says why.

    Raises:
        KeyboardInterrupt: stopped before it was up.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        timeout_keep_alive=75,
        server_header=False,
    )
    logger = logging.getLogger("dina_lrm.serving")
    server = Server(config, listener, lambda address: logger.info("serving at %s", address))
    server.run()
    return server.started
