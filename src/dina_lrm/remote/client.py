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
import io
import json
import math
import os
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx
import torch
from httpx_retries import Retry, RetryTransport
from PIL import Image
from torch import Tensor

from dina_lrm.backbones.prompts import check_prompts
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.tensors import Score, check_tensor
from dina_lrm.errors import InvalidInputError, PromptWarning, ScoringError
from dina_lrm.images import as_pictures
from dina_lrm.models.scoring import ScoreOutput, check_sigma, resolve_levels, resolve_seeds
from dina_lrm.remote.protocol import CONTENT_TYPE, PROTOCOL_VERSION, VERSION_HEADER, pack, raw_scores

__all__ = ["SCORE_PATH", "TOKEN_VARIABLE", "AsyncClient", "Client", "is_address", "retrying_transport"]

TOKEN_VARIABLE = "DINA_LRM_TOKEN"
"""Environment variable with the token, where none is passed."""
SCORE_PATH = "/v1/score"
MAX_BODY_BYTES = 48 * 2**20
"""Of tensors or pictures in a request of several rows; a server takes 64 MiB unless told otherwise."""
BACKOFF_SECONDS = 1.0
"""Longest first wait; twice as long each time."""
LONGEST_WAIT_SECONDS = 60.0
"""`Retry-After` included."""
CONNECT_SECONDS = 10.0
HEALTH_SECONDS = 5.0
_HEALTH_PATH = "/healthz"
_RETRIED = (408, 429, 500, 502, 503, 504)
_QUOTED = 300
_ONCE: dict[str, Any] = {"extensions": {"retry": Retry(0)}, "timeout": HEALTH_SECONDS}

T = TypeVar("T")


def is_address(location: str) -> bool:
    """Whether this is the address of a server, and no folder or hub id."""
    return location.startswith(("http://", "https://"))


def retrying_transport(
    url: str, max_retries: int, *, backoff_seconds: float = BACKOFF_SECONDS
) -> RetryTransport:
    """What sends requests to `url` again after a failure that may pass, as this module's head says; through
    the environment's proxy, where there is one."""
    transport = httpx.HTTPTransport(proxy=_proxy(url))
    return RetryTransport(transport, _retry(max_retries, backoff_seconds, _read_whole))


def _proxy(url: str) -> str | None:
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


def _retry(max_retries: int, backoff_seconds: float, read_whole: Callable[[httpx.Response], Any]) -> Retry:
    return _SpreadRetry(
        max_retries,
        allowed_methods=("GET", "POST"),
        status_forcelist=_RETRIED,
        backoff_factor=backoff_seconds / 2,  # doubled before the first wait already
        max_backoff_wait=LONGEST_WAIT_SECONDS,
        validate_response=read_whole,
    )


def _read_whole(response: httpx.Response) -> None:
    """Within an attempt: a connection that breaks in the middle of a reply is tried again, too."""
    response.read()


async def _read_whole_async(response: httpx.Response) -> None:
    await response.aread()


# --- requests and replies ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call(Generic[T]):
    """One request, and how its reply is read."""

    path: str
    content: dict[str, Any]
    """What `httpx.Client.post` is given."""
    read: Callable[[httpx.Response], T]
    first_row: int = 0
    """Of a batch that is sent in parts."""


@dataclass(frozen=True)
class _PictureScores:
    scores: list[float]
    standard_errors: list[float] | None
    notes: list[str]


def _latent_calls(
    latents: Tensor,
    conditioning: Conditioning,
    noise_level: float | Tensor,
    seed: int | Sequence[int] | None,
    max_rows: int,
) -> list[_Call[list[float]]]:
    check_tensor(latents, "latents", 4, "(batch, channel, height, width)", finite=False)
    count = len(latents)
    levels = _level_rows(noise_level, count)
    seeds = None if seed is None else resolve_seeds(seed, count)
    if len(conditioning) not in (1, count):
        raise InvalidInputError(
            f"{len(conditioning)} rows of conditioning for {count} latents: give one row each, or one for all"
        )
    rows = torch.arange(count) if len(conditioning) == count else torch.zeros(count, dtype=torch.long)
    fields = [latents, conditioning.prompt_embeds, conditioning.pooled_prompt_embeds]
    row_bytes = sum(one[0].numel() * one.element_size() for one in fields if one is not None)
    calls: list[_Call[list[float]]] = []
    for part in _parts([row_bytes] * count, max_rows):
        body = pack(
            latents[part],
            conditioning.index_select(rows[part]),
            levels[part],
            None if seeds is None else seeds[part],
        )
        headers = {"content-type": CONTENT_TYPE, VERSION_HEADER: PROTOCOL_VERSION}
        calls.append(
            _Call(SCORE_PATH, {"content": body, "headers": headers}, _score_reader(part), part.start)
        )
    return calls


def _level_rows(noise_level: float | Tensor, count: int) -> Tensor:
    if isinstance(noise_level, int | float):
        levels = torch.full((count,), float(noise_level))
    elif isinstance(noise_level, Tensor) and noise_level.shape == (count,):
        levels = noise_level.float()
    else:
        raise InvalidInputError(
            f"noise_level = {noise_level!r}: give one number in [0, 1], or a tensor ({count},), one a latent"
        )
    check_sigma(levels, "noise_level")
    return levels


def _score_reader(part: slice) -> Callable[[httpx.Response], list[float]]:
    return lambda response: raw_scores(response.content, part.stop - part.start, str(response.url))


def _picture_calls(
    prompts: str | Sequence[str],
    images: Any,
    noise_levels: float | Sequence[float] | None,
    seed: int | Sequence[int] | None,
    num_draws: int,
    max_rows: int,
) -> list[_Call[_PictureScores]]:
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    check_prompts(texts)
    files = _png_files(images)
    count = max(len(texts), len(files))
    if len(texts) not in (1, count) or len(files) not in (1, count):
        raise InvalidInputError(f"{len(texts)} prompts for {len(files)} images: give pairs, or one of either")
    if num_draws < 1:
        raise InvalidInputError(f"num_draws = {num_draws}: must be at least 1")
    seeds = resolve_seeds(seed, count)
    levels = _levels(noise_levels)
    texts, files = texts * (count // len(texts)), files * (count // len(files))
    calls: list[_Call[_PictureScores]] = []
    for part in _parts([len(file) for file in files], max_rows):
        request = {
            "prompts": texts[part],
            "noise_levels": levels,
            "seed": seeds[part],
            "num_draws": num_draws,
        }
        form = _form(request, [("images", file) for file in files[part]])
        calls.append(_Call("/v1/score/images", form, _picture_reader(part), part.start))
    return calls


def _picture_reader(part: slice) -> Callable[[httpx.Response], _PictureScores]:
    count = part.stop - part.start

    def read(response: httpx.Response) -> _PictureScores:
        content = _json(response)
        scores = _numbers(response, content, "scores", count)
        errors = content.get("standard_errors")
        if errors is not None:
            errors = _numbers(response, content, "standard_errors", count)
        return _PictureScores(scores, errors, [str(note) for note in content.get("notes") or ()])

    return read


def _compare_call(
    prompt: str, image_a: Any, image_b: Any, noise_levels: float | Sequence[float] | None, seed: int
) -> _Call[tuple[float, list[str]]]:
    check_prompts([prompt])
    a, b = _png_files(image_a), _png_files(image_b)
    if len(a) != 1 or len(b) != 1:
        raise InvalidInputError(f"compare takes two images, not {len(a)} and {len(b)}")
    request = {"prompt": prompt, "noise_levels": _levels(noise_levels), "seed": seed}

    def read(response: httpx.Response) -> tuple[float, list[str]]:
        content = _json(response)
        (probability,) = _numbers(response, {"probability": [content.get("probability")]}, "probability", 1)
        if not 0 <= probability <= 1:
            raise ScoringError(f"{response.url} answers probability = {probability}: expected [0, 1]")
        return probability, [str(note) for note in content.get("notes") or ()]

    return _Call("/v1/compare", _form(request, [("image_a", a[0]), ("image_b", b[0])]), read)


def _levels(noise_levels: float | Sequence[float] | None) -> list[float] | None:
    if noise_levels is None:
        return None
    levels = noise_levels if isinstance(noise_levels, int | float) else list(noise_levels)
    resolve_levels(levels, (), 1)  # refuses what is no level
    return [levels] if isinstance(levels, int | float) else levels


def _png_files(images: Any) -> list[bytes]:
    files: list[bytes] = []
    for index, picture in enumerate(as_pictures(images)):
        if picture.ndim != 3:
            raise InvalidInputError(
                f"image {index} has shape {tuple(picture.shape)}: a server takes no videos"
            )
        pixels = (picture.detach().cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
        files.append(stream.getvalue())
    return files


def _form(request: dict[str, Any], files: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    return {
        "data": {"request": json.dumps(request)},
        "files": [(name, (f"{name}.png", file, "image/png")) for name, file in files],
    }


def _parts(sizes: Sequence[int], max_rows: int) -> list[slice]:
    """Rows of one request each: at most `max_rows`, and no more than MAX_BODY_BYTES unless it is one row.

    >>> _parts([30 * 2**20, 10 * 2**20, 10 * 2**20, 60 * 2**20, 1, 1, 1], max_rows=2)
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None), slice(4, 6, None), slice(6, 7, None)]
    """
    parts: list[slice] = []
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and (index - start == max_rows or total + size > MAX_BODY_BYTES):
            parts.append(slice(start, index))
            start, total = index, 0
        total += size
    return [*parts, slice(start, len(sizes))]


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        content = json.loads(response.content)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ScoringError(f"{response.url} answers with {_quoted(response)}, which is no JSON object")
    return content


def _numbers(response: httpx.Response, content: dict[str, Any], name: str, count: int) -> list[float]:
    values = content.get(name)
    if (
        not isinstance(values, list)
        or len(values) != count
        or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values)
        or not all(map(math.isfinite, values))
    ):
        raise ScoringError(f"{response.url} answers {name} = {values!r}: expected {count} finite numbers")
    return [float(value) for value in values]


def _accepted(response: httpx.Response, first_row: int) -> httpx.Response:
    """The response, if it is an answer.

    Raises:
        InvalidInputError: the server refuses the request, or is elsewhere.
        ScoringError: it failed, at the last attempt, too.
    """
    status, url = response.status_code, response.url
    if status == 200:
        return response
    if status in _RETRIED:
        attempts = response.extensions["retry"].attempts_made + 1
        raise ScoringError(
            f"{url} gave no score in {attempts} attempts, at last: HTTP {status}: {_said(response)}"
        )
    if status >= 500:
        raise ScoringError(f"{url} failed: HTTP {status}: {_said(response)}")
    if status < 400:
        where = response.headers.get("location", "nowhere")
        raise InvalidInputError(f"{url} answers HTTP {status} and points to {where}: give that address")
    advice = f"; give token=, or set {TOKEN_VARIABLE}" if status == 401 else ""
    rows = f" the rows from {first_row}" if first_row else ""
    raise InvalidInputError(f"{url} refuses{rows}: HTTP {status}: {_said(response)}{advice}")


def _said(response: httpx.Response) -> str:
    try:
        content = json.loads(response.content)
    except ValueError:
        content = None
    error = content.get("error") if isinstance(content, dict) else None
    return error if isinstance(error, str) else _quoted(response)


def _quoted(response: httpx.Response) -> str:
    text = response.text
    return repr(text if len(text) <= _QUOTED else text[:_QUOTED] + " ...")


def _joined_rows(parts: Sequence[list[float]], latents: Tensor) -> Score:
    scores = [score for part in parts for score in part]
    return torch.tensor(scores, dtype=torch.float32, device=latents.device)


def _joined_pictures(parts: Sequence[_PictureScores]) -> ScoreOutput:
    _warn([note for part in parts for note in part.notes])
    errors = [error for part in parts for error in part.standard_errors or ()]
    return ScoreOutput(
        torch.tensor([score for part in parts for score in part.scores], dtype=torch.float32),
        torch.tensor(errors, dtype=torch.float32) if errors else None,
    )


def _told(comparison: tuple[float, list[str]]) -> float:
    probability, notes = comparison
    _warn(notes)
    return probability


def _warn(notes: Sequence[str]) -> None:
    for note in dict.fromkeys(notes):
        warnings.warn(note, PromptWarning, stacklevel=4)


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
        calls = _latent_calls(latents, conditioning, noise_level, seed, self.max_rows)
        return _joined_rows([self._send(call) for call in calls], latents)

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
        calls = _picture_calls(prompts, images, noise_levels, seed, num_draws, self.max_rows)
        return _joined_pictures([self._send(call) for call in calls])

    def compare(
        self,
        prompt: str,
        image_a: Any,
        image_b: Any,
        noise_levels: float | Sequence[float] | None = None,
        seed: int = 0,
    ) -> float:
        """Probability that `image_a` is preferred to `image_b`; arguments and errors are those of `score`."""
        return _told(self._send(_compare_call(prompt, image_a, image_b, noise_levels, seed)))

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

    def _send(self, call: _Call[T]) -> T:
        try:
            response = self._http.post(self.url + call.path, **call.content)
        except httpx.RequestError as error:
            raise self._unreachable(call.path, error) from error
        return call.read(_accepted(response, call.first_row))


class AsyncClient(_Server):
    """`Client` with methods to be awaited; tensors and pictures are packed in a thread.

    A long batch is sent one part after another, here too: for requests at once gather several calls.
    """

    _http: httpx.AsyncClient

    def _connect(self, **options: Any) -> None:
        retry = _retry(self.max_retries, BACKOFF_SECONDS, _read_whole_async)
        self._http = httpx.AsyncClient(
            transport=RetryTransport(httpx.AsyncHTTPTransport(proxy=_proxy(self.url)), retry), **options
        )

    async def score_latents(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        noise_level: float | Tensor = 0.4,
        seed: int | Sequence[int] | None = 0,
    ) -> Score:
        """See `Client.score_latents`."""
        calls = await asyncio.to_thread(
            _latent_calls, latents, conditioning, noise_level, seed, self.max_rows
        )
        return _joined_rows([await self._send(call) for call in calls], latents)

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
            _picture_calls, prompts, images, noise_levels, seed, num_draws, self.max_rows
        )
        return _joined_pictures([await self._send(call) for call in calls])

    async def compare(
        self,
        prompt: str,
        image_a: Any,
        image_b: Any,
        noise_levels: float | Sequence[float] | None = None,
        seed: int = 0,
    ) -> float:
        """See `Client.compare`."""
        call = await asyncio.to_thread(_compare_call, prompt, image_a, image_b, noise_levels, seed)
        return _told(await self._send(call))

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

    async def _send(self, call: _Call[T]) -> T:
        try:
            response = await self._http.post(self.url + call.path, **call.content)
        except httpx.RequestError as error:
            raise self._unreachable(call.path, error) from error
        return call.read(_accepted(response, call.first_row))
