"""HTTP with retries: what is tried again, and how long is waited."""

import urllib.request
from collections.abc import Callable
from typing import Any

import httpx
from httpx_retries import Retry, RetryTransport

__all__ = ["BACKOFF_SECONDS", "RETRIED", "is_address", "proxy_of", "retry_policy", "retrying_transport"]

BACKOFF_SECONDS = 1.0
"""Longest first wait; twice as long each time."""
LONGEST_WAIT_SECONDS = 60.0
"""`Retry-After` included."""
RETRIED = (408, 429, 500, 502, 503, 504)


def is_address(location: str) -> bool:
    """Whether this is the address of a server, and no folder or hub id."""
    return location.startswith(("http://", "https://"))


def retrying_transport(
    url: str, max_retries: int, *, backoff_seconds: float = BACKOFF_SECONDS
) -> RetryTransport:
    """What sends requests to `url` again after a failure that may pass, as this module's head says; through
    the environment's proxy, where there is one."""
    transport = httpx.HTTPTransport(proxy=proxy_of(url))
    return RetryTransport(transport, retry_policy(max_retries, backoff_seconds, _read_whole))


def proxy_of(url: str) -> str | None:
    """What httpx would find by itself, were it not given a transport."""
    address, proxies = httpx.URL(url), urllib.request.getproxies()
    if urllib.request.proxy_bypass(address.host):
        return None
    return proxies.get(address.scheme) or proxies.get("all")


class _SpreadRetry(Retry):
    """Adds the random wait to what `Retry-After` asks for: of clients that are refused together, all told the
    same seconds, the same ones would be refused again."""

    def parse_retry_after(self, retry_after: str) -> float:
        return super().parse_retry_after(retry_after) + self.backoff_strategy()


def retry_policy(
    max_retries: int, backoff_seconds: float, read_whole: Callable[[httpx.Response], Any]
) -> Retry:
    return _SpreadRetry(
        max_retries,
        allowed_methods=("GET", "POST"),
        status_forcelist=RETRIED,
        backoff_factor=backoff_seconds / 2,  # doubled before the first wait already
        max_backoff_wait=LONGEST_WAIT_SECONDS,
        validate_response=read_whole,
    )


def _read_whole(response: httpx.Response) -> None:
    """Within an attempt: a connection that breaks in the middle of a reply is tried again, too."""
    response.read()
