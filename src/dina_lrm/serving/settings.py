"""What a server is told when it starts."""

from dataclasses import dataclass
from typing import Literal

from dina_lrm.errors import InvalidInputError

__all__ = ["ServerSettings"]


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """A reward behind HTTP."""

    model: str = "bundled"
    """The reward: "bundled", a folder, or a hub id."""
    pipeline: str | None = None
    """The generator whose backbone is read: a folder or a hub id. By default the one the checkpoint names."""
    device: str = "cpu"
    """Such as cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the backbone."""
    max_batch_size: int = 8
    """Rows in one pass of the model."""
    max_wait_ms: float = 10.0
    """Longest that a row waits for others to share a pass with, the model being free."""
    max_queue: int = 512
    """Rows that wait at once; what comes on top is refused with 503."""
    max_rows: int = 256
    """Rows of one request; also its pictures."""
    max_body_mib: float = 64.0
    """Bytes of one request."""
    max_megapixels: float = 16.0
    """Of one picture, before it is decoded."""
    max_prompt_length: int = 2000
    """Characters."""
    token: str | None = None
    """Asked for as a bearer token; None lets everybody in."""
    cors_origins: tuple[str, ...] = ()
    """Pages of other origins that may call the server from a browser."""
    page: bool = True
    """Offer the page at /."""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_queue", "max_rows", "max_prompt_length"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("max_body_mib", "max_megapixels"):
            if not getattr(self, name) > 0:
                raise InvalidInputError(f"{name} = {getattr(self, name)}: must be above 0")
        if not self.max_wait_ms >= 0:
            raise InvalidInputError(f"max_wait_ms = {self.max_wait_ms}: must be at least 0")
        if self.token is not None and not self.token.strip():
            raise InvalidInputError("token is empty: give one, or none to let everybody in")
