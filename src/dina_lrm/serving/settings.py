"""Every setting of the reward server, and the limits on what a request may cost.

A limit is counted in what it protects: rows, bytes, pixels, or tokens, where a token is one image or text
token of one row at one noise level in one draw, which is what the backbone's time follows. `GET /v1/models`
states them all.
"""

import difflib
import ipaddress
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dina_lrm.errors import InvalidInputError
from dina_lrm.remote import TOKEN_VARIABLE

__all__ = [
    "CONFIG_VARIABLE",
    "LOOPBACK_NAMES",
    "PREFIX",
    "Adapter",
    "ServerSettings",
    "check_address",
    "is_loopback",
    "settings_from",
    "token_in",
]

ENVIRONMENT = "DINA_LRM_"
"""Prefix of the environment variables: DINA_LRM_MAX_ROWS=64."""
CONFIG_VARIABLE = ENVIRONMENT + "CONFIG"
"""Names the file of settings."""
_OTHER_VARIABLES = (CONFIG_VARIABLE, ENVIRONMENT + "TRACEBACK", ENVIRONMENT + "GOLDEN")
"""Variables of ours that are no settings of the server; the command line and the tests read the last two."""
_OF_KUBERNETES = re.compile(r"DINA_LRM_(SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP)\w*)")
"""It sets these, and DINA_LRM_PORT=tcp://..., in every container beside a service that is called dina-lrm."""
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
"""Under which a proxy can offer a server."""
Adapter = Literal["cosmos-rl", "unirl"]
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)")
_HOST = re.compile(r"[A-Za-z0-9._-]+")
_ORIGIN = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(:\d+)?")


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
    compile: bool = False
    """Compile blocks and head: the first requests wait for it, the next ones are faster."""

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
        for one in self.model:
            name, equals, location = one.partition("=")
            if equals and not _NAMED.fullmatch(one) and not Path(one).exists():
                raise InvalidInputError(
                    f"model: {name!r} cannot name {location!r}: a name has letters, digits, '.', '_' and "
                    f"'-', and begins with a letter or a digit"
                )
        names = [name for name, _ in self.models]
        if not names or len(set(names)) < len(names):
            raise InvalidInputError(f"model = {self.model}: one model or more, each with a name of its own")
        for name, value in vars(self).items():
            if not name.startswith(("max_", "header_", "body_")):
                continue
            whole, zero = isinstance(getattr(type(self), name), int), name == "max_wait_ms"
            least = "at least 0" if zero else "at least 1" if whole else "above 0"
            kind = "a whole number" if whole else "a finite number"
            right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not right or not math.isfinite(value) or not (value >= 0 if zero else value > 0):
                raise InvalidInputError(f"{name} = {value}: must be {kind}, {least}")
        if self.max_queue_tokens < self.max_request_tokens:
            raise InvalidInputError(
                f"max_queue_tokens = {self.max_queue_tokens}: must be at least max_request_tokens, "
                f"{self.max_request_tokens}, or a request that is allowed would never be taken"
            )
        if self.token is not None and not self.token.strip():
            raise InvalidInputError("token is empty: give one, or none to let everybody in")
        check_address(
            host=self.host, port=self.port, hosts=self.hosts, root_path=self.root_path, proxies=self.proxies
        )
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise InvalidInputError(
                    f"cors_origins: {origin!r} is no origin, such as https://friend.example:8443"
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


def check_address(
    *, host: str, port: int, hosts: Sequence[str], root_path: str, proxies: Sequence[str]
) -> None:
    """Refuse what a server cannot listen at, be called, or believe.

    Raises:
        InvalidInputError: it names the setting.
    """
    if not host.strip():  # which the system takes for all addresses
        raise InvalidInputError("host is empty: give an address, such as 127.0.0.1, or 0.0.0.0 for all")
    if not 0 <= port <= 65535:
        raise InvalidInputError(f"port = {port}: must be in [0, 65535]")
    for host in hosts:
        if not _HOST.fullmatch(host) and (not _is_network(host) or "/" in host):
            raise InvalidInputError(
                f"hosts: {host!r} is no name of a host, such as reward.example.org, without a port"
            )
    if root_path and (not PREFIX.fullmatch(root_path) or {".", ".."} & set(root_path.split("/"))):
        raise InvalidInputError(
            f"root_path = {root_path!r}: it begins with / and does not end with it, such as /reward, and has "
            f"letters, digits, '.', '_', '~' and '-' in between"
        )
    for proxy in proxies:
        if not _is_network(proxy):
            raise InvalidInputError(
                f"proxies: {proxy!r} is neither an address nor a network, such as 10.0.0.0/8, with no "
                f"bits set after the prefix"
            )


def _is_network(name: str) -> bool:
    """Whether a name is an address or a network of them."""
    try:
        ipaddress.ip_network(name)
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


def token_in(environment: Mapping[str, str]) -> str | None:
    """The token that an environment holds; None where the variable is not set.

    Raises:
        InvalidInputError: it is empty, which must not be taken for none: everybody would be let in.
    """
    token = environment.get(TOKEN_VARIABLE)
    if token is not None and not token.strip():
        raise InvalidInputError(f"{TOKEN_VARIABLE} is empty: give a token, or unset it to let everybody in")
    return token


def settings_from(file: Path | None, environment: Mapping[str, str] = os.environ) -> ServerSettings:
    """Settings of a TOML file, and of environment variables `DINA_LRM_...`, which go before it.

    In a variable several values are separated by commas; one that is empty says nothing. The file may not
    hold the token.

    Raises:
        InvalidInputError: a name that is no setting, a value of another type, or an empty token.
    """
    found: dict[str, Any] = {}
    names = [field.name for field in fields(ServerSettings)]
    if file is not None:
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"settings file {str(file)!r} cannot be read: {error}") from error
        for name, value in content.items():
            if name not in names:
                raise InvalidInputError(f"{file}: {name!r} is no setting{_instead(name, names)}")
            if name == "token":
                raise InvalidInputError(f"{file}: give the token in the environment, as {TOKEN_VARIABLE}")
            found[name] = _typed(value, name, str(file))
    token_in(environment)
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT) or variable in _OTHER_VARIABLES:
            continue
        name = variable.removeprefix(ENVIRONMENT).lower()
        of_kubernetes = name == "port" and text.startswith(("tcp://", "udp://"))
        if of_kubernetes or _OF_KUBERNETES.fullmatch(variable):
            continue
        if name not in names or not variable.isupper():
            known = [ENVIRONMENT + one.upper() for one in names]
            raise InvalidInputError(f"{variable} is no setting{_instead(variable.upper(), known)}")
        if text:
            found[name] = _typed(text, name, variable)
    return replace(ServerSettings(), **found)


def _instead(name: str, names: Sequence[str]) -> str:
    """What may have been meant."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; {near[0]} is one" if near else f"; there are {', '.join(names)}"


def _typed(value: Any, name: str, where: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    hint = ServerSettings.__annotations__[name]
    default = getattr(ServerSettings(), name)
    if isinstance(default, tuple) and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        if isinstance(value, bool) and not isinstance(default, bool):  # or true would count as 1
            raise ValueError("true and false are for page alone")
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise InvalidInputError(
            f"{where}: {name} = {str(value)[:200]!r}: {error.errors()[0]['msg'].lower()}"
        ) from error
    except ValueError as error:
        raise InvalidInputError(f"{where}: {name} = {str(value).lower()}: {error}") from error
