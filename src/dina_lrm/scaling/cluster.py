"""A Ray cluster for the time of a run: one that is there, or one of this machine's own."""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dina_lrm.errors import InvalidInputError

__all__ = ["check_device", "connected", "living_machines", "share", "whole_path"]

OBJECT_STORE_BYTES = 256 * 2**20
"""Bytes of the object store of a cluster of our own: pictures and scores do not travel through it, only
names of parts, and requests."""
PROCESSES_WITHOUT_GPU = 2


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
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(own if address == "local" else {}),
        )
    except ConnectionError as error:
        raise InvalidInputError(f"no Ray cluster at {address!r}: {error}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own ends the process with code 15
    try:
        yield ray
    finally:
        ray.shutdown()


def living_machines() -> set[str]:
    """Ids of the machines of the cluster; one whose Ray was killed, agents of it included, is none."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def check_device(device: str) -> None:
    """Ray says which GPU a process has.

    Raises:
        InvalidInputError: a device with a number, or of another kind.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InvalidInputError(f"device = {device!r}: Ray hands out the GPUs, so it is auto, cpu or cuda")


def share(resources: Mapping[str, float], device: str, processes: int | None) -> tuple[int, bool]:
    """How many processes with a model, and whether on GPUs: each has one GPU, or one CPU core.

    Args:
        resources: of the cluster, as `ray.cluster_resources()` gives them.
        device: "cpu", "cuda", or "auto": GPUs where there are any.
        processes: None: one a GPU, or two.

    Raises:
        InvalidInputError: there is no room for so many.

    >>> share({"CPU": 16.0, "GPU": 8.0}, "auto", None)
    (8, True)
    >>> share({"CPU": 16.0}, "auto", 4)
    (4, False)
    """
    cpus, gpus = (int(resources.get(kind, 0)) for kind in ("CPU", "GPU"))
    on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    room, unit = (gpus, "GPUs") if on_gpu else (cpus, "CPU cores")
    count = processes or (gpus if on_gpu else min(PROCESSES_WITHOUT_GPU, cpus))
    if not 1 <= count <= room:
        raise InvalidInputError(f"{count} processes for {room} {unit}: each needs one")
    return count, on_gpu


def whole_path(name: str) -> str:
    """What `name` is called where the working directory is another; only names of files here change."""
    return os.path.abspath(name) if os.path.exists(name) else name
