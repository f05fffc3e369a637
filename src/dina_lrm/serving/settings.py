"""Every setting of the reward server, and the limits on what a request may cost.

A limit is counted in what it protects: rows, bytes, pixels, or tokens, where a token is one image or text
token of one row at one noise level in one draw, which is what the backbone's time follows. `GET /v1/models`
states them all.
"""

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dina_lrm.errors import InvalidInputError

__all__ = [
    "LOOPBACK_NAMES",
    "Adapter",
    "ServerSettings",
    "is_loopback",
    "is_network",
    "is_prefix",
    "settings_from",
]

ENVIRONMENT = "DINA_LRM_"
"""Prefix of the environment variables: DINA_LRM_MAX_ROWS=64."""
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
Adapter = Literal["cosmos-rl", "unirl"]
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """A reward behind HTTP."""

    model: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ID", aliases=["--model-path"])] = ("bundled",)
    """The reward: "bundled", a folder, or a hub id. Several rewards are served as NAME=ID NAME=ID ...; a
    request names the one it wants, and gets the first where it names none."""
    pipeline: Annotated[str | None, tyro.conf.arg(metavar="ID", aliases=["--base-model-path"])] = None
    """The generator whose backbone is read: a folder or a hub id. By default the one the checkpoint names."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps and the like. By default the first GPU, and the CPU where there is none."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the backbone."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in, and then a token is wise."""
    port: int = 8000
    """0 takes any that is free."""
    hosts: tuple[str, ...] = ()
    """Names that clients may call the server by, in their Host header, such as reward.example.org. By default
    any, but localhost alone where the server listens there and asks for no token: a web page could otherwise
    reach it through a name of its own."""
    root_path: str = ""
    """Prefix under which a proxy offers the server, such as /reward."""
    proxies: tuple[str, ...] = ()
    """Addresses or networks of proxies whose X-Forwarded-For, -Proto, -Host and -Prefix are believed."""

    max_batch_size: int = 8
    """Most rows in one pass of the model."""
    max_wait_ms: float = 10.0
    """Longest that a row waits for others to share a pass with, the model being free."""
    max_pass_seconds: float = 1.0
    """About how long one pass may take: longer work is cut, and others get their turn in between."""

    max_queue: int = 512
    """Rows that were taken and are not answered yet; what comes on top is refused: 503 and Retry-After."""
    max_queue_tokens: int = 67_108_864
    """Tokens of work that were taken and are not done yet; what comes on top is refused with 503."""
    max_request_tokens: int = 16_777_216
    """Most tokens of work in one request: rows x draws x noise levels x tokens of a row. More: 413."""
    max_row_tokens: int = 40_960
    """Most image and text tokens of one row, which attention looks at together. More: 413."""
    max_text_tokens: int = 4096
    """Most text tokens of one row. More: 413."""
    max_rows: int = 256
    """Most rows, or pictures, of one request. More: 413."""
    max_megapixels: float = 16.0
    """Largest picture, in megapixels, before it is decoded. More: 422."""
    max_request_megapixels: float = 1024.0
    """Largest size of all pictures of a request together, in megapixels. More: 413."""
    max_prompt_length: int = 2000
    """Longest prompt, in characters. More: 422."""
    max_body_mib: float = 64.0
    """Largest request, in MiB. More: 413."""
    max_inflight_mib: float = 512.0
    """Most MiB of all requests that are being received or worked on. More: 503."""
    max_connections: int = 1024
    """Most open connections; further ones are answered with 503 and closed."""
    header_seconds: float = 15.0
    """How long a connection may take to say what it wants: 408, or closed."""
    body_seconds: float = 15.0
    """In every such time a body that is being sent has to come forward by 256 KiB, or end: 408."""

    token: str | None = None
    """A secret that is asked for as a bearer token; better given in the environment as DINA_LRM_TOKEN, which
    others cannot see. None lets everybody in."""
    tokens: Path | None = None
    """A TOML file of several callers, each with a token or its SHA-256, and how many rows it may have
    waiting: see the guide on serving."""
    cors_origins: tuple[str, ...] = ()
    """Pages of other origins that may call the server from a browser."""
    page: bool = True
    """Offer the page at /."""
    adapters: tuple[Adapter, ...] = ()
    """Routes that other trainers know: cosmos-rl's /api/reward/..., UniRL's /score."""

    def __post_init__(self) -> None:
        names = [name for name, _ in self.models]
        if not names or len(set(names)) < len(names):
            raise InvalidInputError(f"model = {self.model}: one model or more, each with a name of its own")
        for name, value in vars(self).items():
            if name.startswith("max_") and name != "max_wait_ms" and not value > 0:
                least = "at least 1" if isinstance(value, int) else "above 0"
                raise InvalidInputError(f"{name} = {value}: must be {least}")
        for name in ("header_seconds", "body_seconds"):
            if not getattr(self, name) > 0:
                raise InvalidInputError(f"{name} = {getattr(self, name)}: must be above 0")
        if not self.max_wait_ms >= 0:
            raise InvalidInputError(f"max_wait_ms = {self.max_wait_ms}: must be at least 0")
        if self.max_queue_tokens < self.max_request_tokens:
            raise InvalidInputError(
                f"max_queue_tokens = {self.max_queue_tokens}: must be at least max_request_tokens, "
                f"{self.max_request_tokens}, or a request that is allowed would never be taken"
            )
        if not 0 <= self.port <= 65535:
            raise InvalidInputError(f"port = {self.port}: must be in [0, 65535]")
        if self.token is not None and not self.token.strip():
            raise InvalidInputError("token is empty: give one, or none to let everybody in")
        if not is_prefix(self.root_path):
            raise InvalidInputError(
                f"root_path = {self.root_path!r}: it must begin with / and not end with it, such as /reward"
            )
        for proxy in self.proxies:
            if not is_network(proxy):
                raise InvalidInputError(
                    f"proxies: {proxy!r} is neither an address nor a network, such as 10.0.0.0/8"
                )

    @property
    def models(self) -> tuple[tuple[str, str], ...]:
        """Name and location of each reward; one that was given no name goes by its location."""
        found = []
        for one in self.model:
            named = _NAMED.fullmatch(one)
            found.append((named[1], named[2]) if named else (one, one))
        return tuple(found)

    @property
    def asks_for_token(self) -> bool:
        return self.token is not None or self.tokens is not None

    @property
    def known_hosts(self) -> tuple[str, ...] | None:
        """Names by which the server may be called; None: any."""
        if self.hosts:
            return self.hosts
        if is_loopback(self.host) and not self.asks_for_token:
            return (*LOOPBACK_NAMES, self.host)
        return None


def is_prefix(root_path: str) -> bool:
    """Whether a proxy can offer a server under this path: none, or one such as /reward.

    >>> is_prefix(""), is_prefix("/reward"), is_prefix("reward"), is_prefix("/reward/")
    (True, True, False, False)
    """
    return not root_path or (root_path.startswith("/") and not root_path.endswith("/"))


def is_network(name: str) -> bool:
    """Whether a name is an address or a network of them.

    >>> is_network("10.0.0.0/8"), is_network("127.0.0.1"), is_network("nginx")
    (True, True, False)
    """
    try:
        ipaddress.ip_network(name, strict=False)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def settings_from(file: Path | None, environment: Mapping[str, str] = os.environ) -> ServerSettings:
    """Settings of a TOML file, and of environment variables `DINA_LRM_...`, which go before it.

    In a variable several values are separated by commas. The file may not hold the token.

    Raises:
        InvalidInputError: a key that is no setting, or a value of another type.
    """
    found: dict[str, Any] = {}
    if file is not None:
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"settings file {str(file)!r} cannot be read: {error}") from error
        names = [field.name for field in fields(ServerSettings)]
        for name, value in content.items():
            if name not in names:
                raise InvalidInputError(f"{file}: {name!r} is no setting; there are {', '.join(names)}")
            if name == "token":
                raise InvalidInputError(f"{file}: give the token in the environment, as {ENVIRONMENT}TOKEN")
            found[name] = _typed(value, name, str(file))
    for field in fields(ServerSettings):
        variable = ENVIRONMENT + field.name.upper()
        if environment.get(variable):
            found[field.name] = _typed(environment[variable], field.name, variable)
    return replace(ServerSettings(), **found)


def _typed(value: Any, name: str, where: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    hint = ServerSettings.__annotations__[name]
    default = getattr(ServerSettings(), name)
    if isinstance(default, tuple) and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise InvalidInputError(
            f"{where}: {name} = {str(value)[:200]!r}: {error.errors()[0]['msg'].lower()}"
        ) from error
