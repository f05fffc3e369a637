"""The reward server: the latent protocol, scores of pictures, comparisons, and the page.

    app = create_app(ServerSettings(model=("bundled",)))    # an ASGI application, for uvicorn or Ray Serve

One thread holds a model. Pieces of all requests meet in its `MicroBatcher`; what a request may cost is in
`ServerSettings`, and what it has cost is told by the log line and by /metrics. Nothing that a client sends is
unpickled or used as a path.
"""

import secrets
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, cast

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from dina_lrm import __version__
from dina_lrm.errors import InvalidInputError, MissingComponentError
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.models.scoring import preference_probability
from dina_lrm.remote.protocol import CONTENT_TYPE, FIELDS, PROTOCOL_VERSION, VERSION_HEADER, unpack
from dina_lrm.serving.batching import Draining, QueueFull
from dina_lrm.serving.bodies import LARGE_BYTES, check_content_type, form_schema, read_body, read_pictures
from dina_lrm.serving.callers import CallerFull
from dina_lrm.serving.middleware import ServerMiddleware
from dina_lrm.serving.pictures import EncodedPicture, picture_header
from dina_lrm.serving.schemas import (
    CompareReply,
    CompareRequest,
    ErrorReply,
    ImageScores,
    ImagesRequest,
    LatentScores,
    ModelList,
    RequestError,
    Status,
    check_prompt,
    levels_of,
    paired,
)
from dina_lrm.serving.served import PictureRow, load_models
from dina_lrm.serving.service import ClientGone, RowScore, Service
from dina_lrm.serving.settings import ServerSettings

__all__ = ["create_app", "pictures_of"]

_LIMITS = ("max_", "header_seconds", "body_seconds")
_REASONS = {408: "too_slow", 413: "too_large", 415: "content_type", 503: "full"}


def create_app(
    settings: ServerSettings,
    model: RewardModel | Mapping[str, RewardModel] | None = None,
    *,
    names_requests: bool = True,
    metrics_text: Callable[[bytes], Awaitable[bytes]] | None = None,
) -> FastAPI:
    """The application; its models are warm before it takes the first request.

    Args:
        model: served instead of those that `settings` names; several by name.
        names_requests: whether answers carry x-request-id; not where a proxy adds it.
        metrics_text: what /metrics says, of what this process would say.
    """
    if isinstance(model, RewardModel):
        model = {settings.models[0][0]: model}
    service = Service(settings, load_models(settings) if model is None else dict(model))

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
                (403, "Called by another name, or from another site"),
                (408, "The body comes too slowly"),
                (413, "Too large: the limit is named, see /v1/models"),
                (415, "Another content type"),
                (422, "A field is wrong; it is named"),
                (429, "This caller has too many rows waiting: see Retry-After"),
                (503, "Overloaded: see Retry-After"),
            )
        },
    )
    app.state.service = service
    _add_routes(app, service, metrics_text)
    if settings.adapters:
        from dina_lrm.serving.adapters import add_adapters

        add_adapters(app, service)
    _add_errors(app, service)
    methods = {
        route.path: tuple(sorted(route.methods or ())) for route in app.routes if isinstance(route, APIRoute)
    }
    app.add_middleware(_Methods, methods=methods)
    app.add_middleware(
        ServerMiddleware,
        settings=settings,
        login=service.login,
        metrics=service.metrics,
        closing=service.closing,
        names_requests=names_requests,
    )
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


class _RawRoute(APIRoute):
    """A route that reads the request and makes the answer by itself: FastAPI only documents it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def _add_routes(
    app: FastAPI, service: Service, metrics_text: Callable[[bytes], Awaitable[bytes]] | None
) -> None:
    settings = service.settings
    version_header = {"name": VERSION_HEADER, "in": "header", "required": True, "schema": {"enum": ["1"]}}
    model_query = {"name": "model", "in": "query", "schema": {"type": "string"}}

    async def score_latents(request: Request) -> Response:
        """Scores of clean latents, each at its own noise level: the latent protocol, version 1."""
        version = request.headers.get(VERSION_HEADER)
        if version != PROTOCOL_VERSION:
            raise RequestError(
                f"{VERSION_HEADER}: {str(version)[:40]!r}, this server speaks {PROTOCOL_VERSION!r}",
                field=VERSION_HEADER,
            )
        check_content_type(request, (CONTENT_TYPE,))
        served = service.find_for(request)
        served.batcher.check_room(1, 0.0)
        body = await read_body(request)
        latents = await to_thread.run_sync(unpack, body) if len(body) > LARGE_BYTES else unpack(body)
        del body
        served.check_count(len(latents), "latents")
        fresh = [secrets.randbits(62) for _ in range(len(latents))] if latents.seeds is None else ()
        rows = served.engine.latent_rows(latents, fresh)
        scores = await service.score(request, served, rows, "latents")
        return JSONResponse(
            {"protocol_version": PROTOCOL_VERSION, "raw_scores": [score.score for score in scores]}
        )

    app.router.add_api_route(
        "/v1/score",
        score_latents,
        methods=["POST"],
        route_class_override=_RawRoute,
        response_model=LatentScores,
        openapi_extra={
            "parameters": [version_header, model_query],
            "requestBody": {
                "required": True,
                "description": "safetensors bytes: latents, prompt_embeds, pooled_prompt_embeds, u, seeds",
                "content": {CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}}},
            },
        },
    )

    @app.post(
        "/v1/score/images",
        response_model=ImageScores,
        openapi_extra=form_schema(ImagesRequest, several="images"),
    )
    async def score_images(request: Request) -> ImageScores:
        """Scores of pictures, sent as base64 in JSON, or as files `images` of a form beside `request`, which
        holds the same JSON without them."""
        wanted, files = await read_pictures(request, ImagesRequest, several=("images",))
        served = service.find_for(request, wanted.model)
        served.check_count(len(files["images"]), "images")
        prompts, seeds = paired(wanted.prompts, wanted.seed, len(files["images"]), settings.max_prompt_length)
        levels = levels_of(wanted.noise_levels, served.model.config.noise_levels)
        pictures = await pictures_of(files["images"], "images", settings)
        rows = [
            PictureRow(picture, prompt, levels, seed, wanted.num_draws)
            for picture, prompt, seed in zip(pictures, prompts, seeds, strict=True)
        ]
        scores = await service.score(request, served, rows, "images")
        errors = [score.standard_error for score in scores if score.standard_error is not None]
        return ImageScores(
            scores=[score.score for score in scores],
            standard_errors=errors or None,
            noise_levels=list(levels),
            notes=_notes(scores),
            model=served.name,
        )

    @app.post(
        "/v1/compare",
        response_model=CompareReply,
        openapi_extra=form_schema(CompareRequest, single=("image_a", "image_b")),
    )
    async def compare(request: Request) -> CompareReply:
        """Probability that one picture is preferred to another, both seen through the same noise."""
        wanted, files = await read_pictures(request, CompareRequest, single=("image_a", "image_b"))
        served = service.find_for(request, wanted.model)
        check_prompt(wanted.prompt, "prompt", settings.max_prompt_length)
        levels = levels_of(wanted.noise_levels, served.model.config.noise_levels)
        rows = [
            PictureRow(
                picture_header(files[name][0], settings.max_megapixels, name),
                wanted.prompt,
                levels,
                wanted.seed,
                1,
            )
            for name in ("image_a", "image_b")
        ]
        a, b = await service.score(request, served, rows, "image_a")
        return CompareReply(
            probability=preference_probability(a.score - b.score, levels, served.model.config),
            scores=(a.score, b.score),
            noise_levels=list(levels),
            notes=_notes([a]),
            model=served.name,
        )

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> ModelList:
        """Which rewards there are, and what a request may cost."""
        limits = {name: value for name, value in vars(settings).items() if name.startswith(_LIMITS)}
        return ModelList(
            version=__version__, models=[model.info() for model in service.models.values()], limits=limits
        )

    @app.get("/healthz", response_model=Status)
    async def healthz() -> Response:
        """200 when a score can be served."""
        return _status(service, service.healthy, "ok", "not ready" if not service.warm else "stalled")

    @app.get("/readyz", response_model=Status)
    async def readyz() -> Response:
        """200 when the server has room for more."""
        return _status(service, service.ready, "ready", "full" if service.healthy else "not ready")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        text = service.metrics.text()
        if metrics_text is not None:
            text = await metrics_text(text)
        return Response(text, media_type="text/plain; version=1.0.0; charset=utf-8")


async def pictures_of(files: Sequence[bytes], name: str, settings: ServerSettings) -> list[EncodedPicture]:
    """Pictures of a request, with their sizes read; InvalidInputError names the first that is none."""
    return await to_thread.run_sync(
        lambda: [
            picture_header(file, settings.max_megapixels, f"{name}.{index}")
            for index, file in enumerate(files)
        ]
    )


def _status(service: Service, good: bool, word: str, otherwise: str) -> Response:
    status = Status(status=word if good else otherwise, model=service.first.name, queued=service.queued)
    return JSONResponse(status.model_dump(), status_code=200 if good else 503)


def _notes(scores: Sequence[RowScore]) -> list[str]:
    return list(dict.fromkeys(note for score in scores for note in score.notes))


class _Methods:
    """ASGI middleware: another method than a route's is 405, also where the page answers for all other
    paths, and HEAD is GET without its body."""

    def __init__(self, app: ASGIApp, *, methods: Mapping[str, Sequence[str]]) -> None:
        self.app, self.methods = app, methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            allowed = self.methods.get(scope["path"].removeprefix(scope.get("root_path", "")))
            method = scope["method"]
            if allowed is not None and method not in allowed:
                if method == "HEAD" and "GET" in allowed:
                    return await self.app({**scope, "method": "GET"}, receive, send)
                content = {
                    "error": "Method Not Allowed",
                    "field": None,
                    "request_id": scope["state"]["request_id"],
                }
                answer = JSONResponse(content, status_code=405, headers={"allow": ", ".join(allowed)})
                return await answer(scope, receive, send)
        await self.app(scope, receive, send)


# --- errors ------------------------------------------------------------------------------------------------


def _add_errors(app: FastAPI, service: Service) -> None:
    rejected = service.metrics.rejected

    def answer(
        request: Request, status: int, message: str, field: str | None = None, **headers: str
    ) -> JSONResponse:
        content = {"error": message, "field": field, "request_id": request.state.request_id}
        request.state.facts["error"] = message[:500]
        return JSONResponse(content, status_code=status, headers=headers)

    @app.exception_handler(RequestError)
    async def wrong_request(request: Request, error: RequestError) -> JSONResponse:
        rejected.labels(_REASONS.get(error.status, "bad")).inc()
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

    @app.exception_handler(CallerFull)
    async def caller_full(request: Request, error: CallerFull) -> JSONResponse:
        rejected.labels("caller_full").inc()
        return answer(request, 429, str(error), **{"Retry-After": "1"})

    @app.exception_handler(Draining)
    async def draining(request: Request, error: Draining) -> JSONResponse:
        rejected.labels("draining").inc()
        return answer(request, 503, "the server is shutting down", **{"Retry-After": "1"})

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> JSONResponse:
        rejected.labels("gone").inc()
        return answer(request, 499, "the client has left")


def _field_in(message: str) -> str | None:
    """The field that an error of the library is about: its messages begin with it."""
    if message.startswith("'"):  # one that there is not
        return message[1:].partition("'")[0]
    first = message.replace(":", " ").split(maxsplit=1)[0]
    return next(
        (name for name in ("body", *FIELDS) if first.startswith(name)),
        first if first.startswith(("images.", "image_")) else None,
    )


# --- the page ----------------------------------------------------------------------------------------------


@cache
def _bundled_pipeline() -> Any:
    """One for all apps of the process: each reload makes another app."""
    from dina_lrm.shapes.pipeline import load_pipeline

    return load_pipeline()


def _add_page(app: FastAPI, service: Service) -> None:
    from dina_lrm.serving.page import build_page, mount_page

    pipeline = _bundled_pipeline() if service.settings.models[0][1] == "bundled" else None
    page = build_page(
        cast(
            RewardModel, weakref.proxy(service.first.model)
        ),  # Gradio's app outlives the server's, as the service does
        run=service.run,
        pipeline=pipeline,
        max_megapixels=service.settings.max_megapixels,
        max_prompt_length=service.settings.max_prompt_length,
    )
    mount_page(app, page)
