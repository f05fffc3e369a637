"""The reward server: the latent protocol, scores of pictures, comparisons, and the page.

    app = create_app(ServerSettings(model="bundled"))       # an ASGI application, for uvicorn or Ray Serve

One thread holds the model. Rows of all requests meet in a `MicroBatcher`; what a request costs it is told by
the log line and by /metrics. Nothing that a client sends is unpickled or used as a path.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import torch
from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from dina_lrm import __version__
from dina_lrm.errors import InvalidInputError, MissingComponentError, ScoringError
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.models.scoring import preference_probability
from dina_lrm.protocol import CONTENT_TYPE, FIELDS, PROTOCOL_VERSION, VERSION_HEADER, unpack
from dina_lrm.serving.batching import Draining, MicroBatcher, QueueFull
from dina_lrm.serving.engine import Engine, PictureRow, Row, RowScore, open_picture
from dina_lrm.serving.gate import Gate
from dina_lrm.serving.metrics import Metrics
from dina_lrm.serving.schemas import (
    CompareReply,
    CompareRequest,
    ErrorReply,
    ImageScores,
    ImagesRequest,
    LatentScores,
    RequestError,
    Status,
    check_prompt,
    decoded,
    form_fields,
    levels_of,
    paired,
    parsed,
)
from dina_lrm.serving.settings import ServerSettings

__all__ = ["create_app", "load_model"]

STALLED_SECONDS = 60.0
"""A model that is at one batch for longer is given up as dead: /healthz says so."""

T = TypeVar("T")


def load_model(settings: ServerSettings) -> RewardModel:
    """The reward that a server is to serve."""
    options: dict[str, Any] = {} if settings.pipeline is None else {"pipeline": settings.pipeline}
    model = RewardModel.from_pretrained(
        settings.model, device=settings.device, dtype=getattr(torch, settings.dtype), **options
    )
    return model.requires_grad_(False)


class _Service:
    """What the routes of one app share."""

    def __init__(self, settings: ServerSettings, model: RewardModel) -> None:
        self.settings = settings
        self.engine = Engine(model)
        self.metrics = Metrics(lambda: self.batcher.queued)
        self.batcher = MicroBatcher[Row, RowScore](
            self.engine.score,
            max_batch_size=settings.max_batch_size,
            max_wait_ms=settings.max_wait_ms,
            max_queue=settings.max_queue,
            observe=self.metrics.batch,
        )
        self.warm = False
        self.loop: asyncio.AbstractEventLoop | None = None

    @property
    def model(self) -> RewardModel:
        return self.engine.model

    @property
    def healthy(self) -> bool:
        return self.warm and self.batcher.busy_seconds < STALLED_SECONDS

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.batcher.start()
        await self.batcher.run(self.engine.warm_up)
        self.warm = True

    async def stop(self) -> None:
        self.warm = False
        await self.batcher.stop()

    def run(self, job: Callable[[], T]) -> T:
        """`job()` on the model's thread, for callers in other threads.

        Raises:
            ScoringError: the server is too busy, or shutting down.
        """
        if self.loop is None:
            raise ScoringError("the server has not started")
        try:
            return asyncio.run_coroutine_threadsafe(self.batcher.run(job), self.loop).result()
        except (QueueFull, Draining) as error:
            raise ScoringError("the server is busy: try again in a moment") from error

    async def score(self, request: Request, rows: Sequence[Row]) -> list[RowScore]:
        """Scores of rows; what they cost goes into the request's log line."""
        scores = await _unless_gone(request, self.batcher.submit(rows))
        stages = {
            "encode": sum(one.encode_seconds for one in scores) / len(scores),
            "forward": sum(one.forward_seconds for one in scores) / len(scores),
        }
        for stage, seconds in stages.items():
            self.metrics.stages.labels(stage).observe(seconds)
        self.metrics.scores.inc(len(scores))
        request.state.facts |= {"rows": len(rows)} | {
            f"{stage}_seconds": round(seconds, 6) for stage, seconds in stages.items()
        }
        return scores


def create_app(settings: ServerSettings, model: RewardModel | None = None) -> FastAPI:
    """The application; the model is warm before it takes the first request.

    Args:
        model: served instead of the one that `settings` names.
    """
    service = _Service(settings, load_model(settings) if model is None else model)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPIOffline(
        title="DiNa-LRM reward server",
        version=__version__,
        description="Human preference, read from noisy diffusion latents.",
        lifespan=lifespan,
        responses={
            status: {"model": ErrorReply, "description": why}
            for status, why in (
                (400, "Not a request of this protocol"),
                (401, "No token"),
                (413, "Too large"),
                (415, "Another content type"),
                (422, "A field is wrong; it is named"),
                (503, "Overloaded: see Retry-After"),
            )
        },
    )
    app.state.service = service
    _add_routes(app, service)
    _add_errors(app, service)
    max_body = int(settings.max_body_mib * 2**20)
    app.add_middleware(Gate, token=settings.token, max_body=max_body, metrics=service.metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", VERSION_HEADER],
        )
    if settings.page:
        _add_page(app, service)
    return app


# --- routes ------------------------------------------------------------------------------------------------


def _add_routes(app: FastAPI, service: _Service) -> None:
    settings, model = service.settings, service.model
    version_header = {"name": VERSION_HEADER, "in": "header", "required": True, "schema": {"enum": ["1"]}}

    @app.post(
        "/v1/score",
        response_model=LatentScores,
        openapi_extra={
            "parameters": [version_header],
            "requestBody": {
                "required": True,
                "description": "safetensors bytes: latents, prompt_embeds, pooled_prompt_embeds, u, seeds",
                "content": {CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}}},
            },
        },
    )
    async def score_latents(request: Request) -> LatentScores:
        """Scores of clean latents, each at its own noise level: the latent protocol, version 1."""
        version = request.headers.get(VERSION_HEADER)
        if version != PROTOCOL_VERSION:
            raise RequestError(
                f"{VERSION_HEADER}: {version!r}, this server speaks {PROTOCOL_VERSION!r}",
                field=VERSION_HEADER,
            )
        _check_content_type(request, (CONTENT_TYPE,))
        body = await request.body()
        latents = await to_thread.run_sync(unpack, body) if len(body) > 2**18 else unpack(body)
        _check_rows(len(latents), "latents", settings.max_rows)
        fresh = [secrets.randbits(62) for _ in range(len(latents))]
        scores = await service.score(request, service.engine.latent_rows(latents, fresh))
        return LatentScores(protocol_version=PROTOCOL_VERSION, raw_scores=[one.score for one in scores])

    @app.post(
        "/v1/score/images",
        response_model=ImageScores,
        openapi_extra=_body_of(ImagesRequest, several="images"),
    )
    async def score_images(request: Request) -> ImageScores:
        """Scores of pictures, sent as base64 in JSON, or as files `images` of a form beside `request`, which
        holds the same JSON without them."""
        wanted, files = await _read(request, ImagesRequest, several=("images",))
        _check_rows(len(files["images"]), "images", settings.max_rows)
        prompts, seeds = paired(wanted.prompts, wanted.seed, len(files["images"]), settings.max_prompt_length)
        levels = levels_of(wanted.noise_levels, model.config.noise_levels)
        rows = await to_thread.run_sync(
            lambda: [
                _picture_row(service, file, f"images.{index}", prompt, levels, seed, wanted.num_draws)
                for index, (file, prompt, seed) in enumerate(
                    zip(files["images"], prompts, seeds, strict=True)
                )
            ]
        )
        scores = await service.score(request, rows)
        errors = [one.standard_error for one in scores if one.standard_error is not None]
        return ImageScores(
            scores=[one.score for one in scores],
            standard_errors=errors or None,
            noise_levels=list(levels),
            notes=_notes(scores),
            model=settings.model,
        )

    @app.post(
        "/v1/compare",
        response_model=CompareReply,
        openapi_extra=_body_of(CompareRequest, single=("image_a", "image_b")),
    )
    async def compare(request: Request) -> CompareReply:
        """Probability that one picture is preferred to another, both seen through the same noise."""
        wanted, files = await _read(request, CompareRequest, single=("image_a", "image_b"))
        check_prompt(wanted.prompt, "prompt", settings.max_prompt_length)
        levels = levels_of(wanted.noise_levels, model.config.noise_levels)
        rows = await to_thread.run_sync(
            lambda: [
                _picture_row(service, files[name][0], name, wanted.prompt, levels, wanted.seed, 1)
                for name in ("image_a", "image_b")
            ]
        )
        a, b = await service.score(request, rows)
        return CompareReply(
            probability=preference_probability(a.score - b.score, levels, model.config),
            scores=(a.score, b.score),
            noise_levels=list(levels),
            notes=_notes([a]),
            model=settings.model,
        )

    @app.get("/healthz", response_model=Status)
    async def healthz() -> Response:
        """200 when a score can be served."""
        return _status(service, service.healthy, "ok", "not ready" if not service.warm else "stalled")

    @app.get("/readyz", response_model=Status)
    async def readyz() -> Response:
        """200 when the server has room for more."""
        ready = service.healthy and not service.batcher.full
        return _status(service, ready, "ready", "full" if service.healthy else "not ready")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=1.0.0; charset=utf-8")


def _status(service: _Service, good: bool, word: str, otherwise: str) -> Response:
    status = Status(
        status=word if good else otherwise, model=service.settings.model, queued=service.batcher.queued
    )
    return JSONResponse(status.model_dump(), status_code=200 if good else 503)


def _notes(scores: Sequence[RowScore]) -> list[str]:
    return list(dict.fromkeys(note for one in scores for note in one.notes))


def _picture_row(
    service: _Service,
    file: bytes,
    name: str,
    prompt: str,
    levels: tuple[float, ...],
    seed: int,
    num_draws: int,
) -> PictureRow:
    picture = open_picture(file, service.settings.max_megapixels, name)
    return service.engine.picture_row(picture, prompt, levels, seed, num_draws, name)


def _check_rows(count: int, name: str, limit: int) -> None:
    if count > limit:
        raise RequestError(
            f"{name}: {count} in one request, at most {limit} are taken", field=name, status=413
        )


def _check_content_type(request: Request, allowed: Sequence[str]) -> str:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in allowed:
        raise RequestError(
            f"content-type: {given[:80]!r}, expected {' or '.join(allowed)}", field="content-type", status=415
        )
    return given


RequestT = TypeVar("RequestT", bound=BaseModel)


async def _read(
    request: Request, kind: type[RequestT], *, single: Sequence[str] = (), several: Sequence[str] = ()
) -> tuple[RequestT, dict[str, list[bytes]]]:
    """A request with pictures, and their bytes by field, from JSON or from a form."""
    names = (*single, *several)
    if _check_content_type(request, ("application/json", "multipart/form-data")) == "application/json":
        wanted = parsed(kind, _json(await request.body(), "body"))
        texts = {name: getattr(wanted, name) for name in names}
        return wanted, {
            name: [decoded(one, name) for one in ([value] if isinstance(value, str) else value)]
            for name, value in texts.items()
        }
    try:
        async with request.form(max_files=10_000, max_fields=16) as form:
            return await _read_form(form, kind, single, several)
    except HTTPException as error:
        raise RequestError(f"body: {error.detail}", field="body") from error


async def _read_form(
    form: FormData, kind: type[RequestT], single: Sequence[str], several: Sequence[str]
) -> tuple[RequestT, dict[str, list[bytes]]]:
    text = form.get("request")
    if not isinstance(text, str):
        raise RequestError("request: missing; a form has it as a JSON text", field="request", status=422)
    content = _json(text.encode(errors="surrogatepass"), "request")
    uploads = form_fields(form, single, several)
    if not isinstance(content, dict):
        raise RequestError("request: it must be a JSON object", field="request", status=422)
    if twice := [name for name in (*single, *several) if name in content]:
        raise RequestError(f"{twice[0]}: a form has it as a file", field=twice[0], status=422)
    stand_ins = {name: "" for name in single} | {name: [""] for name in several}
    wanted = parsed(kind, content | stand_ins)
    return wanted, {name: [await one.read() for one in files] for name, files in uploads.items()}


def _json(text: bytes, field: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{field}: not JSON ({error})", field=field) from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _body_of(
    kind: type[BaseModel], *, single: Sequence[str] = (), several: str | None = None
) -> dict[str, Any]:
    """What OpenAPI says about a body that is JSON or a form."""
    file = {"type": "string", "format": "binary"}
    files: dict[str, Any] = {name: file for name in single}
    if several is not None:
        files[several] = {"type": "array", "items": file, "minItems": 1}
    form = {
        "type": "object",
        "required": ["request", *files],
        "properties": {"request": {"type": "string", "contentMediaType": "application/json"}, **files},
    }
    schema = kind.model_json_schema()
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}},
        }
    }


async def _unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """The answer, unless the client leaves before it is there.

    Raises:
        _ClientGone: it has left; what waited for it was cancelled.
    """
    working = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise _ClientGone
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _ClientGone(Exception):
    """Nobody is there to be answered."""


# --- errors ------------------------------------------------------------------------------------------------


def _add_errors(app: FastAPI, service: _Service) -> None:
    rejected = service.metrics.rejected

    def answer(
        request: Request, status: int, message: str, field: str | None = None, **headers: str
    ) -> JSONResponse:
        content = {"error": message, "field": field, "request_id": request.state.request_id}
        request.state.facts["error"] = message
        return JSONResponse(content, status_code=status, headers=headers)

    @app.exception_handler(RequestError)
    async def wrong_request(request: Request, error: RequestError) -> JSONResponse:
        rejected.labels({413: "too_large", 415: "content_type"}.get(error.status, "bad")).inc()
        return answer(request, error.status, str(error), error.field)

    @app.exception_handler(InvalidInputError)
    async def wrong_input(request: Request, error: InvalidInputError) -> JSONResponse:
        rejected.labels("bad").inc()
        return answer(request, 422, str(error), _field_in(str(error)))

    @app.exception_handler(MissingComponentError)
    async def missing_component(request: Request, error: MissingComponentError) -> JSONResponse:
        rejected.labels("bad").inc()
        return answer(request, 422, str(error))

    @app.exception_handler(RequestValidationError)
    async def wrong_parameters(request: Request, error: RequestValidationError) -> JSONResponse:
        rejected.labels("bad").inc()
        first = error.errors()[0]
        return answer(
            request, 422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", str(first["loc"][-1])
        )

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> JSONResponse:
        return answer(request, error.status_code, str(error.detail), **dict(error.headers or {}))

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> JSONResponse:
        rejected.labels("full").inc()
        wait = str(error.retry_after_seconds)
        return answer(request, 503, f"overloaded: try again in {wait} s", **{"Retry-After": wait})

    @app.exception_handler(Draining)
    async def draining(request: Request, error: Draining) -> JSONResponse:
        rejected.labels("draining").inc()
        return answer(request, 503, "the server is shutting down", **{"Retry-After": "1"})

    @app.exception_handler(_ClientGone)
    async def gone(request: Request, error: _ClientGone) -> JSONResponse:
        rejected.labels("gone").inc()
        return answer(request, 499, "the client has left")


def _field_in(message: str) -> str | None:
    """The field that an error of the library is about: its messages begin with it."""
    first = message.replace(":", " ").split(maxsplit=1)[0]
    return next(
        (name for name in ("body", *FIELDS) if first.startswith(name)), first if "images." in first else None
    )


# --- the page ----------------------------------------------------------------------------------------------


def _add_page(app: FastAPI, service: _Service) -> None:
    from dina_lrm.serving.page import build_page, mount_page

    pipeline = None
    if service.settings.model == "bundled":
        from dina_lrm.shapes.pipeline import load_pipeline

        pipeline = load_pipeline()
    page = build_page(
        service.model,
        run=service.run,
        pipeline=pipeline,
        max_megapixels=service.settings.max_megapixels,
        max_prompt_length=service.settings.max_prompt_length,
    )
    mount_page(app, page)
