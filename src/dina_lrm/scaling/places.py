"""Where rows and pictures lie: the local disk, an object store, the web."""

import posixpath
from functools import cache
from pathlib import Path

import fsspec
import httpx
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem
from httpx_retries import Retry, RetryTransport

from dina_lrm.errors import InvalidInputError, ScoringError
from dina_lrm.files import content_digest, file_fault, not_a_file
from dina_lrm.images import picture_file

__all__ = [
    "NOT_TOLD",
    "filesystem",
    "find_files",
    "is_local",
    "mark_of",
    "open_file",
    "stored_mark",
    "suffix_of",
]

HTTP_SECONDS = 30.0
HTTP_RETRIES = 3
"""Tries of a picture on the web after the first, when the server is busy or does not answer."""
BUSY = (408, 425, 429)
"""Client errors that are about the moment and not about the address."""
GONE = (404, 410)
NO_HEAD = (405, 501)
"""Answers of a server that gives files, and does not tell about them."""
NOT_TOLD = ""
"""Mark of a file whose store says nothing by which a change could be seen."""
TOLD = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "mtime", "updated", "created")
"""What stores call a file's version or the time it was written, in fsspec's `info`; the first one counts."""


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL, and the path on it; without a scheme a path is local.

    s3:// is pyarrow's (credentials, region and AWS_ENDPOINT_URL from the environment, or as a query:
    s3://bucket/folder?region=...); every other scheme is fsspec's.

    Raises:
        InvalidInputError: no such scheme, or its library is not installed.
    """
    try:
        if url.startswith("s3://"):
            s3, path = pyarrow.fs.FileSystem.from_uri(url)
            return ArrowFSWrapper(s3), path
        fs, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InvalidInputError(f"cannot read from {url!r}: {error}") from error
    return fs, str(path)


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def suffix_of(path: str) -> str:
    """How a file's name ends, in lower case; with what stands before .gz.

    >>> suffix_of("a/rows.jsonl.GZ"), suffix_of("v1.0/rows")
    ('.jsonl.gz', '')
    """
    stem, suffix = posixpath.splitext(path)
    suffix = suffix.lower()
    return posixpath.splitext(stem)[1].lower() + suffix if suffix == ".gz" else suffix


# --- pictures ----------------------------------------------------------------------------------------------


def open_file(name: str, fs: fsspec.AbstractFileSystem, folder: str) -> tuple[Path | bytes, str | None]:
    """A picture's file from what a row calls it: a URL, an absolute path, or a path beside the row's file.
    And its mark, taken before it is read: if it is replaced meanwhile, `mark_of` finds another one later.

    Raises:
        InvalidInputError: there is none, or the server refuses to give it.
        ScoringError: a server cannot be reached, or fails: no fault of the row. An OSError of an object
            store says the same.
    """
    if name.startswith(("http://", "https://")):
        reply = _fetch(name)
        return reply.content, _web_mark(reply)
    fs, path = _place(name, fs, folder)
    mark = stored_mark(fs, path)
    if is_local(fs):
        return picture_file(path), mark
    try:
        with fs.open(path, "rb") as file:
            return file.read(), mark  # pyright: ignore[reportReturnType]
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InvalidInputError(f"missing file: {name}") from error


def mark_of(name: str, fs: fsspec.AbstractFileSystem, folder: str) -> str | None:
    """What changes when a picture does: the digest of a local file, and what a store or a web server tells of
    its version, or of size and time. None: there is none; `NOT_TOLD`: they tell nothing.

    Raises:
        ScoringError: a server cannot be reached, or fails. An OSError of an object store says the same.
    """
    if not name.startswith(("http://", "https://")):
        try:
            return stored_mark(*_place(name, fs, folder))
        except InvalidInputError:
            return None
    try:
        reply = _ask("HEAD", name)
    except InvalidInputError:
        return None
    if reply.status_code in GONE:
        return None
    if reply.is_error and reply.status_code not in NO_HEAD:
        _check_reply(reply, name)
    return NOT_TOLD if reply.is_error else _web_mark(reply)


def stored_mark(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
    """As `mark_of`, of a file of a filesystem."""
    if is_local(fs):
        return content_digest(Path(path))
    try:
        info = fs.info(path)
    except (FileNotFoundError, IsADirectoryError):
        return None
    if info.get("type", "file") != "file":
        return None
    return _mark(info.get("size"), next((info[key] for key in TOLD if info.get(key)), None))


def _place(name: str, fs: fsspec.AbstractFileSystem, folder: str) -> tuple[fsspec.AbstractFileSystem, str]:
    return filesystem(name) if "://" in name else (fs, posixpath.join(folder, name))


def _mark(size: object, version: object) -> str:
    return NOT_TOLD if version is None else f"{size} bytes, {version}"


def _web_mark(reply: httpx.Response) -> str:
    told = reply.headers
    return _mark(told.get("content-length"), told.get("etag", told.get("last-modified")))


@cache
def _web() -> httpx.Client:
    retry = Retry(total=HTTP_RETRIES, backoff_factor=0.5, status_forcelist=[*BUSY, 500, 502, 503, 504])
    return httpx.Client(
        transport=RetryTransport(retry=retry), follow_redirects=True, timeout=httpx.Timeout(HTTP_SECONDS)
    )


def _fetch(url: str) -> httpx.Response:
    reply = _ask("GET", url)
    _check_reply(reply, url)
    if reply.is_error:
        raise InvalidInputError(f"missing file: {url} (the server answers {reply.status_code})")
    return reply


def _ask(method: str, url: str) -> httpx.Response:
    try:
        return _web().request(method, url)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
        raise InvalidInputError(f"cannot fetch {url}: {error}") from error
    except httpx.HTTPError as error:
        raise ScoringError(f"cannot fetch {url}: {error or type(error).__name__}") from error


def _check_reply(reply: httpx.Response, url: str) -> None:
    """An answer that is about the moment, and not about the address."""
    if reply.status_code >= 500 or reply.status_code in BUSY:
        raise ScoringError(f"cannot fetch {url}: the server answers {reply.status_code}")


# --- rows --------------------------------------------------------------------------------------------------


def find_files(url: str, suffixes: tuple[str, ...]) -> tuple[fsspec.AbstractFileSystem, str, list[str]]:
    """The files of an input, in order, and how they all end.

    Args:
        url: a file, a folder, or a pattern; a path or a URL.

    Raises:
        InvalidInputError: none, or files that end differently.
    """
    fs, path = filesystem(url)
    allowed = ", ".join(suffixes)
    fault = file_fault(Path(path)) if is_local(fs) else None
    if fault not in (None, "is missing", "is a folder"):
        raise InvalidInputError(f"{url!r} {fault}, not a file")
    if fs.isdir(path):
        listed = (str(name) for name in fs.ls(path, detail=False))
        found = sorted(name for name in listed if suffix_of(name) in suffixes)
    elif fs.isfile(path):
        found = [path]
    else:
        found = sorted(str(name) for name in fs.glob(path)) if any(c in path for c in "*?[") else []
    if not found:
        raise InvalidInputError(_none_found(url, fs, path, allowed))
    endings = {suffix_of(name) for name in found}
    shown = ", ".join(sorted(ending or "no suffix" for ending in endings))
    if not endings <= set(suffixes):
        raise InvalidInputError(f"{url!r} has {shown}: rows are {allowed}")
    if len(endings) > 1:
        raise InvalidInputError(f"{url!r} has {shown}: give files of one kind, as with the pattern '*.jsonl'")
    return fs, endings.pop(), found


def _none_found(url: str, fs: fsspec.AbstractFileSystem, path: str, allowed: str) -> str:
    if fs.isdir(path):
        return f"the folder {url!r} has no {allowed}"
    return not_a_file(Path(path)) if is_local(fs) else f"no file or folder {url!r}"
