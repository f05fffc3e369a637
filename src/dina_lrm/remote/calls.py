"""Requests of a client and what is read from the answers, without sending anything."""

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx
import torch
from PIL import Image
from torch import Tensor

from dina_lrm.backbones.prompts import check_prompts
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.tensors import Score, check_tensor
from dina_lrm.errors import InvalidInputError, ScoringError, warn_of_prompts
from dina_lrm.images import as_pictures
from dina_lrm.models.scoring import ScoreOutput, check_sigma, resolve_levels, resolve_seeds
from dina_lrm.remote import TOKEN_VARIABLE
from dina_lrm.remote.protocol import CONTENT_TYPE, PROTOCOL_VERSION, VERSION_HEADER, pack, raw_scores
from dina_lrm.remote.transport import RETRIED

__all__ = [
    "SCORE_PATH",
    "Call",
    "T",
    "accepted",
    "compare_call",
    "joined_pictures",
    "joined_rows",
    "latent_calls",
    "picture_calls",
    "warned_probability",
]

SCORE_PATH = "/v1/score"
MAX_BODY_BYTES = 48 * 2**20
"""Bytes of tensors or pictures in a request of several rows; a server takes 64 MiB unless told otherwise."""
_QUOTED = 300
T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and how its reply is read."""

    path: str
    content: dict[str, Any]
    """What `httpx.Client.post` is given."""
    read: Callable[[httpx.Response], T]
    first_row: int = 0
    """First row of a part, where a batch is sent in parts."""


@dataclass(frozen=True)
class _PictureScores:
    scores: list[float]
    standard_errors: list[float] | None
    notes: list[str]


def latent_calls(
    latents: Tensor,
    conditioning: Conditioning,
    noise_level: float | Tensor,
    seed: int | Sequence[int] | None,
    max_rows: int,
) -> list[Call[list[float]]]:
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
    row_bytes = sum(field[0].numel() * field.element_size() for field in fields if field is not None)
    calls: list[Call[list[float]]] = []
    for part in _parts([row_bytes] * count, max_rows):
        body = pack(
            latents[part],
            conditioning.index_select(rows[part]),
            levels[part],
            None if seeds is None else seeds[part],
        )
        headers = {"content-type": CONTENT_TYPE, VERSION_HEADER: PROTOCOL_VERSION}
        calls.append(Call(SCORE_PATH, {"content": body, "headers": headers}, _score_reader(part), part.start))
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


def picture_calls(
    prompts: str | Sequence[str],
    images: Any,
    noise_levels: float | Sequence[float] | None,
    seed: int | Sequence[int] | None,
    num_draws: int,
    max_rows: int,
) -> list[Call[_PictureScores]]:
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
    calls: list[Call[_PictureScores]] = []
    for part in _parts([len(file) for file in files], max_rows):
        request = {
            "prompts": texts[part],
            "noise_levels": levels,
            "seed": seeds[part],
            "num_draws": num_draws,
        }
        form = _form(request, [("images", file) for file in files[part]])
        calls.append(Call("/v1/score/images", form, _picture_reader(part), part.start))
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


def compare_call(
    prompt: str, image_a: Any, image_b: Any, noise_levels: float | Sequence[float] | None, seed: int
) -> Call[tuple[float, list[str]]]:
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

    return Call("/v1/compare", _form(request, [("image_a", a[0]), ("image_b", b[0])]), read)


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


def accepted(response: httpx.Response, first_row: int) -> httpx.Response:
    """The response, if it is an answer.

    Raises:
        InvalidInputError: the server refuses the request, or is elsewhere.
        ScoringError: it failed, at the last attempt, too.
    """
    status, url = response.status_code, response.url
    if status == 200:
        return response
    if status in RETRIED:
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


def joined_rows(parts: Sequence[list[float]], latents: Tensor) -> Score:
    scores = [score for part in parts for score in part]
    return torch.tensor(scores, dtype=torch.float32, device=latents.device)


def joined_pictures(parts: Sequence[_PictureScores]) -> ScoreOutput:
    warn_of_prompts(note for part in parts for note in part.notes)
    errors = [error for part in parts for error in part.standard_errors or ()]
    return ScoreOutput(
        torch.tensor([score for part in parts for score in part.scores], dtype=torch.float32),
        torch.tensor(errors, dtype=torch.float32) if errors else None,
    )


def warned_probability(comparison: tuple[float, list[str]]) -> float:
    probability, notes = comparison
    warn_of_prompts(notes)
    return probability
