"""What proxies say about the client they speak for; only proxies that were named are believed."""

import ipaddress
import re
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from dina_lrm.serving.settings import PREFIX

__all__ = ["ForwardedHeaders"]

_HOST = re.compile(r"[A-Za-z0-9.:\[\]-]{1,255}")


class ForwardedHeaders:
    """ASGI middleware: X-Forwarded-For and -Proto (uvicorn's own reading), and -Host and -Prefix beside them.

    Args:
        proxies: addresses or networks; headers that come from elsewhere change nothing.
    """

    def __init__(self, app: ASGIApp, proxies: Sequence[str]) -> None:
        self.app = app
        self._networks = [ipaddress.ip_network(proxy, strict=False) for proxy in proxies]
        self._client = ProxyHeadersMiddleware(app, trusted_hosts=list(proxies))  # type: ignore[arg-type]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._trusts(scope.get("client")):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        # Of several proxies each may have added its own: the first is what the client said.
        host = headers.get("x-forwarded-host", "").partition(",")[0].strip()
        prefix = headers.get("x-forwarded-prefix", "").partition(",")[0].strip().rstrip("/")
        if _HOST.fullmatch(host):
            MutableHeaders(scope=scope)["host"] = host
        if PREFIX.fullmatch(prefix) and not scope.get("root_path"):
            scope["root_path"] = prefix
        await self._client(scope, receive, send)  # type: ignore[arg-type]

    def _trusts(self, client: tuple[str, int] | None) -> bool:
        try:
            address = ipaddress.ip_address(client[0]) if client else None
        except ValueError:
            return False
        return address is not None and any(address in network for network in self._networks)
