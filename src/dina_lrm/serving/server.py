"""One server process: uvicorn around the app, logs as JSON lines on stderr."""

import logging
import signal
import sys

import uvicorn
from fastapi import FastAPI
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

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


def serve(app: FastAPI, *, host: str, port: int) -> bool:
    """Serve until SIGTERM or SIGINT, then finish what was accepted.

    Args:
        port: 0 for any that is free; the log says which.

    Returns:
        Whether it had started: False where the port is taken or the warm-up failed; the log says why.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        timeout_keep_alive=75,
        server_header=False,
    )
    server = uvicorn.Server(config)
    # uvicorn hands SIGTERM on when it has finished; without a handler that would be the exit code.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        listener = config.bind_socket()
        with listener:
            server.run(sockets=[listener])
    except SystemExit:
        return False
    return server.started
