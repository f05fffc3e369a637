"""Several callers with tokens of their own, from a TOML file:

    [alice]
    token = "..."         # or token_sha256 = "64 hexadecimal digits", so that the file holds no secret
    max_queue = 64        # rows that were taken for her and are not answered yet; without it, any

Names go into the log and the metrics; tokens are compared by their SHA-256, in constant time.
"""

import hashlib
import hmac
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from dina_lrm.errors import InvalidInputError

__all__ = ["Caller", "CallerFull", "Callers", "read_callers"]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_KEYS = ("token", "token_sha256", "max_queue")


class CallerFull(Exception):
    """A caller has as many rows waiting as it may."""


@dataclass
class Caller:
    """Who may use the server."""

    name: str
    digest: bytes
    """SHA-256 of the token."""
    max_queue: int | None = None
    rows: int = field(default=0, init=False)
    """That were taken and are not answered yet."""

    def check_room(self, rows: int) -> None:
        """CallerFull unless so many rows may be taken beside the others."""
        if self.max_queue is not None and self.rows + rows > self.max_queue:
            raise CallerFull(f"{self.name}: {self.rows} rows are waiting, at most {self.max_queue} may")


class Callers:
    """All of them; none at all lets everybody in, as nobody in particular."""

    def __init__(self, callers: list[Caller]) -> None:
        self.all = callers

    def find(self, token: bytes) -> Caller | None:
        """Whose token it is; all are compared, so that time tells nothing."""
        given = hashlib.sha256(token).digest()
        found = [one for one in self.all if hmac.compare_digest(one.digest, given)]
        return found[0] if found else None


def read_callers(token: str | None, file: Path | None) -> Callers:
    """The one of `--token`, who has no name, and those of a file.

    Raises:
        InvalidInputError: the file cannot be read, or says something else than the head of this module.
    """
    found = [] if token is None else [Caller("", hashlib.sha256(token.encode()).digest())]
    if file is None:
        return Callers(found)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"tokens: {str(file)!r} cannot be read: {error}") from error
    if not content:
        raise InvalidInputError(f"tokens: {str(file)!r} holds no caller")
    for name, entry in content.items():
        where = f"tokens: {file}: [{name}]"
        if not isinstance(entry, dict) or set(entry) - set(_KEYS):
            raise InvalidInputError(f"{where} may hold {', '.join(_KEYS)} only")
        secret, digest, most = (entry.get(key) for key in _KEYS)
        if (secret is None) == (digest is None):
            raise InvalidInputError(f"{where} needs token or token_sha256, and not both")
        if secret is not None and (not isinstance(secret, str) or not secret.strip()):
            raise InvalidInputError(f"{where}: the token is a text, and not empty")
        if digest is not None and (not isinstance(digest, str) or not _DIGEST.fullmatch(digest)):
            raise InvalidInputError(f"{where}: token_sha256 has 64 hexadecimal digits in lower case")
        if most is not None and (type(most) is not int or most < 1):
            raise InvalidInputError(f"{where}: max_queue = {most!r} must be at least 1")
        raw = bytes.fromhex(digest) if digest is not None else hashlib.sha256(str(secret).encode()).digest()
        if any(hmac.compare_digest(one.digest, raw) for one in found):
            raise InvalidInputError(f"{where} has the token of another caller")
        found.append(Caller(name, raw, most))
    return Callers(found)
