"""`dina-lrm serve`: the reward over HTTP, for trainers, programs and people."""

import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dina_lrm.cli.console import UsageError
from dina_lrm.cli.options import find_device, need_packages, parse, refuse
from dina_lrm.remote import TOKEN_VARIABLE
from dina_lrm.serving.settings import (
    CONFIG_VARIABLE,
    ServerSettings,
    is_loopback,
    settings_from,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("dina_lrm.serving")


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a reward over HTTP: latents of trainers, pictures of programs, and a page for people.

    POST /v1/score, /v1/score/images, /v1/compare; GET /, /docs, /v1/models, /healthz, /readyz, /metrics.
    Every setting can also be given in the environment, as DINA_LRM_MAX_ROWS=64, or in a file.
    """

    settings: Annotated[ServerSettings, tyro.conf.arg(name="")] = field(default_factory=ServerSettings)
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A TOML file of settings, by the names of these options with _ for -. The environment goes before the
    file, and what is typed before both. Without it $DINA_LRM_CONFIG may name one."""
    replicas: int = 1
    """Processes behind one port, through Ray Serve (extra `scale`)."""
    ray_address: str | None = None
    """Address of a Ray cluster to run on; by default one is started on this machine."""


def main(arguments: Sequence[str]) -> int:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to load anew
    options = read(arguments)
    if options.replicas < 1:
        raise UsageError(f"--replicas is at least 1; got {options.replicas}")
    need_packages("serve", "fastapi_offline", "prometheus_client", "pythonjsonlogger", "uvicorn")
    from dina_lrm.serving.server import log_as_json

    log_as_json()
    settings = options.settings
    if options.replicas > 1 or options.ray_address is not None:
        refuse(arguments, ["--page"], "needs a single server without --replicas and --ray-address")
        from dina_lrm.scaling.replicas import serve_replicas

        warn_if_open(settings)
        signal.signal(signal.SIGHUP, before)  # replicas load nothing anew
        serve_replicas(settings, replicas=options.replicas, ray_address=options.ray_address)
        return 0
    from dina_lrm.serving.app import create_app
    from dina_lrm.serving.running import bound
    from dina_lrm.serving.server import serve

    def make() -> "FastAPI":
        """The app, from settings as they are now: once at the start, and again at every SIGHUP."""
        now = read(arguments).settings
        warn_if_open(now)
        log.info("loading %s on %s", ", ".join(location for _, location in now.models), now.device)
        return create_app(now)

    with bound(settings.host, settings.port) as listener:  # a taken port is told before a model is loaded
        return 0 if serve(make, settings, listener) else 1


def warn_if_open(settings: ServerSettings) -> None:
    if not settings.asks_for_token and not is_loopback(settings.host):
        log.warning("everybody who reaches %s can use this server; set %s", settings.host, TOKEN_VARIABLE)


def read(arguments: Sequence[str]) -> Serve:
    """The options that are typed, and the settings of file and environment where nothing is."""
    config = parse(Serve, "serve", arguments).config
    if config is None and os.environ.get(CONFIG_VARIABLE):
        config = Path(os.environ[CONFIG_VARIABLE])
    found = settings_from(config)
    # The token is no default of an option: --help would print it.
    options = parse(Serve, "serve", arguments, Serve(settings=replace(found, token=None)))
    settings = options.settings
    return replace(
        options,
        settings=replace(
            settings,
            token=found.token if settings.token is None else settings.token,
            device=str(find_device(settings.device)),
        ),
    )
