"""The W3C trace context: a `traceparent` is taken, and the server's own step in the trace is given back."""

import random
import re
from dataclasses import dataclass

__all__ = ["Trace", "trace_of"]

_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True)
class Trace:
    """Where a request stands in its trace."""

    trace_id: str
    parent_id: str | None
    span_id: str
    """Span of this server's work on it."""
    flags: str

    @property
    def header(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


def trace_of(header: str) -> Trace:
    """The trace that a `traceparent` header names, or a new one where it names none.

    >>> trace_of("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").parent_id
    'b7ad6b7169203331'
    """
    found = _PARENT.fullmatch(header.strip())
    if found is None:
        return Trace(_new_id(128), None, _new_id(64), "00")
    return Trace(found[1], found[2], _new_id(64), found[3])


def _new_id(bits: int) -> str:
    """In hex. It is no secret, so the system is not asked for randomness."""
    return f"{random.getrandbits(bits):0{bits // 4}x}"
