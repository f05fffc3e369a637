"""What goes over the wire, what is tried again, what is final; and the client against the server itself."""

import asyncio
import io
import json
import random
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx_retries.retry
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

import dina_lrm
from dina_lrm import AsyncClient, Client, Conditioning, InvalidInputError, PromptWarning, RewardModel
from dina_lrm.errors import ScoringError
from dina_lrm.remote import calls
from tests.local_server import answering

PROMPTS = ["a red circle on a gray background", "a big blue square on a white background"]
Reply = tuple[int, dict[str, str], bytes]


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def tensors(self) -> dict[str, Tensor]:
        return safetensors.torch.load(self.body)

    @property
    def form(self) -> list[tuple[str, bytes]]:
        """Fields in order, read by the standard library's parser of MIME messages."""
        head = f"content-type: {self.headers['content-type']}\r\n\r\n".encode()
        parts: Any = message_from_bytes(head + self.body).get_payload()
        return [
            (part.get_param("name", header="content-disposition"), part.get_payload(decode=True))
            for part in parts
        ]


@dataclass
class Fake:
    """A server that scores by arithmetic: mean of the latent + 10 u + 100 seed; mean red of a picture."""

    url: str
    plan: list[Reply | str] = field(default_factory=list)
    """Answers before it scores; "hang up" closes the connection, "break" does so in the middle of a reply."""
    requests: list[Request] = field(default_factory=list)
    connections: int = 0

    def answer(self, request: Request) -> Reply:
        match request.path:
            case "/healthz":
                return ok({"status": "ok"})
            case "/v1/score":
                t = request.tensors
                scores = t["latents"].double().mean(dim=(1, 2, 3)) + 10 * t["u"] + 100 * t["seeds"]
                return ok({"protocol_version": "1", "raw_scores": scores.tolist()})
            case "/v1/score/images":
                reds = [red(file) for name, file in request.form if name == "images"]
                errors = [value / 100 for value in reds]
                draws = json.loads(request.form[0][1])["num_draws"]
                return ok({"scores": reds, "standard_errors": errors if draws > 1 else None, "notes": []})
            case "/v1/compare":
                a, b = (red(file) for name, file in request.form[1:])
                return ok({"probability": a / (a + b), "scores": [a, b]})
        return 404, {}, b"no such page"


def ok(content: Any) -> Reply:
    return 200, {"content-type": "application/json"}, json.dumps(content).encode()


def red(file: bytes) -> float:
    with Image.open(io.BytesIO(file), formats=["PNG"]) as picture:
        return float(np.asarray(picture)[..., 0].mean())


@pytest.fixture
def fake() -> Iterator[Fake]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            server.connections += 1

        def do_POST(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            request = Request(self.path, headers, body)
            server.requests.append(request)
            reply = server.plan.pop(0) if server.plan else server.answer(request)
            if isinstance(reply, str):
                if reply == "break":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
                self.close_connection = True
                return
            status, extra, content = reply
            self.send_response(status)
            for name, value in ({"content-length": str(len(content))} | extra).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = Fake("")
    with answering(Handler) as server.url:
        yield server


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "DINA_LRM_TOKEN",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
        "no_proxy",
        "NO_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a client would have waited between attempts."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(httpx_retries.retry, "time", types.SimpleNamespace(sleep=found.append))
    monkeypatch.setattr(httpx_retries.retry, "asyncio", types.SimpleNamespace(sleep=sleep))
    return found


Call = Callable[..., Any]
"""(url, method, *arguments, **settings of the client): one method of a client that is closed after."""


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    def sync(url: str, method: str, *arguments: Any, **settings: Any) -> Any:
        with Client(url, **settings) as one:
            return getattr(one, method)(*arguments)

    async def awaited(url: str, method: str, *arguments: Any, **settings: Any) -> Any:
        async with AsyncClient(url, **settings) as one:
            return await getattr(one, method)(*arguments)

    if request.param == "sync":
        return sync
    return lambda *arguments, **settings: asyncio.run(awaited(*arguments, **settings))


def rows(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(count)
    latents = torch.randn(count, 16, 8, 8, generator=generator).to(dtype)
    embeds = torch.randn(count, 5, 12, generator=generator)
    return latents, Conditioning(embeds, torch.randn(count, 6, generator=generator))


def pictures(count: int) -> list[Image.Image]:
    """Of 6 x 4 pixels, the red of each being its place."""
    return [Image.new("RGB", (6, 4), (10 * index + 1, 0, 255)) for index in range(count)]


# --- what is sent, and what comes back ---------------------------------------------------------------------


def test_latents_on_the_wire(call: Call, fake: Fake) -> None:
    latents, conditioning = rows(2, torch.bfloat16)
    scores = call(fake.url, "score_latents", latents.requires_grad_(), conditioning, 0.3, 7, token="Ærø")
    (request,) = fake.requests
    assert request.path == "/v1/score"
    assert request.headers["content-type"] == "application/octet-stream"
    assert request.headers["x-drm-protocol-version"] == "1"
    assert request.headers["authorization"].encode("latin-1") == "Bearer Ærø".encode()
    tensors = request.tensors
    assert sorted(tensors) == ["latents", "pooled_prompt_embeds", "prompt_embeds", "seeds", "u"]
    assert torch.equal(tensors["latents"], latents.detach())
    assert torch.equal(tensors["prompt_embeds"], conditioning.prompt_embeds)
    assert torch.equal(tensors["u"], torch.tensor([0.3, 0.3]))
    assert tensors["seeds"].tolist() == [7, 7]
    expected = latents.detach().double().mean(dim=(1, 2, 3)) + 3 + 700
    torch.testing.assert_close(scores, expected.float())
    assert not scores.requires_grad


@pytest.mark.parametrize(("max_rows", "sizes"), [(3, [3, 3, 1]), (7, [7]), (1, [1] * 7)])
def test_a_batch_goes_in_parts_and_comes_back_in_order(
    call: Call, fake: Fake, max_rows: int, sizes: list[int]
) -> None:
    latents, conditioning = rows(7)
    levels, seeds = torch.linspace(0, 1, 7), [3, 1, 4, 1, 5, 9, 2]
    scores = call(fake.url, "score_latents", latents, conditioning, levels, seeds, max_rows=max_rows)
    expected = latents.double().mean(dim=(1, 2, 3)) + 10 * levels + 100 * torch.tensor(seeds)
    torch.testing.assert_close(scores, expected.float())
    assert [len(one.tensors["latents"]) for one in fake.requests] == sizes
    sent = torch.cat([one.tensors["prompt_embeds"] for one in fake.requests])
    assert torch.equal(sent, conditioning.prompt_embeds)


def test_a_body_stays_below_what_a_server_takes(
    call: Call, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, conditioning = rows(5)
    row_bytes = 4 * (16 * 8 * 8 + 5 * 12 + 6)
    monkeypatch.setattr(calls, "MAX_BODY_BYTES", 2 * row_bytes)
    call(fake.url, "score_latents", latents, conditioning)
    assert [len(one.tensors["latents"]) for one in fake.requests] == [2, 2, 1]
    monkeypatch.setattr(calls, "MAX_BODY_BYTES", 1)
    fake.requests.clear()
    assert call(fake.url, "score", "a", pictures(3)).scores.tolist() == [1.0, 11.0, 21.0]
    assert len(fake.requests) == 3


def test_one_row_of_conditioning_serves_all(call: Call, fake: Fake) -> None:
    latents, _ = rows(3)
    _, one = rows(1)
    call(fake.url, "score_latents", latents, one, max_rows=2)
    sent = torch.cat([request.tensors["prompt_embeds"] for request in fake.requests])
    assert torch.equal(sent, one.prompt_embeds.expand(3, -1, -1))


def test_fresh_noise_sends_no_seeds(call: Call, fake: Fake) -> None:
    fake.plan = [ok({"protocol_version": "1", "raw_scores": [1.5]})]
    assert call(fake.url, "score_latents", *rows(1), 0.4, None).tolist() == [1.5]
    assert "seeds" not in fake.requests[0].tensors


def test_pictures_on_the_wire(call: Call, fake: Fake, tmp_path: Path) -> None:
    files = pictures(3)
    files[1].save(tmp_path / "one.png")
    floats = torch.zeros(3, 4, 6)
    floats[0], floats[2] = 21 / 255, 1.0
    images = [files[0], tmp_path / "one.png", floats]
    found = call(fake.url, "score", ["x", "y", "ż"], images, [0.2, 0.7], [1, 2, 3], max_rows=2)
    assert found.scores.tolist() == [1.0, 11.0, 21.0]
    assert found.scores.dtype == torch.float32
    assert found.standard_errors is None
    first, second = fake.requests
    assert first.path == second.path == "/v1/score/images"
    wanted = {"noise_levels": [0.2, 0.7], "num_draws": 1}
    assert json.loads(first.form[0][1]) == wanted | {"prompts": ["x", "y"], "seed": [1, 2]}
    assert json.loads(second.form[0][1]) == wanted | {"prompts": ["ż"], "seed": [3]}
    assert [name for name, _ in first.form] == ["request", "images", "images"]
    for (_, sent), picture in zip([*first.form[1:], *second.form[1:]], files, strict=True):
        with Image.open(io.BytesIO(sent)) as opened:
            assert np.array_equal(np.asarray(opened), np.asarray(picture))


def test_one_prompt_or_one_picture_serves_all(call: Call, fake: Fake) -> None:
    assert call(fake.url, "score", "x", pictures(2)).scores.tolist() == [1.0, 11.0]
    assert call(fake.url, "score", ["x", "y", "z"], pictures(1)).scores.tolist() == [1.0] * 3
    first, second = (json.loads(one.form[0][1]) for one in fake.requests)
    assert first["prompts"] == ["x", "x"]
    assert second["prompts"] == ["x", "y", "z"]
    assert first["noise_levels"] is None


def test_standard_errors_of_several_draws(fake: Fake) -> None:
    with Client(fake.url, max_rows=1) as one:
        found = one.score("x", pictures(2), num_draws=4)
    assert found.standard_errors is not None
    assert found.standard_errors.tolist() == pytest.approx([0.01, 0.11])


def test_compare(call: Call, fake: Fake) -> None:
    a, b = pictures(3)[1:]
    assert call(fake.url, "compare", "x", a, b, 0.1, 5) == pytest.approx(11 / 32)
    ((name, request), *files) = fake.requests[0].form
    assert fake.requests[0].path == "/v1/compare"
    assert name == "request"
    assert json.loads(request) == {"prompt": "x", "noise_levels": [0.1], "seed": 5}
    assert [name for name, _ in files] == ["image_a", "image_b"]


def test_what_a_server_did_not_see_of_a_prompt_is_said_once(call: Call, fake: Fake) -> None:
    fake.plan = [ok({"scores": [1.0], "notes": ["cut after 'tea'"]})] * 2
    with pytest.warns(PromptWarning, match="cut after 'tea'") as caught:
        call(fake.url, "score", "tea", pictures(2), max_rows=1)
    assert len(caught) == 1
    fake.plan = [ok({"probability": 0.5, "notes": ["unknown: tea"]})]
    with pytest.warns(PromptWarning, match="unknown: tea"):
        call(fake.url, "compare", "tea", *pictures(2))


def test_health(call: Call, fake: Fake, waits: list[float]) -> None:
    assert call(fake.url, "healthy") is True
    fake.plan = [(503, {}, b"")]
    assert call(fake.url, "healthy") is False
    assert [one.path for one in fake.requests] == ["/healthz"] * 2
    assert call(f"http://127.0.0.1:{free_port()}", "healthy") is False
    assert waits == []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def test_connections_are_kept(fake: Fake) -> None:
    latents, conditioning = rows(6)
    with Client(fake.url, max_rows=2) as one:
        assert one.healthy()
        for _ in range(3):
            one.score_latents(latents, conditioning)
        one.compare("x", *pictures(2))
    assert len(fake.requests) == 11
    assert fake.connections == 1
    with pytest.raises(RuntimeError, match="closed"):
        one.healthy()


def test_requests_at_once(fake: Fake) -> None:
    latents, conditioning = rows(8)

    async def gather() -> list[Tensor]:
        async with AsyncClient(fake.url) as one:
            return await asyncio.gather(
                *(
                    one.score_latents(latents[row : row + 1], conditioning.index_select(torch.tensor([row])))
                    for row in range(8)
                )
            )

    with Client(fake.url) as one:
        torch.testing.assert_close(torch.cat(asyncio.run(gather())), one.score_latents(latents, conditioning))


# --- what is tried again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("passing", [408, 429, 500, 502, 503, 504, "hang up", "break"])
def test_what_passes_is_tried_again(call: Call, fake: Fake, waits: list[float], passing: int | str) -> None:
    one: Reply | str = passing if isinstance(passing, str) else (passing, {}, b'{"error": "full"}')
    fake.plan = [one, one]
    latents, conditioning = rows(2)
    scores = call(fake.url, "score_latents", latents, conditioning, 0.0)
    torch.testing.assert_close(scores, latents.mean(dim=(1, 2, 3)))
    first, *others = fake.requests
    assert [other.body for other in others] == [first.body] * 2
    assert len(waits) == 2


def test_forms_are_sent_again_whole(call: Call, fake: Fake, waits: list[float]) -> None:
    fake.plan = [(503, {}, b""), "hang up"]
    assert call(fake.url, "score", "x", pictures(2)).scores.tolist() == [1.0, 11.0]
    assert [len(request.form) for request in fake.requests] == [3, 3, 3]


def test_waits_are_random_and_double(fake: Fake, waits: list[float]) -> None:
    random.seed(0)
    for _ in range(50):
        fake.plan = [(503, {}, b"")] * 4
        with Client(fake.url) as one:
            one.score_latents(*rows(1))
    by_attempt = np.array(waits).reshape(50, 4)
    longest = np.array([1.0, 2.0, 4.0, 8.0])
    assert (by_attempt <= longest).all()
    assert (by_attempt.max(axis=0) > 0.9 * longest).all()
    assert (by_attempt.min(axis=0) < 0.1 * longest).all()


def test_retry_after_is_the_least_wait_up_to_a_minute(call: Call, fake: Fake, waits: list[float]) -> None:
    random.seed(0)
    for _ in range(20):
        fake.plan = [(503, {"Retry-After": "7"}, b""), (429, {"Retry-After": "4000"}, b"")]
        call(fake.url, "score_latents", *rows(1))
    assert all(7 <= seconds <= 8 for seconds in waits[::2])
    assert len(set(waits[::2])) == 20  # all refused at once, they do not come back at once
    assert waits[1::2] == [60.0] * 20


def test_an_overloaded_server_is_given_up(call: Call, fake: Fake, waits: list[float]) -> None:
    fake.plan = [(503, {}, b'{"error": "queue is full"}')] * 9
    with pytest.raises(
        ScoringError, match=r"/v1/score gave no score in 4 attempts, at last: HTTP 503: queue is full"
    ):
        call(fake.url, "score_latents", *rows(1), max_retries=3)
    assert len(fake.requests) == 4
    assert len(waits) == 3


def test_no_server(call: Call, waits: list[float]) -> None:
    port = free_port()
    with pytest.raises(
        ScoringError, match=f"127.0.0.1:{port}/v1/compare gave no score in 3 attempts.*Connect"
    ):
        call(f"http://127.0.0.1:{port}", "compare", "x", *pictures(2), max_retries=2)
    assert len(waits) == 2


def test_a_server_that_says_nothing(call: Call) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ScoringError, match="no score in 1 attempts, at last: ReadTimeout"):
            call(url, "score_latents", *rows(1), timeout_seconds=0.1, max_retries=0)


# --- what is final -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((422, {}, b'{"error": "u: outside [0, 1]", "field": "u"}'), r"HTTP 422: u: outside \[0, 1\]$"),
        ((401, {}, b'{"error": "no token"}'), "HTTP 401: no token; give token=, or set DINA_LRM_TOKEN"),
        ((403, {}, b'{"error": "not you"}'), "HTTP 403: not you"),
        ((404, {}, b"<html>" + b"a" * 400), r"HTTP 404: '<html>a+ \.\.\.'"),
        ((413, {}, b'{"error": 5}'), "HTTP 413: '{\"error\": 5}'"),
        (
            (307, {"location": "https://elsewhere"}, b""),
            "HTTP 307 and points to https://elsewhere: give that",
        ),
    ],
)
def test_refusals_are_the_callers_mistake(
    call: Call, fake: Fake, waits: list[float], reply: Reply, message: str
) -> None:
    fake.plan = [reply]
    with pytest.raises(InvalidInputError, match=message):
        call(fake.url, "score_latents", *rows(2))
    assert len(fake.requests) == 1
    assert waits == []


def test_a_refused_part_is_named(call: Call, fake: Fake) -> None:
    latents, conditioning = rows(5)
    answer = ok({"protocol_version": "1", "raw_scores": [0.0, 1.0]})
    fake.plan = [answer, answer, (422, {}, b'{"error": "latents: too large"}')]
    with pytest.raises(InvalidInputError, match="refuses the rows from 4: HTTP 422: latents: too large"):
        call(fake.url, "score_latents", latents, conditioning, max_rows=2)


@pytest.mark.parametrize(
    ("method", "content", "message"),
    [
        ("score_latents", b"<html>", "which is not JSON"),
        ("score_latents", [1.0, 2.0], "protocol version None"),
        ("score_latents", {"protocol_version": "2", "raw_scores": [1.0, 2.0]}, "protocol version '2'"),
        ("score_latents", {"protocol_version": "1", "raw_scores": [1.0]}, r"\[1.0\]: expected 2 finite"),
        ("score_latents", {"protocol_version": "1", "raw_scores": [1.0, float("nan")]}, "expected 2 finite"),
        ("score_latents", {"protocol_version": "1", "raw_scores": ["1", True]}, "expected 2 finite"),
        ("score", b"[]", r"answers with '\[\]', which is no JSON object"),
        ("score", {"scores": [1.0]}, r"scores = \[1.0\]: expected 2 finite numbers"),
        ("score", {"scores": [1.0, True]}, "expected 2 finite numbers"),
        ("score", {"scores": [1.0, 2.0], "standard_errors": [float("inf"), 0.0]}, r"standard_errors = \[inf"),
        ("compare", {"scores": [1.0, 2.0]}, r"probability = \[None\]"),
        ("compare", {"probability": 1.5}, r"probability = 1.5: expected \[0, 1\]"),
    ],
)
def test_answers_against_the_protocol(
    call: Call, fake: Fake, waits: list[float], method: str, content: Any, message: str
) -> None:
    fake.plan = [(200, {}, content) if isinstance(content, bytes) else ok(content)]
    arguments: dict[str, tuple[Any, ...]] = {
        "score_latents": rows(2),
        "score": ("x", pictures(2)),
        "compare": ("x", *pictures(2)),
    }
    with pytest.raises(ScoringError, match=message):
        call(fake.url, method, *arguments[method])
    assert len(fake.requests) == 1
    assert waits == []


def test_bad_input_is_never_sent(call: Call, fake: Fake, tmp_path: Path) -> None:
    latents, conditioning = rows(4)
    embeds, pooled = conditioning.prompt_embeds, conditioning.pooled_prompt_embeds
    nan = latents.clone()
    nan[3, 0, 0, 0] = torch.nan  # in the last part
    mask = torch.ones(4, 5)
    two = pictures(2)
    cases: list[tuple[str, tuple[Any, ...], str]] = [
        ("score_latents", (nan, conditioning), "latents holds 1 NaN"),
        ("score_latents", (latents[0], conditioning), "latents has shape"),
        ("score_latents", (latents.double(), conditioning), "latents: dtype float64"),
        ("score_latents", (latents, Conditioning(embeds)), "pooled_prompt_embeds are missing"),
        ("score_latents", (latents, Conditioning(embeds * torch.inf, pooled)), "prompt_embeds holds"),
        (
            "score_latents",
            (latents, Conditioning(embeds, pooled, mask.tril())),
            "attention_mask hides tokens",
        ),
        ("score_latents", (latents[:3], conditioning), "4 rows of conditioning for 3 latents"),
        ("score_latents", (latents, conditioning, 1.4), r"noise_level = 1.4 is outside \[0, 1\]"),
        ("score_latents", (latents, conditioning, torch.tensor([0.4])), r"or a tensor \(4,\)"),
        ("score_latents", (latents, conditioning, 0.4, [0]), "1 seeds for 4 samples"),
        ("score_latents", (latents, conditioning, 0.4, 2**63), r"seeds: 9223372036854775808 is outside"),
        ("score", (["x", "y", "z"], two), "3 prompts for 2 images"),
        ("score", ([], two), "no prompts were given"),
        ("score", ("x", []), "no images were given"),
        ("score", ("x", tmp_path / "none.png"), r"missing file: .*none.png"),
        ("score", ("x", torch.zeros(3, 2, 8, 8)[None]), r"image 0 has shape \(3, 2, 8, 8\): .* no videos"),
        ("score", ("x", two, 1.2), r"noise_levels = 1.2 is outside"),
        ("score", ("x", two, []), "noise_levels is empty"),
        ("compare", (" ", *two), "prompt"),
        ("compare", ("x", two, two[0]), "compare takes two images, not 2 and 1"),
    ]
    for method, arguments, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            call(fake.url, method, *arguments, max_rows=1)
    assert fake.requests == []
    with Client(fake.url) as one, pytest.raises(InvalidInputError, match="num_draws = 0: must be at least 1"):
        one.score("x", two, num_draws=0)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_settings_out_of_range(kind: type[Client] | type[AsyncClient]) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("file:///etc/hostname", {}, "url = 'file:///etc/hostname': it must start with http"),
        ("http://", {}, "name a host"),
        ("http://a:port", {}, "not an address"),
        ("http://a", {"timeout_seconds": 0.0}, "timeout_seconds = 0.0: must be above 0"),
        ("http://a", {"max_retries": -1}, "max_retries = -1"),
        ("http://a", {"max_rows": 0}, "max_rows = 0"),
        ("http://a", {"token": "secret\n"}, "token: it must be printable"),
    ]
    for url, settings, message in cases:
        with pytest.raises(InvalidInputError, match=message) as caught:
            kind(url, **settings)
        assert "secret" not in str(caught.value)


def test_where_the_token_comes_from(call: Call, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    call(fake.url, "healthy")
    monkeypatch.setenv("DINA_LRM_TOKEN", "of the environment")
    call(fake.url, "healthy")
    call(fake.url, "healthy", token="given")
    given = [request.headers.get("authorization") for request in fake.requests]
    assert given == [None, "Bearer of the environment", "Bearer given"]
    with Client(fake.url, token="secret") as one:
        assert repr(one) == f"Client({fake.url!r})"


def test_a_proxy_of_the_environment(call: Call, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", fake.url)
    assert call("http://reward.example", "healthy") is False  # the fake is no proxy: it knows no such path
    assert [request.path for request in fake.requests] == ["http://reward.example/healthz"]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert call(fake.url, "healthy") is True
    assert fake.requests[-1].path == "/healthz"


@pytest.mark.parametrize("ending", ["", "/", "/v1/score", "/v1/score/"])
def test_addresses(call: Call, fake: Fake, ending: str) -> None:
    call(fake.url + ending, "score_latents", *rows(1))
    assert fake.requests[0].path == "/v1/score"


# --- the server itself -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward() -> RewardModel:
    return RewardModel.from_pretrained("bundled").requires_grad_(False)


@pytest.fixture(scope="module")
def address(reward: RewardModel) -> Iterator[str]:
    uvicorn = pytest.importorskip("uvicorn")
    from dina_lrm.serving.app import create_app
    from dina_lrm.serving.settings import ServerSettings

    settings = ServerSettings(page=False, max_wait_ms=0.0, token="let me in", max_rows=4)
    server = uvicorn.Server(uvicorn.Config(create_app(settings, reward), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_the_server_says_what_the_library_says(call: Call, address: str, reward: RewardModel) -> None:
    def ask(method: str, *arguments: Any) -> Any:
        return call(address, method, *arguments, token="let me in", max_rows=2)

    assert ask("healthy")
    latents = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    conditioning = reward.encode_prompts([*PROMPTS, PROMPTS[0]])
    levels, seeds = torch.tensor([0.1, 0.4, 0.9]), [5, -7, 6]
    torch.testing.assert_close(
        ask("score_latents", latents, conditioning, levels, seeds),
        reward.score_latents(latents, conditioning, levels, seed=seeds),
        rtol=1e-6,
        atol=1e-5,
    )
    pixels = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(4))
    several = list(pixels.to(torch.uint8))
    for levels_of_pictures in (None, 0.3, [0.2, 0.6]):
        torch.testing.assert_close(
            ask("score", PROMPTS[0], several, levels_of_pictures, seeds).scores,
            reward.score(PROMPTS[0], several, levels_of_pictures, seeds).scores,
            rtol=1e-6,
            atol=1e-5,
        )
    compared = ask("compare", PROMPTS[1], several[0], several[1], 0.3, 2)
    assert compared == pytest.approx(reward.compare(PROMPTS[1], several[0], several[1], 0.3, 2), abs=1e-5)


def test_what_the_server_refuses(call: Call, address: str, waits: list[float]) -> None:
    with pytest.raises(InvalidInputError, match="a bearer token is needed; give token="):
        call(address, "score_latents", *rows(1))
    with pytest.raises(InvalidInputError, match=r"prompt_embeds have width 12, this sd3 backbone takes"):
        call(address, "score_latents", *rows(1), token="let me in")
    with pytest.raises(InvalidInputError, match="5 in one request, at most 4 are taken"):
        call(address, "score_latents", *rows(5), token="let me in")
    assert waits == []


def test_the_package_names_both() -> None:
    assert dina_lrm.Client is Client
    assert dina_lrm.AsyncClient is AsyncClient
