"""The labelling page: pictures by number, votes in, the next pair out, and what came of it all.

    labelling = Labelling(items, store, raters_per_pair=2)
    app = create_app(labelling)                                          # an ASGI application, for uvicorn

A vote is answered with 200 only after the store has committed it. Nothing that a client sends is used as a
path; pictures are decoded and written anew, so what a browser gets is a PNG whatever lay in the file.
"""

import hmac
import io
import logging
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from anyio import to_thread
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from dina_lrm.data.pairs import load_image
from dina_lrm.errors import InvalidInputError
from dina_lrm.serving.bodies import read_json
from dina_lrm.serving.labelling.agreement import results
from dina_lrm.serving.labelling.choice import next_pairs, rater_order
from dina_lrm.serving.labelling.estimates import Estimates
from dina_lrm.serving.labelling.guard import HEALTH_PATH, Guard, error_answer, page_file
from dina_lrm.serving.labelling.items import Items
from dina_lrm.serving.labelling.store import Choice, Vote, VoteConflict, VoteStore, rater_name
from dina_lrm.serving.schemas import RequestError

__all__ = ["Labelling", "create_app"]

log = logging.getLogger("dina_lrm.serving.labelling")

MAX_SIDE = 2048
"""Pixels; larger pictures are shrunk for the page."""
KEPT_PICTURES = 64
"""Encoded ones, in memory."""
RESULTS_HEADER = "x-results-key"
"""With which the page of results shows its key."""

_PAGES = {
    "/": ("label.html", "text/html"),
    "/results": ("results.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/label.js": ("label.js", "text/javascript"),
    "/results.js": ("results.js", "text/javascript"),
}


MAX_SECONDS = 366 * 86_400.0
"""Longest time to a vote: a page may be left open for long."""


class VoteRequest(BaseModel):
    """A choice, as the page sends it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    items: str
    """Fingerprint of the items that the page was showing."""
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Made by the page, so that a vote can be sent again."""
    rater: str
    pair: int
    left: int
    """Number of the picture that stood on the left."""
    choice: Choice
    seconds: Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]


class UndoRequest(BaseModel):
    """A vote to take back."""

    model_config = ConfigDict(extra="forbid", strict=True)
    items: str
    rater: str
    vote: str
    """Its id."""


class Labelling:
    """Items, votes, and who is looking at what.

    Args:
        raters_per_pair: votes that each pair should get.
        seed: of everything that is left to chance.
        estimates: what a reward expects of the pairs; None leaves the order to chance.

    Raises:
        InvalidInputError: the store holds votes on other items.
    """

    def __init__(
        self,
        items: Items,
        store: VoteStore,
        *,
        raters_per_pair: int = 2,
        seed: int = 0,
        estimates: Estimates | None = None,
    ) -> None:
        if raters_per_pair < 1:
            raise InvalidInputError(f"raters_per_pair = {raters_per_pair}: must be at least 1")
        store.bind(items)
        self.items, self.store = items, store
        self.raters_per_pair, self.seed = raters_per_pair, seed
        self.estimates = estimates
        self.unreadable: dict[int, str] = {}
        """Pairs with a picture that cannot be decoded, and why; found when they were to be shown."""
        self._shown: dict[str, int] = {}
        self._lock = threading.Lock()
        self.picture = lru_cache(maxsize=KEPT_PICTURES)(self._encoded)

    def task(self, rater: str) -> dict[str, Any]:
        """What a rater's page shows: the pair, progress, and the vote that could be taken back.

        The pair that was shown last is shown again until it is answered.
        """
        rater = self.store.spelling(rater)
        given, counts = self.store.given_by(rater), self.store.counts()
        chance, a_left = rater_order(self.seed, rater, len(self.items.pairs))
        with self._lock:
            order = self._order(rater, given, counts, chance)
            current = self._shown.get(rater)
            if current in order:
                order = [current, *(pair for pair in order if pair != current)]
            order = self._readable(order)
            self._shown.pop(rater, None)
            if order:
                self._shown[rater] = order[0]
        shown = [self._sides(pair, bool(a_left[pair])) for pair in order[:2]]
        usable = len(self.items.pairs) - len(self.unreadable)
        wanted = self.raters_per_pair
        readable = [count for pair, count in counts.items() if pair not in self.unreadable]
        return {
            "items": self.items.fingerprint,
            "rater": rater,
            "done": len(given),
            "left": len(order),
            "votes": sum(min(count, wanted) for count in readable),
            "wanted": wanted * usable,
            "pair": shown[0] if shown else None,
            "preload": [shown[1]["left"], shown[1]["right"]] if len(shown) > 1 else [],
            "last_vote": list(given.values())[-1] if given else None,
        }

    def vote(self, request: VoteRequest) -> dict[str, Any]:
        """Keep a vote, and say what comes next."""
        self._check_items(request.items)
        rater = rater_name(request.rater)
        if not 0 <= request.pair < len(self.items.pairs):
            raise InvalidInputError(f"pair = {request.pair}: must be in [0, {len(self.items.pairs) - 1}]")
        pair = self.items.pairs[request.pair]
        if request.left not in (pair.a, pair.b):
            raise InvalidInputError(f"left = {request.left}: pair {request.pair} has no such picture")
        self.store.record(
            Vote(
                id=request.id,
                rater=rater,
                pair=request.pair,
                left_side="a" if request.left == pair.a else "b",
                choice=request.choice,
                seconds=request.seconds,
            )
        )
        return self.task(rater)

    def undo(self, request: UndoRequest) -> dict[str, Any]:
        """Take a vote back, and show its pair again."""
        self._check_items(request.items)
        rater = self.store.spelling(rater_name(request.rater))
        pair = self.store.undo(rater, request.vote)
        with self._lock:
            self._shown[rater] = pair
        return self.task(rater)

    def results(self) -> dict[str, Any]:
        """For the page of results."""
        found = asdict(results(self.store.votes()))
        counts = self.store.counts()
        return found | {
            "items": self.items.path.name,
            "pairs": len(self.items.pairs),
            "raters_per_pair": self.raters_per_pair,
            "pairs_begun": len(counts),
            "pairs_finished": sum(count >= self.raters_per_pair for count in counts.values()),
            "rejected_rows": len(self.items.rejects),
            "unreadable": [
                {"pair": pair, "reason": reason} for pair, reason in sorted(self.unreadable.items())
            ],
            "reward": None if self.estimates is None else self.estimates.status,
        }

    def _order(
        self, rater: str, given: dict[int, str], counts: dict[int, int], chance: NDArray[np.float64]
    ) -> list[int]:
        total = len(self.items.pairs)
        seen, votes, shown = np.zeros(total, bool), np.zeros(total, np.int64), np.zeros(total, np.int64)
        seen[list(given)] = True
        seen[list(self.unreadable)] = True
        votes[list(counts)] = list(counts.values())
        for other, pair in self._shown.items():
            shown[pair] += other != rater
        return next_pairs(
            seen=seen,
            votes=votes,
            shown=shown,
            wanted=self.raters_per_pair,
            probability=None if self.estimates is None else self.estimates.probability,
            chance=chance,
        ).tolist()

    def _readable(self, order: Sequence[int]) -> list[int]:
        """Without the pairs at the front that have a picture which cannot be shown."""
        for position, index in enumerate(order):
            pair = self.items.pairs[index]
            try:
                self.picture(pair.a)
                self.picture(pair.b)
            except InvalidInputError as error:
                self.unreadable[index] = str(error)
            else:
                return list(order[position:])
        return []

    def _sides(self, index: int, a_left: bool) -> dict[str, Any]:
        pair = self.items.pairs[index]
        left, right = (pair.a, pair.b) if a_left else (pair.b, pair.a)
        return {"index": index, "prompt": pair.prompt, "left": left, "right": right}

    def _encoded(self, number: int) -> bytes:
        picture = load_image(self.items.pictures[number])
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        picture.save(stream, "PNG", compress_level=1)
        return stream.getvalue()

    def _check_items(self, fingerprint: str) -> None:
        if fingerprint != self.items.fingerprint:
            raise VoteConflict("this vote is on other items than those that are being labelled now")


def create_app(
    labelling: Labelling,
    *,
    token: str | None = None,
    hosts: Sequence[str] = (),
    local_hosts: Sequence[str] = (),
    root_path: str = "",
) -> FastAPI:
    """The application; everything but the labelling as in `Guard`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, token=token, hosts=hosts, local_hosts=local_hosts, root_path=root_path)
    for path, (name, kind) in _PAGES.items():
        app.add_api_route(path, _page(name, kind), include_in_schema=False)

    @app.get("/pictures/{number}")
    def picture(request: Request, number: int) -> Response:
        """A picture as PNG."""
        if not 0 <= number < len(labelling.items.pictures):
            raise HTTPException(404, f"picture {number}: there are {len(labelling.items.pictures)}")
        etag = f'"{labelling.items.fingerprint}-{number}"'
        headers = {"etag": etag, "cache-control": "private, no-cache"}
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        try:
            content = labelling.picture(number)
        except InvalidInputError as error:  # whose message names the file, and so perhaps the answer
            raise HTTPException(422, f"picture {number} cannot be shown") from error
        return Response(content, media_type="image/png", headers=headers)

    @app.get("/api/next")
    def task(rater: Annotated[str, Query()]) -> dict[str, Any]:
        """The pair that a rater is to look at."""
        return labelling.task(rater_name(rater))

    @app.post("/api/votes")
    async def vote(request: Request) -> dict[str, Any]:
        """Keep a vote; 200 means that it is on disk."""
        return await to_thread.run_sync(labelling.vote, await read_json(request, VoteRequest))

    @app.post("/api/undo")
    async def undo(request: Request) -> dict[str, Any]:
        """Take a vote back."""
        return await to_thread.run_sync(labelling.undo, await read_json(request, UndoRequest))

    @app.get("/api/results")
    def found(request: Request) -> dict[str, Any]:
        """What came of it so far, for whoever holds the key: raters are not to see one another's answers,
        nor the names of files."""
        given = request.headers.get(RESULTS_HEADER, "").encode("latin-1")
        if not hmac.compare_digest(given, labelling.store.results_key.encode()):
            raise HTTPException(403, f"{RESULTS_HEADER}: the key is missing or wrong")
        return labelling.results()

    @app.get(HEALTH_PATH)
    def health() -> dict[str, str]:
        """200 when votes can be read and written."""
        labelling.store.check()
        return {"status": "ok"}

    @app.exception_handler(RequestError)
    async def wrong(request: Request, error: RequestError) -> Response:
        return error_answer(error.status, str(error))

    @app.exception_handler(InvalidInputError)
    async def refuse(request: Request, error: InvalidInputError) -> Response:
        return error_answer(409 if isinstance(error, VoteConflict) else 422, str(error))

    @app.exception_handler(sqlite3.Error)
    async def not_kept(request: Request, error: sqlite3.Error) -> Response:
        log.error("%s: %s", labelling.store.path, error)
        return error_answer(503, f"the file of votes cannot be used: {error}")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return error_answer(422, f"{field}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        return error_answer(error.status_code, str(error.detail))

    return app


def _page(name: str, kind: str) -> Any:
    content = page_file(name)

    def page() -> Response:
        return HTMLResponse(content) if kind == "text/html" else Response(content, media_type=kind)

    return page
