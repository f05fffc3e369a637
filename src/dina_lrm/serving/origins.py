"""Under which names a server is called, and whether another site made a browser call it."""

from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

__all__ = ["foreign_site", "host_name"]


def host_name(host: str) -> str:
    """The name in a Host header, in lower case; empty where there is none.

    >>> host_name("Localhost:8000"), host_name("[::1]:80")
    ('localhost', '::1')
    """
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def foreign_site(
    headers: Mapping[str, str], host: str, *, origins: Collection[str] = (), hosts: Collection[str] = ()
) -> str | None:
    """The site that made a browser send a request, or None: it is our own page, or no browser sent it.

    Args:
        host: what the client calls the server, as in the Host header.
        origins: of other pages that may call the server, such as https://friend.example.
        hosts: names that the server is known by, whatever a proxy makes of the Host header.

    >>> foreign_site({"origin": "http://127.0.0.1:8000"}, "127.0.0.1:8000") is None
    True
    >>> foreign_site({"origin": "https://evil.example"}, "127.0.0.1:8000")
    'https://evil.example'
    """
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if origin is None:
        return None if site in ("same-origin", "none") else site
    if origin in origins:
        return None
    try:
        netloc = urlsplit(origin).netloc.lower()
    except ValueError:
        return origin
    if netloc and (netloc == host.lower() or host_name(netloc) in hosts):
        return None
    return origin
