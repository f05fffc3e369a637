"""Ray Serve's HTTP proxy with the limits on connections that our own servers have.

The proxy is uvicorn with the protocol that it finds by itself: httptools where that is installed, which has
no limit for headers. Ray has no setting for it, but calls a function that the environment names when the
proxy starts (`replicas.PROXY_SETUP`); the one here says which protocol uvicorn is to find.
"""

from typing import Any

from uvicorn import config

from dina_lrm.serving.connections import bounded_protocol, descriptors_allow
from dina_lrm.serving.settings import ServerSettings

__all__ = ["Protocol", "limit_connections"]

Protocol = bounded_protocol(
    header_seconds=ServerSettings.header_seconds,
    max_connections=descriptors_allow(ServerSettings.max_connections),
)


def limit_connections() -> list[Any]:
    """Called in the proxy's process; adds no middleware."""
    protocols: Any = config.HTTP_PROTOCOLS
    protocols["auto"] = f"{__name__}:Protocol"
    return []
