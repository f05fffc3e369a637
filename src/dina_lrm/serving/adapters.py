"""Routes that other trainers' clients know, over the same models, queue and limits.

    cosmos-rl   POST /api/reward/ping, /enqueue, /pull      latents or pictures in, a ticket out, scores later
    unirl       POST /score, GET /health, GET /rewards      pictures in JSON, scores by reward and part

Their texts and shapes are their clients'; errors are this server's. cosmos-rl's client takes any answer of
/pull but 200 as "not ready", and asks again: what has failed is therefore kept, too, and told with 422.
"""

import asyncio
import io
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from dina_lrm.errors import DinaError
from dina_lrm.serving.batching import Draining, QueueFull
from dina_lrm.serving.bodies import check_content_type, read_body
from dina_lrm.serving.callers import Caller, CallerFull
from dina_lrm.serving.engine import Row
from dina_lrm.serving.pictures import EncodedPicture, picture_header
from dina_lrm.serving.schemas import ErrorReply, RequestError, check_prompt, decoded, json_of, parsed
from dina_lrm.serving.served import PictureRow, Served
from dina_lrm.serving.service import Service

__all__ = ["add_adapters"]

SEED = 0
"""Seed of the noise; these clients name none."""
KEPT_RESULTS = 1024
"""Tickets of cosmos-rl that are kept for each caller."""
KEPT_SECONDS = 600.0
"""How long a result waits to be fetched."""
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


def add_adapters(app: FastAPI, service: Service) -> None:
    """The routes that `ServerSettings.adapters` names."""
    if "cosmos-rl" in service.settings.adapters:
        _add_cosmos(app, service)
    if "unirl" in service.settings.adapters:
        _add_unirl(app, service)


# --- cosmos-rl ---------------------------------------------------------------------------------------------


class Ticket(BaseModel):
    """Ticket of a request whose scores are fetched later."""

    uuid: str


class TicketScores(BaseModel):
    """Scores of a ticket by reward, one for each prompt."""

    scores: dict[str, list[float]]


class _CosmosMeta(BaseModel):
    """The line of JSON before the array. What a client adds for other rewards is not read."""

    model_config = ConfigDict(extra="ignore")

    prompts: Annotated[list[str], Field(min_length=1)]
    reward_fn: Annotated[dict[str, float], Field(min_length=1)]
    media_type: str = "video"


@dataclass
class _Result:
    """Result of a ticket, or the work on it."""

    working: "asyncio.Task[list[float]]"
    rewards: tuple[str, ...]
    caller: Caller | None
    since: float
    fetched: bool = False


class _Results:
    """Tickets, for a bounded time, and in a bounded number for each caller: where there are too many, the
    oldest that was fetched already goes, and without one a new ticket is refused."""

    def __init__(self) -> None:
        self._kept: dict[str, _Result] = {}

    def make_room(self, caller: Caller | None) -> None:
        self._forget()
        own = {ticket: kept for ticket, kept in self._kept.items() if kept.caller is caller}
        if len(own) < KEPT_RESULTS:
            return
        fetched = next((ticket for ticket, kept in own.items() if kept.fetched), None)
        if fetched is None:
            raise QueueFull(1)
        del self._kept[fetched]

    def add(self, working: "asyncio.Task[list[float]]", rewards: Sequence[str], caller: Caller | None) -> str:
        ticket = secrets.token_hex(16)
        self._kept[ticket] = _Result(working, tuple(rewards), caller, time.monotonic())
        return ticket

    def find(self, ticket: str, caller: Caller | None) -> _Result | None:
        """The result of a ticket of this caller's."""
        self._forget()
        found = self._kept.get(ticket)
        return found if found is not None and found.caller is caller else None

    def _forget(self) -> None:
        now = time.monotonic()
        for ticket, kept in list(self._kept.items()):
            if kept.working.done() and now - kept.since > KEPT_SECONDS:
                del self._kept[ticket]


_ENQUEUE_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": 'A line of JSON, {"prompts": [...], "reward_fn": {"main": 1.0}, "media_type": "image"}'
        ", and bytes of np.save after it: for image uint8 (batch, height, width, 3); for latent, and for "
        "video, which is the default, float16 or float32 (batch, channel, frame, height, width), or without "
        "frames.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_TICKET = {
    "type": "object",
    "required": ["uuid", "type"],
    "properties": {"uuid": {"type": "string"}, "type": {"type": "string", "description": "The reward."}},
}
_PULL_SCHEMA: dict[str, Any] = {
    "requestBody": {"required": True, "content": {form: {"schema": _TICKET} for form in _FORMS}}
}


def _add_cosmos(app: FastAPI, service: Service) -> None:
    results = _Results()

    @app.post("/api/reward/ping")
    async def ping() -> dict[str, Any]:
        """cosmos-rl: which rewards there are."""
        return {"status": "ok", "rewards": list(service.models)}

    @app.post("/api/reward/enqueue", response_model=Ticket, openapi_extra=_ENQUEUE_SCHEMA)
    async def enqueue(request: Request) -> Any:
        """cosmos-rl: take latents or pictures, and give a ticket, `uuid`."""
        results.make_room(request.state.caller)
        body = await read_body(request)
        line, newline, array = body.partition(b"\n")
        if not newline:
            raise RequestError("body: a line of JSON, and np.save bytes after it", field="body", status=422)
        wanted = parsed(_CosmosMeta, json_of(line, "body"))
        served = _one_model(service, list(wanted.reward_fn))
        for index, prompt in enumerate(wanted.prompts):
            check_prompt(prompt, f"prompts.{index}", service.settings.max_prompt_length)
        values = await to_thread.run_sync(_array, array)
        del body, array
        rows: Sequence[Row | PictureRow]
        if wanted.media_type == "image":
            rows = await to_thread.run_sync(_cosmos_pictures, values, wanted.prompts, served, service)
        elif wanted.media_type in ("latent", "video"):  # a video is sent as its latents
            rows = await _cosmos_latents(values, wanted.prompts, served)
        else:
            raise RequestError(
                f"media_type: {wanted.media_type[:80]!r}, expected image, latent or video",
                field="media_type",
                status=422,
            )
        caller = request.state.caller
        work = served.check_cost(rows, "body", caller)
        served.batcher.check_room(len(rows), work)

        async def score() -> list[float]:
            return [one.score for one in await service.score_rows(served, rows, caller, work)]

        working = asyncio.create_task(score())
        working.add_done_callback(lambda task: task.cancelled() or task.exception())  # told when it is pulled
        return {"uuid": results.add(working, list(wanted.reward_fn), caller)}

    @app.post(
        "/api/reward/pull",
        response_model=TicketScores,
        openapi_extra=_PULL_SCHEMA,
        responses={404: {"model": ErrorReply}},
    )
    async def pull(request: Request) -> Any:
        """cosmos-rl: the scores of a ticket, or 400 as long as they are not there."""
        check_content_type(request, _FORMS)
        async with request.form(max_files=0, max_fields=8) as form:
            ticket, reward = str(form.get("uuid", "")), str(form.get("type", ""))
        found = results.find(ticket, request.state.caller)
        if found is None:
            raise RequestError(f"uuid: there is no result {ticket[:80]!r}", field="uuid", status=404)
        if reward not in found.rewards:
            raise RequestError(
                f"type: {reward[:80]!r} was not asked for, only {', '.join(found.rewards)}",
                field="type",
                status=422,
            )
        if not found.working.done():
            content = {"error": "not ready", "field": None, "request_id": request.state.request_id}
            return JSONResponse(content, status_code=400)
        found.fetched = True
        try:
            scores = found.working.result()
        except (QueueFull, Draining, CallerFull) as error:
            raise RequestError(
                f"it was not scored: {error or 'overloaded'}; send it again", status=503
            ) from error
        return {"scores": {reward: scores}}


def _one_model(service: Service, rewards: Sequence[str]) -> Served:
    """The model of the rewards that are asked for: a name of a model, or any one name for the first."""
    if len(rewards) != 1:
        raise RequestError(
            f"reward_fn: {len(rewards)} rewards, this server gives one at a time",
            field="reward_fn",
            status=422,
        )
    return service.models.get(rewards[0], service.first)


def _array(data: bytes) -> np.ndarray:
    """An array from bytes of np.save: what the header says is compared with what was sent before anything
    of that size is made."""
    stream = io.BytesIO(data)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        if version not in read_header:
            raise ValueError(f"format version {version}")
        shape, in_columns, dtype = read_header[version](stream)
        expected, got = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
        if dtype.hasobject or expected != got:
            raise ValueError(f"{dtype} of shape {shape} has {expected} bytes, {got} were sent")
        values = np.frombuffer(data, dtype, offset=stream.tell())
        return values.reshape(shape, order="F" if in_columns else "C")
    except (ValueError, TypeError, EOFError, SyntaxError) as error:
        raise RequestError(f"body: not np.save bytes ({error})", field="body", status=422) from error


def _cosmos_pictures(
    values: np.ndarray, prompts: Sequence[str], served: Served, service: Service
) -> list[PictureRow]:
    if values.ndim != 4 or values.shape[-1] != 3 or values.dtype != np.uint8 or len(values) != len(prompts):
        raise RequestError(
            f"body: {values.dtype} of shape {values.shape} for {len(prompts)} prompts; media_type image is "
            f"uint8 (batch, height, width, 3)",
            field="body",
            status=422,
        )
    rows = []
    for index, (pixels, prompt) in enumerate(zip(values, prompts, strict=True)):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "BMP")
        picture = picture_header(stream.getvalue(), service.settings.max_megapixels, f"body.{index}")
        rows.append(PictureRow(picture, prompt, tuple(served.model.config.noise_levels), SEED, 1))
    return rows


async def _cosmos_latents(values: np.ndarray, prompts: Sequence[str], served: Served) -> list[Row]:
    """Latents come without embeddings: the server encodes the prompts."""
    import torch

    takes_video = served.model.backbone.architecture.max_latent_frames is not None
    if (
        values.dtype not in (np.float16, np.float32)
        or values.ndim not in (4, 5)
        or len(values) != len(prompts)
    ):
        raise RequestError(
            f"body: {values.dtype} of shape {values.shape} for {len(prompts)} prompts; media_type latent or "
            f"video, which it is where none is named, is float16 or float32 (batch, channel, frame, height, "
            f"width), or without frames; pictures are media_type image",
            field="body",
            status=422,
        )
    latents = torch.from_numpy(values.astype(np.float32))
    if latents.ndim == 5 and latents.shape[2] == 1 and not takes_video:
        latents = latents[:, :, 0]
    served.model.backbone.check_latents(latents)
    conditioning = await served.batcher.run(
        lambda: [served.model.encode_prompts([prompt]) for prompt in prompts]
    )
    levels = tuple(served.model.config.noise_levels)
    return [Row(latent, one, levels, SEED) for latent, one in zip(latents, conditioning, strict=True)]


# --- UniRL -------------------------------------------------------------------------------------------------


class UniScores(BaseModel):
    """By picture: scores by reward and part, null where there is none, and why."""

    results: list[dict[str, dict[str, float | None]]]
    errors: list[dict[str, str]]


class _Turn(BaseModel):
    model_config = ConfigDict(extra="ignore")

    text: str
    image_b64: str


class _UniRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")

    history: Annotated[list[_Turn], Field(min_length=1)]
    """The picture to be scored is the last one."""
    required_rewards: Annotated[list[str], Field(min_length=1)]


class _UniRequests(BaseModel):
    model_config = ConfigDict(extra="ignore")

    requests: Annotated[list[dict[str, Any]], Field(min_length=1)] = Field(
        description="Each with history, a list of turns with text and image_b64 of which the last is scored, "
        "and required_rewards, a list of names."
    )


_UNIRL_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _UniRequests.model_json_schema()}},
    }
}


def _add_unirl(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """UniRL: 200 when a score can be served."""
        return JSONResponse(
            {"status": "ok" if service.healthy else "not ready"}, status_code=200 if service.healthy else 503
        )

    @app.get("/rewards")
    async def rewards() -> dict[str, list[str]]:
        """UniRL: the names of the models."""
        return {"rewards": list(service.models)}

    @app.post("/score", response_model=UniScores, openapi_extra=_UNIRL_SCHEMA)
    async def score(request: Request) -> Any:
        """UniRL: scores of pictures by reward; where one cannot be scored null, and why in `errors`."""
        wanted = parsed(_UniRequests, json_of(await read_body(request), "body"))
        if len(wanted.requests) > service.settings.max_rows:
            raise RequestError(
                f"requests: {len(wanted.requests)} at once, at most {service.settings.max_rows} are taken",
                field="requests",
                status=413,
            )
        results: list[dict[str, dict[str, float]]] = [{} for _ in wanted.requests]
        errors: list[dict[str, str]] = [{} for _ in wanted.requests]
        rows: dict[str, list[tuple[int, PictureRow]]] = {}
        for index, one in enumerate(wanted.requests):
            names = one.get("required_rewards")
            for name in dict.fromkeys(map(str, names if isinstance(names, list) else [])):
                try:
                    row = _uni_row(one, index, service.find(name), service)
                    rows.setdefault(name, []).append((index, row))
                except DinaError as error:  # of this picture alone
                    results[index][name], errors[index][name] = {"score": math.nan}, str(error)
            if not results[index] and not any(index == at for own in rows.values() for at, _ in own):
                errors[index]["request"] = "required_rewards: a list of names, see /rewards"
        for name, own in rows.items():
            scores = await service.score(request, service.models[name], [row for _, row in own], "requests")
            for (index, _), found in zip(own, scores, strict=True):
                results[index][name] = {"score": found.score}
        return {
            "results": [
                {
                    name: {part: _finite(value) for part, value in parts.items()}
                    for name, parts in result.items()
                }
                for result in results
            ],
            "errors": errors,
        }


def _uni_row(content: dict[str, Any], index: int, served: Served, service: Service) -> PictureRow:
    turn = parsed(_UniRequest, content).history[-1]
    name = f"requests.{index}"
    check_prompt(turn.text, name, service.settings.max_prompt_length)
    picture: EncodedPicture = picture_header(
        decoded(turn.image_b64, name), service.settings.max_megapixels, name
    )
    served.size(picture)
    return PictureRow(picture, turn.text, tuple(served.model.config.noise_levels), SEED, 1)


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
