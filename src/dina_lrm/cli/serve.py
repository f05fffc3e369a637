"""`dina-lrm serve`: the reward over HTTP, for trainers, programs and people."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from dina_lrm.cli.console import UsageError, log
from dina_lrm.cli.options import TOKEN_VARIABLE, find_device, is_loopback, need_packages, parse, refuse


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a reward over HTTP: latents of trainers, pictures of programs, and a page for people.

    POST /v1/score, /v1/score/images, /v1/compare; GET /, /docs, /healthz, /readyz, /metrics.
    """

    model: Annotated[str, tyro.conf.arg(metavar="ID", aliases=["--model-path"])] = "bundled"
    """The reward: "bundled", a folder, or a hub id."""
    pipeline: Annotated[str | None, tyro.conf.arg(metavar="ID", aliases=["--base-model-path"])] = None
    """The generator whose backbone is read: a folder or a hub id. By default the one the checkpoint names."""
    device: str = "auto"
    """Such as cpu, cuda, cuda:1, mps. By default the first GPU, and the CPU where there is none."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the backbone."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in, and then a token is wise."""
    port: int = 8000
    """0 takes any that is free."""
    max_batch_size: int = 8
    """Most rows in one pass of the model."""
    max_wait_ms: float = 10.0
    """Longest that a row waits for others to share a pass with."""
    max_queue: int = 512
    """Rows that wait at once; what comes on top is refused with 503 and Retry-After."""
    max_rows: int = 256
    """Most rows, or pictures, of one request."""
    max_body_mib: float = 64.0
    """Largest request, in MiB."""
    max_megapixels: float = 16.0
    """Largest picture, in megapixels."""
    max_prompt_length: int = 2000
    """Longest prompt, in characters."""
    token: str | None = None
    """A secret that is asked for as a bearer token; better given in the environment as DINA_LRM_TOKEN, which
    others cannot see. None lets everybody in."""
    cors_origins: tuple[str, ...] = ()
    """Pages of other origins that may call the server from a browser."""
    page: bool = True
    """Offer the page at /."""
    replicas: int = 1
    """Processes behind one port, through Ray Serve (extra `scale`)."""
    ray_address: str | None = None
    """Address of a Ray cluster to run on; by default one is started on this machine."""


def main(arguments: Sequence[str]) -> int:
    options = parse(Serve, "serve", arguments)
    if options.replicas < 1:
        raise UsageError(f"--replicas is at least 1; got {options.replicas}")
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port is in [0, 65535]; got {options.port}")
    need_packages("serve", "fastapi_offline", "prometheus_client", "pythonjsonlogger", "uvicorn")
    from dina_lrm.serving.settings import ServerSettings

    token = options.token or os.environ.get(TOKEN_VARIABLE) or None
    settings = ServerSettings(
        model=options.model,
        pipeline=options.pipeline,
        device=str(find_device(options.device)),
        dtype=options.dtype,
        max_batch_size=options.max_batch_size,
        max_wait_ms=options.max_wait_ms,
        max_queue=options.max_queue,
        max_rows=options.max_rows,
        max_body_mib=options.max_body_mib,
        max_megapixels=options.max_megapixels,
        max_prompt_length=options.max_prompt_length,
        token=token,
        cors_origins=options.cors_origins,
        page=options.page,
    )
    if token is None and not is_loopback(options.host):
        log(f"warning: everybody who reaches {options.host} can use this server; set {TOKEN_VARIABLE}")
    if options.replicas > 1 or options.ray_address is not None:
        refuse(arguments, ["--page"], "needs a single server without --replicas and --ray-address")
        from dina_lrm.scaling.replicas import serve_replicas

        serve_replicas(
            settings,
            replicas=options.replicas,
            host=options.host,
            port=options.port,
            ray_address=options.ray_address,
        )
        return 0
    from dina_lrm.serving.app import create_app
    from dina_lrm.serving.running import bound
    from dina_lrm.serving.server import log_as_json, serve

    with bound(options.host, options.port) as listener:  # a taken port is told before a model is loaded
        log_as_json()
        log(f"loading {settings.model} on {settings.device}")
        return 0 if serve(create_app(settings), listener) else 1
