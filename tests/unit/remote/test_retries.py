"""What is tried again, how long the client waits, and what is given up."""

import random
import socket
from typing import Any

import numpy as np
import pytest
import torch

from dina_lrm import Client, InvalidInputError
from dina_lrm.errors import ScoringError
from tests.unit.remote.fake import Call, Fake, Reply, free_port, ok, pictures, rows


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
    with pytest.raises(ScoringError, match=r"/v1/score .* 4 attempts.* HTTP 503: queue is full"):
        call(fake.url, "score_latents", *rows(1), max_retries=3)
    assert len(fake.requests) == 4
    assert len(waits) == 3


def test_no_server(call: Call, waits: list[float]) -> None:
    port = free_port()
    with pytest.raises(ScoringError, match=f"127.0.0.1:{port}/v1/compare .* 3 attempts.*Connect"):
        call(f"http://127.0.0.1:{port}", "compare", "x", *pictures(2), max_retries=2)
    assert len(waits) == 2


def test_a_server_that_says_nothing(call: Call) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ScoringError, match=r"1 attempts.* ReadTimeout"):
            call(url, "score_latents", *rows(1), timeout_seconds=0.1, max_retries=0)


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
    with pytest.raises(InvalidInputError, match=r"rows from 4.* HTTP 422: latents: too large"):
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
