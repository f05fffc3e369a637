"""The HTTP server in several processes, behind one port: Ray Serve around the app of `serving`.

Each replica builds the same app with a model of its own. Ray Serve spreads requests over them, asks each for
its health, and replaces one that is dead or stalled; a request that was in it is answered with 500, which
clients of the protocol try again. A scrape of /metrics meets one replica, which tells what all of them count,
each under its name. The page needs all requests of a visitor in one process, so replicas have none.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dina_lrm.errors import InvalidInputError
from dina_lrm.scaling.cluster import check_device, connected, share, whole_path

if TYPE_CHECKING:
    from dina_lrm.serving.settings import ServerSettings

__all__ = ["serve_replicas"]

APPLICATION = "dina-lrm"
DEPLOYMENT = "reward"
HEALTH_PERIOD_SECONDS = 5.0
HEALTH_TIMEOUT_SECONDS = 30.0
DRAIN_SECONDS = 30.0
"""How long requests that were accepted may take after SIGTERM."""
BOARD = "dina-lrm-metrics"
"""Name of the actor where replicas leave what they count."""
FORGOTTEN_SECONDS = 30.0
"""A replica that has not counted for so long is gone."""
PROXY_SETUP = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Environment variable by which Ray Serve's proxy is told what to call when it starts."""


def serve_replicas(
    settings: "ServerSettings",
    *,
    replicas: int,
    ray_address: str | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted.

    Args:
        settings: of every replica. The queue is one replica's; the page is left out.
        replicas: processes, each with one GPU, or one CPU core.
        ray_address: of a cluster to run on, which then listens on each of its nodes; by default $RAY_ADDRESS,
            and without it a cluster of this machine.

    Raises:
        CheckpointError: there is no such model.
        InvalidInputError: no room for so many replicas, or the port is taken.
        ChildProcessError: the replicas do not start.
    """
    from dina_lrm.checkpoints.dina import read_checkpoint

    check_device(settings.device)
    for _, location in settings.models:
        read_checkpoint(location)
    host = settings.host
    settings = replace(
        settings,
        model=tuple(
            whole_path(location) if name == location else f"{name}={whole_path(location)}"
            for name, location in settings.models
        ),
        pipeline=None if settings.pipeline is None else whole_path(settings.pipeline),
        tokens=None if settings.tokens is None else settings.tokens.resolve(),
        page=False,
    )
    os.environ.setdefault(PROXY_SETUP, "dina_lrm.scaling.proxy:limit_connections")
    with connected(ray_address) as ray:
        from ray import serve

        count, on_gpu = share(ray.cluster_resources(), settings.device, replicas)
        port = _free_port(host, settings.port)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            serve.start(
                http_options={"host": host, "port": port}, logging_config={"enable_access_log": False}
            )
        except ray.exceptions.RayError as error:
            raise ChildProcessError(f"Ray Serve does not start: {error}") from error
        stop = threading.Event()
        try:
            serve.run(_application(settings, count, on_gpu), name=APPLICATION)
            for number in (signal.SIGTERM, signal.SIGINT):  # until now they end the command
                signal.signal(number, lambda *_: stop.set())
            where = f"http://{host}:{port}"
            print(f"{where}  ({count} replicas; API /docs, health /healthz)", file=sys.stderr, flush=True)
            while not stop.wait(1.0):
                pass
        except RuntimeError as error:
            raise ChildProcessError(f"the replicas do not start: {_reason() or error}") from error
        finally:
            serve.delete(APPLICATION)  # waits for what was accepted; other applications of a cluster stay


def _application(settings: "ServerSettings", replicas: int, on_gpu: bool) -> Any:
    """What Ray Serve runs."""
    from ray import serve

    def build() -> Any:
        from dina_lrm.serving.app import create_app
        from dina_lrm.serving.metrics import joined
        from dina_lrm.serving.server import log_as_json

        async def of_all(text: bytes) -> bytes:
            return joined(await _board().exchange.remote(_replica(), text))

        log_as_json()  # into Ray's log files, for the process's stderr
        # Ray Serve's proxy takes and gives the request id by itself.
        return create_app(settings, names_requests=False, metrics_text=of_all)

    @serve.deployment(
        name=DEPLOYMENT,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if on_gpu else 0},
        # The app itself refuses what is more than its queue holds, and says when to come again.
        max_ongoing_requests=2 * settings.max_queue,
        max_queued_requests=replicas * settings.max_queue,
        health_check_period_s=HEALTH_PERIOD_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT_SECONDS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
    )
    @serve.ingress(build)
    class Replica:
        def check_health(self) -> None:
            service = self.app.state.service  # type: ignore[attr-defined]
            _board().exchange.remote(_replica(), service.metrics.text())
            if not service.healthy:
                raise RuntimeError("the model is stalled")

    return Replica.bind()  # type: ignore[attr-defined]


class Board:
    """What every replica counted last, for whichever of them is asked."""

    def __init__(self) -> None:
        self._texts: dict[str, tuple[float, bytes]] = {}

    def exchange(self, replica: str, text: bytes) -> dict[str, bytes]:
        """Leave a replica's counts, and see those of all."""
        now = time.monotonic()
        self._texts[replica] = (now, text)
        self._texts = {name: kept for name, kept in self._texts.items() if now - kept[0] < FORGOTTEN_SECONDS}
        return {name: kept for name, (_, kept) in sorted(self._texts.items())}


def _board() -> Any:
    """The actor; whoever asks first makes it."""
    import ray

    return (
        ray.remote(Board)
        .options(name=BOARD, get_if_exists=True, num_cpus=0, namespace=BOARD, lifetime="detached")
        .remote()
    )


def _replica() -> str:
    from ray import serve

    return serve.get_replica_context().replica_id.unique_id


def _reason() -> str:
    """What the last replica died of: the end of the traceback that Ray Serve keeps."""
    from ray import serve

    found = serve.status().applications.get(APPLICATION)
    deployment = None if found is None else found.deployments.get(DEPLOYMENT)
    return "" if deployment is None else deployment.message.strip().rpartition("\n")[2]


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0."""
    try:
        with socket.create_server((host, port)) as listener:
            return listener.getsockname()[1]
    except OSError as error:
        raise InvalidInputError(f"cannot listen on {host}:{port}: {error.strerror}") from error
