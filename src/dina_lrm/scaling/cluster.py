"""A Ray cluster for the time of a run: one that is there, or one of this machine's own."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dina_lrm.errors import InvalidInputError

__all__ = ["connected"]

OBJECT_STORE_BYTES = 256 * 2**20
"""Of a cluster of our own: pictures and scores do not travel through it, only parts' names and requests."""


@contextmanager
def connected(address: str | None = None) -> Iterator[Any]:
    """The module `ray`, connected; the connection, and a cluster of our own, end with the block.

    Args:
        address: of a cluster, such as 10.0.0.1:6379, or "auto"; by default $RAY_ADDRESS, and without it a
            cluster is started here. A connection that this process has already is used as it is.

    Raises:
        InvalidInputError: Ray is not installed, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about its own default
    try:
        import ray
    except ImportError as error:
        raise InvalidInputError("ray is not installed: pip install 'dina-lrm[scale]'") from error
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(own if address == "local" else {}),
        )
    except ConnectionError as error:
        raise InvalidInputError(f"no Ray cluster at {address!r}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
