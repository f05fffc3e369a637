"""A client of the reward server (`dina-lrm serve`): latents, pictures, comparisons.

    with Client("http://127.0.0.1:8000") as client:
        scores = client.score_latents(latents, conditioning)                  # (batch,)
        scores = client.score("a red circle", ["a.png", "b.png"]).scores
        probability = client.compare("a red circle", "a.png", "b.png")

`AsyncClient` has the same methods, to be awaited. A score changes nothing on the server, so what may pass is
tried again: no connection, a connection that breaks, a time-out, HTTP 408, 429, 500, 502, 503 and 504. Waits
are random and double, what `Retry-After` asks for is added, and none is longer than a minute. What the server
refuses, or answers against the protocol, it would refuse and answer again.
"""

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import httpx
from httpx_retries import Retry, RetryTransport
from torch import Tensor

from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.tensors import Score
from dina_lrm.errors import InvalidInputError, ScoringError
from dina_lrm.models.scoring import ScoreOutput
from dina_lrm.remote import TOKEN_VARIABLE
from dina_lrm.remote.calls import (
    SCORE_PATH,
    Call,
    T,
    accepted,
    compare_call,
    joined_pictures,
    joined_rows,
    latent_calls,
    picture_calls,
    warned_probability,
)
from dina_lrm.remote.transport import (
    BACKOFF_SECONDS,
    is_address,
    proxy_of,
    retry_policy,
    retrying_transport,
)

__all__ = ["AsyncClient", "Client"]

CONNECT_SECONDS = 10.0
HEALTH_SECONDS = 5.0
_HEALTH_PATH = "/healthz"
_ONCE: dict[str, Any] = {"extensions": {"retry": Retry(0)}, "timeout": HEALTH_SECONDS}


async def _read_whole_async(response: httpx.Response) -> None:
    await response.aread()


# --- requests and replies ----------------------------------------------------------------------------------


# --- clients -----------------------------------------------------------------------------------------------


class _Server:
    """Where a server is and how it is spoken to: what both clients share."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_seconds: float = 120.0,
        max_retries: int = 5,
        max_rows: int = 64,
    ) -> None:
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise InvalidInputError(f"url = {url!r}: not an address ({error})") from error
        if not is_address(url) or not address.host:
            raise InvalidInputError(f"url = {url!r}: it must start with http:// or https:// and name a host")
        if set(address.params) - {"model"}:
            raise InvalidInputError(f"url = {url!r}: after the ? only model=NAME may stand")
        if not timeout_seconds > 0:
            raise InvalidInputError(f"timeout_seconds = {timeout_seconds}: must be above 0")
        if max_retries < 0 or max_rows < 1:
            raise InvalidInputError(
                f"max_retries = {max_retries}, max_rows = {max_rows}: must be at least 0 and at least 1"
            )
        token = token or os.environ.get(TOKEN_VARIABLE) or None
        if token is not None and (not token.isprintable() or token != token.strip()):
            raise InvalidInputError("token: it must be printable, on one line, without space around it")
        self.url = str(address.copy_with(query=None)).rstrip("/").removesuffix(SCORE_PATH)
        self.max_retries, self.max_rows = max_retries, max_rows
        self._connect(
            params=address.params,
            headers=[] if token is None else [(b"authorization", b"Bearer " + token.encode())],
            timeout=httpx.Timeout(timeout_seconds, connect=min(timeout_seconds, CONNECT_SECONDS)),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _connect(self, **options: Any) -> None:
        raise NotImplementedError

    def _unreachable(self, path: str, error: httpx.RequestError) -> ScoringError:
        attempts = self.max_retries + 1 if isinstance(error, Retry.RETRYABLE_EXCEPTIONS) else 1
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return ScoringError(f"{self.url}{path} gave no score in {attempts} attempts, at last: {reason}")


class Client(_Server):
    """A reward behind HTTP. Threads may share one; it keeps its connections, so close it, or use `with`.

    Args:
        url: such as http://127.0.0.1:8000; the server's /v1/score may follow, and ?model=NAME for one of
            several models.
        token: sent as a bearer token; None: the environment variable DINA_LRM_TOKEN, where it is set.
        timeout_seconds: longest silence within an attempt; connecting may take 10 s.
        max_retries: attempts after the first one, of every request.
        max_rows: latents or pictures in one request; more are sent one part after another. A server takes
            256 unless told otherwise.

    Raises:
        InvalidInputError: an address that is not http(s), or a setting out of range.
    """

    _http: httpx.Client

    def _connect(self, **options: Any) -> None:
        self._http = httpx.Client(transport=retrying_transport(self.url, self.max_retries), **options)

    def score_latents(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        noise_level: float | Tensor = 0.4,
        seed: int | Sequence[int] | None = 0,
    ) -> Score:
        """Scores of clean latents, (batch,) float32, on the device of the latents and without gradient.

        Args:
            latents: (batch, channel, height, width), shifted and scaled; sent in their dtype, float32,
                float16 or bfloat16.
            conditioning: one row per latent, or a single row for all, with pooled embeddings.
            noise_level: in [0, 1]; a tensor (batch,) gives each latent its own. There are no ensembles here.
            seed: of the noise; an int for all, or one per latent. None: fresh noise, the server's.

        Raises:
            InvalidInputError: before anything is sent, or the server refuses it.
            ScoringError: the server cannot be reached, fails, or breaks the protocol.
        """
        calls = latent_calls(latents, conditioning, noise_level, seed, self.max_rows)
        return joined_rows([self._send(call) for call in calls], latents)

    def score(
        self,
        prompts: str | Sequence[str],
        images: Any,
        noise_levels: float | Sequence[float] | None = None,
        seed: int | Sequence[int] | None = 0,
        *,
        num_draws: int = 1,
    ) -> ScoreOutput:
        """Scores of pictures for prompts, pair by pair; one prompt or one picture serves all of the other.

        Args:
            images: whatever `RewardModel.score` takes but videos; sent as 8-bit PNG, so that floating pixels
                are rounded.
            noise_levels: in [0, 1]; several are one ensemble. None: the server's own.
            seed: of the noise; an int for all, or one per picture. None: fresh noise.
            num_draws: noise draws to average; more than one also gives standard errors.

        Raises:
            InvalidInputError: before anything is sent, or the server refuses it.
            ScoringError: the server cannot be reached, fails, or breaks the protocol.

        Warns:
            PromptWarning: the server's text encoders do not see all of a prompt.
        """
        calls = picture_calls(prompts, images, noise_levels, seed, num_draws, self.max_rows)
        return joined_pictures([self._send(call) for call in calls])

    def compare(
        self,
        prompt: str,
        image_a: Any,
        image_b: Any,
        noise_levels: float | Sequence[float] | None = None,
        seed: int = 0,
    ) -> float:
        """Probability that `image_a` is preferred to `image_b`; arguments and errors are those of `score`."""
        return warned_probability(self._send(compare_call(prompt, image_a, image_b, noise_levels, seed)))

    def healthy(self) -> bool:
        """Whether the server can score now; asked once, for 5 s at most."""
        try:
            return self._http.get(self.url + _HEALTH_PATH, **_ONCE).status_code == 200
        except httpx.RequestError:
            return False

    def close(self) -> None:
        """Close the connections; the client cannot be used after."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _send(self, call: Call[T]) -> T:
        try:
            response = self._http.post(self.url + call.path, **call.content)
        except httpx.RequestError as error:
            raise self._unreachable(call.path, error) from error
        return call.read(accepted(response, call.first_row))


class AsyncClient(_Server):
    """`Client` with methods to be awaited; tensors and pictures are packed in a thread.

    A long batch is sent one part after another, here too: for requests at once gather several calls.
    """

    _http: httpx.AsyncClient

    def _connect(self, **options: Any) -> None:
        retry = retry_policy(self.max_retries, BACKOFF_SECONDS, _read_whole_async)
        self._http = httpx.AsyncClient(
            transport=RetryTransport(httpx.AsyncHTTPTransport(proxy=proxy_of(self.url)), retry), **options
        )

    async def score_latents(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        noise_level: float | Tensor = 0.4,
        seed: int | Sequence[int] | None = 0,
    ) -> Score:
        """See `Client.score_latents`."""
        calls = await asyncio.to_thread(latent_calls, latents, conditioning, noise_level, seed, self.max_rows)
        return joined_rows([await self._send(call) for call in calls], latents)

    async def score(
        self,
        prompts: str | Sequence[str],
        images: Any,
        noise_levels: float | Sequence[float] | None = None,
        seed: int | Sequence[int] | None = 0,
        *,
        num_draws: int = 1,
    ) -> ScoreOutput:
        """See `Client.score`."""
        calls = await asyncio.to_thread(
            picture_calls, prompts, images, noise_levels, seed, num_draws, self.max_rows
        )
        return joined_pictures([await self._send(call) for call in calls])

    async def compare(
        self,
        prompt: str,
        image_a: Any,
        image_b: Any,
        noise_levels: float | Sequence[float] | None = None,
        seed: int = 0,
    ) -> float:
        """See `Client.compare`."""
        call = await asyncio.to_thread(compare_call, prompt, image_a, image_b, noise_levels, seed)
        return warned_probability(await self._send(call))

    async def healthy(self) -> bool:
        """See `Client.healthy`."""
        try:
            return (await self._http.get(self.url + _HEALTH_PATH, **_ONCE)).status_code == 200
        except httpx.RequestError:
            return False

    async def close(self) -> None:
        """See `Client.close`."""
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _send(self, call: Call[T]) -> T:
        try:
            response = await self._http.post(self.url + call.path, **call.content)
        except httpx.RequestError as error:
            raise self._unreachable(call.path, error) from error
        return call.read(accepted(response, call.first_row))
