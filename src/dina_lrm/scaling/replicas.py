"""The HTTP server in several processes, behind one port: Ray Serve around the app of `serving`.

Each replica builds the same app with a model of its own. Ray Serve spreads requests over them, asks each for
its health, and replaces one that is dead or stalled; a request that was in it is answered with 500, which
clients of the protocol try again. What a replica counts, its /metrics tell: a scrape meets one of them. The
page needs all requests of a visitor in one process, so replicas have none.
"""

import logging
import signal
import socket
import sys
import threading
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


def serve_replicas(
    settings: "ServerSettings",
    *,
    replicas: int,
    host: str = "127.0.0.1",
    port: int = 8000,
    ray_address: str | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted.

    Args:
        settings: of every replica. The queue is one replica's; the page is left out.
        replicas: processes, each with one GPU, or one CPU core.
        port: 0 for any that is free.
        ray_address: of a cluster to run on, which then listens on each of its nodes; by default $RAY_ADDRESS,
            and without it a cluster of this machine.

    Raises:
        CheckpointError: there is no such model.
        InvalidInputError: no room for so many replicas, or the port is taken.
        ChildProcessError: the replicas do not start.
    """
    from dina_lrm.models.checkpoint import read_checkpoint

    check_device(settings.device)
    read_checkpoint(settings.model)
    settings = replace(
        settings,
        model=whole_path(settings.model),
        pipeline=None if settings.pipeline is None else whole_path(settings.pipeline),
        page=False,
    )
    with connected(ray_address) as ray:
        from ray import serve

        count, on_gpu = share(ray.cluster_resources(), settings.device, replicas)
        port = _free_port(host, port)
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
        from dina_lrm.serving.server import log_as_json

        log_as_json()  # into Ray's log files, for the process's stderr
        return create_app(settings)

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
            if not self.app.state.service.healthy:  # type: ignore[attr-defined]
                raise RuntimeError("the model is stalled")

    return Replica.bind()  # type: ignore[attr-defined]


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
