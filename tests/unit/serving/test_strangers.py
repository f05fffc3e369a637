"""What strangers try, on a real socket: endless headers, slow bodies, idle connections, floods, leaving."""

import base64
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from dina_lrm import RewardModel
from dina_lrm.serving import service as service_module
from dina_lrm.serving.app import create_app
from dina_lrm.serving.pictures import open_picture
from dina_lrm.serving.settings import ServerSettings
from tests.unit.serving.conftest import HEADERS, PROMPTS, calling, form, listening, png

Tensors = dict[str, Tensor]

SETTINGS = ServerSettings(
    page=False, max_wait_ms=0.0, header_seconds=0.5, body_seconds=0.5, max_body_mib=2.0, max_inflight_mib=4.0
)


@pytest.fixture(scope="module")
def port(reward: RewardModel) -> Iterator[int]:
    with listening(SETTINGS, reward) as port:
        yield port


def opened(port: int, *parts: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    for part in parts:
        connection.sendall(part)
    return connection


def heard(connection: socket.socket) -> bytes:
    """All that is answered until the server closes."""
    found = b""
    try:
        while more := connection.recv(65536):
            found += more
    except ConnectionResetError:
        pass
    return found


def sent_until_closed(connection: socket.socket, part: bytes, most: int, *, pause: float = 0.0) -> int:
    """How often a part could be sent."""
    for count in range(most):
        try:
            connection.sendall(part)
        except OSError:
            return count
        time.sleep(pause)
    return most


def head(length: int, *more: str) -> bytes:
    lines = ["POST /v1/score HTTP/1.1", "host: 127.0.0.1", f"content-length: {length}", *more]
    lines += [f"{name}: {value}" for name, value in HEADERS.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def probe(port: int) -> None:
    """It answers, and says that all is well."""
    assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=10).status_code == 200


def metric(port: int, start: str) -> float:
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(start))


# --- connections -------------------------------------------------------------------------------------------


def test_an_endless_header_is_cut_off(port: int) -> None:
    with opened(port, b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\nx-a: ") as connection:
        assert sent_until_closed(connection, b"a" * 65536, 1000) < 128
    probe(port)


def test_a_header_that_is_too_large_is_told_so(port: int) -> None:
    with opened(port, b"GET / HTTP/1.1\r\nx-a: " + b"a" * 40_000) as connection:
        answer = heard(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"headers are too large" in answer


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\nx-a: " + b"a" * 60_000,
        b"GET /healthz?" + b"a" * 60_000 + b" HTTP/1.1\r\nhost: 127.0.0.1",
        b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1" + b"\r\nx-a: 12345" * 4000,
    ],
    ids=["header", "query", "lines"],
)
def test_a_header_that_is_complete_and_too_large_is_refused(port: int, request_head: bytes) -> None:
    with opened(port, request_head + b"\r\n\r\n") as connection:
        answer = heard(connection)
    assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))  # by how the system cuts it into pieces


def test_a_body_has_one_length(port: int) -> None:
    """What one of two servers takes for the end of a body is another request for the other."""
    body = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    with opened(port, head(len(body), "transfer-encoding: chunked"), body) as connection:
        answer = heard(connection)  # until the server closes
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://127.0.0.1/v1/models", 200),
        ("HTTP://localhost:80/v1/models?x=1", 200),
        ("http://evil.example/v1/models", 403),
        ("http://127.0.0.1", 404),
    ],
)
def test_a_target_may_name_the_host(port: int, target: str, status: int) -> None:
    """As clients send it that take the server for a proxy; the host in it goes before the header."""
    with opened(
        port, f"GET {target} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode()
    ) as one:
        assert heard(one).startswith(f"HTTP/1.1 {status}".encode())


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\nx-a"])
def test_a_connection_that_does_not_say_what_it_wants_is_closed(port: int, first: bytes) -> None:
    started = time.monotonic()
    with opened(port, first) as connection:
        answer = heard(connection)
    assert time.monotonic() - started > 0.4
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_header_that_trickles_is_closed(port: int) -> None:
    with opened(port, b"GET /healthz HTTP/1.1\r\nx-a: ") as connection:
        assert sent_until_closed(connection, b"a", 100, pause=0.05) < 100


def test_a_body_that_trickles_is_refused(port: int) -> None:
    """The client stops a little before it is refused: bytes that cross an answer on its way can cost it."""
    started = time.monotonic()
    with opened(port, head(1_000_000)) as connection:
        while time.monotonic() - started < 0.8 * SETTINGS.body_seconds:
            connection.sendall(b"a")
            time.sleep(0.05)
        answer = heard(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"field":"body"' in answer
    assert b"connection: close" in answer


def test_a_body_that_comes_slowly_but_steadily_is_taken(port: int, tensors: Tensors) -> None:
    large = {
        name: torch.cat([value] * 40) if name != "u" else torch.full((80,), 0.4)
        for name, value in tensors.items()
    }
    body = save(large)
    with opened(port, head(len(body))) as connection:
        for start in range(0, len(body), 2**18):
            connection.sendall(body[start : start + 2**18])
            time.sleep(0.3)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_a_body_that_nobody_reads_does_not_keep_its_connection(reward: RewardModel) -> None:
    settings = replace(SETTINGS, token="secret")
    with listening(settings, reward) as port, opened(port, head(1_000_000)) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 401")
        assert sent_until_closed(connection, b"a", 100, pause=0.05) < 100


def test_a_connection_is_kept_between_requests(port: int) -> None:
    request = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    with opened(port) as connection:
        for _ in range(3):
            connection.sendall(request)
            answer = b""
            while b"queued" not in answer:
                answer += connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.7)  # longer than a header may take


def test_more_connections_than_allowed_are_refused_and_it_is_logged(
    reward: RewardModel, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(replace(SETTINGS, max_connections=5, header_seconds=30.0), reward) as port:
        logging.getLogger("uvicorn.error").propagate = True
        held = [opened(port) for _ in range(5)]
        time.sleep(0.2)
        with opened(port, b"GET /healthz HTTP/1.1\r\n\r\n") as one_more:
            answer = heard(one_more)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after" in answer
        for one in held:
            one.close()
        time.sleep(0.2)
        probe(port)
    assert any("further ones are refused" in record.getMessage() for record in caplog.records)


def test_bytes_under_way_are_bounded(reward: RewardModel, tensors: Tensors) -> None:
    """Six unfinished bodies of 1.5 MB where 4 MiB are allowed: two are waited for, the others are told to
    come again. The time for a body is long enough for a busy machine to read all six."""
    with listening(replace(SETTINGS, body_seconds=3.0), reward) as port:
        bodies = [opened(port, head(2_000_000), b"a" * 1_500_000) for _ in range(6)]
        answers = [heard(one) for one in bodies]
        for one in bodies:
            one.close()
        statuses = sorted(answer.split()[1] for answer in answers if answer)
        assert statuses[-1] == b"503"
        assert statuses.count(b"503") >= 3
        probe(port)
        assert metric(port, "dina_lrm_inflight_bytes") == 0
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/score", content=save(tensors), headers=HEADERS)
        assert reply.status_code == 200


def test_a_client_that_leaves_in_mid_body_is_no_fault_of_the_server(port: int) -> None:
    for _ in range(5):
        opened(port, head(100_000), b"abc").close()
    for _ in range(200):
        if metric(port, 'dina_lrm_rejected_total{reason="gone"}') >= 5:
            break
        time.sleep(0.02)
    assert metric(port, 'dina_lrm_rejected_total{reason="gone"}') >= 5
    assert metric(port, 'dina_lrm_rejected_total{reason="fault"}') == 0
    assert metric(port, 'dina_lrm_requests_total{route="/v1/score",status="500"}') == 0


# --- work --------------------------------------------------------------------------------------------------


def test_a_heavy_request_that_is_allowed_keeps_nobody_waiting(
    reward: RewardModel, tensors: Tensors, pictures: list[bytes]
) -> None:
    heavy = {
        "prompts": PROMPTS[0],
        "images": [base64.b64encode(pictures[i % 3]).decode() for i in range(4)],
        "num_draws": 5,
        "noise_levels": [0.1 * (i + 1) for i in range(8)],
    }
    with listening(replace(SETTINGS, max_pass_seconds=0.2), reward) as port:
        url, served = f"http://127.0.0.1:{port}", 0
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.post, f"{url}/v1/score/images", json=heavy, timeout=120)
            while not httpx.get(f"{url}/healthz").json()["queued"]:
                assert not answer.done()
            while not answer.done():
                reply = httpx.post(f"{url}/v1/score", content=save(tensors), headers=HEADERS, timeout=60)
                assert reply.status_code == 200
                served += 1
                probe(port)
    assert answer.result().status_code == 200
    expected = reward.score(
        PROMPTS[0],
        [pictures[i % 3] for i in range(4)],
        noise_levels=heavy["noise_levels"],
        seed=0,
        num_draws=5,
    )
    torch.testing.assert_close(
        torch.tensor(answer.result().json()["scores"]), expected.scores, rtol=1e-6, atol=1e-5
    )
    assert served > 2, "others, one after another, while the heavy one was under way"


@pytest.mark.parametrize(
    ("limits", "change", "field", "said"),
    [
        ({"max_text_tokens": 10}, {}, "prompt_embeds", "max_text_tokens"),
        ({"max_row_tokens": 20}, {}, "latents", "max_row_tokens"),
        ({"max_request_tokens": 50}, {}, "latents", "max_request_tokens"),
    ],
)
def test_tokens_are_limited(
    reward: RewardModel, tensors: Tensors, limits: Any, change: Any, field: str, said: str
) -> None:
    with calling(create_app(replace(SETTINGS, **limits), reward)) as client:
        reply = client.post("/v1/score", content=save(tensors), headers=HEADERS)
        assert (reply.status_code, reply.json()["field"]) == (413, field)
        assert said in reply.json()["error"]
        assert client.get("/v1/models").json()["limits"][said] == next(iter(limits.values()))


def test_work_and_pixels_of_a_request_with_pictures_are_limited(
    reward: RewardModel, pictures: list[bytes]
) -> None:
    with calling(create_app(replace(SETTINGS, max_request_tokens=2000), reward)) as client:
        wanted = {"prompts": "a red circle", "num_draws": 64}
        reply = client.post("/v1/score/images", **form(wanted, images=pictures))
        assert (reply.status_code, reply.json()["field"]) == (413, "images")
        assert "rows x draws x noise levels x tokens" in reply.json()["error"]
    with calling(create_app(replace(SETTINGS, max_request_megapixels=0.01), reward)) as client:
        reply = client.post("/v1/score/images", **form({"prompts": "a red circle"}, images=pictures))
        assert reply.status_code == 413
        assert "max_request_megapixels" in reply.json()["error"]


def test_few_pixels_are_decoded_at_once_whatever_a_request_holds(
    reward: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most, lock = [0], [0], threading.Lock()

    def counted(data: bytes, *arguments: Any) -> Tensor:
        with lock:
            now[0] += 1_000_000
            most[0] = max(most[0], now[0])
        try:
            return open_picture(data, *arguments)
        finally:
            with lock:
                now[0] -= 1_000_000

    monkeypatch.setattr(service_module, "open_picture", counted)
    monkeypatch.setattr(service_module, "DECODED_PIXELS", 2.5e6)
    large = [png(np.full((1000, 1000, 3), shade, dtype=np.uint8)) for shade in range(0, 240, 20)]
    with calling(create_app(SETTINGS, reward)) as client:
        reply = client.post("/v1/score/images", **form({"prompts": PROMPTS[0]}, images=large))
    assert most[0] == 2_000_000
    expected = reward.score(PROMPTS[0], large, seed=0).scores
    torch.testing.assert_close(torch.tensor(reply.json()["scores"]), expected, rtol=1e-6, atol=1e-5)


# --- what is said ------------------------------------------------------------------------------------------


def test_wrong_kinds_of_values_are_refused_in_plain_words(client: Any, pictures: list[bytes]) -> None:
    picture = base64.b64encode(pictures[0]).decode()
    for name, value, said in (
        ("noise_levels", True, "a number in [0, 1]"),
        ("noise_levels", "0.4", "a number in [0, 1]"),
        ("noise_levels", [0.1, False], "a number in [0, 1]"),
        ("seed", True, "a whole number"),
        ("seed", "5", "a whole number"),
        ("seed", 1.0, "a whole number"),
        ("num_draws", True, "a whole number in [1, 64]"),
        ("num_draws", "4", "a whole number in [1, 64]"),
        ("prompts", [1], "a text"),
    ):
        reply = client.post("/v1/score/images", json={"prompts": "a", "images": [picture]} | {name: value})
        assert (reply.status_code, reply.json()["field"]) == (422, name)
        assert said in reply.json()["error"]
        assert "constrained" not in reply.json()["error"]
    level = client.post("/v1/score/images", json={"prompts": "a", "images": [picture], "noise_levels": 1})
    assert level.json()["noise_levels"] == [1.0]


@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "pooled_prompt_embeds"])
def test_the_tensor_that_makes_a_score_infinite_is_named(client: Any, tensors: Tensors, name: str) -> None:
    body = save(tensors | {name: torch.full_like(tensors[name], 3e38)})
    reply = client.post("/v1/score", content=body, headers=HEADERS)
    assert (reply.status_code, reply.json()["field"]) == (422, name)
    assert "3e+38" in reply.json()["error"]


def test_what_is_said_twice_is_refused(client: Any) -> None:
    body = b'{"prompts": "a", "images": ["x"], "prompts": "b"}'
    reply = client.post("/v1/score/images", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert "'prompts' is said twice" in reply.json()["error"]


def test_a_long_key_is_not_repeated(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    for body in ({"x" * 500_000: 1}, {"prompts": "a", "images": ["x"], "model": "y" * 300_000}):
        reply = client.post("/v1/score/images", json=body)
        assert reply.status_code == 422
        assert len(reply.content) < 1000
    with caplog.at_level(logging.INFO, "dina_lrm.serving"):
        client.post("/v1/score/images", json={"x" * 500_000: 1})
    assert all(len(str(vars(record))) < 5000 for record in caplog.records)


def test_a_compressed_body_is_called_that(client: Any) -> None:
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    reply = client.post("/v1/score/images", content=b"\x1f\x8b", headers=headers)
    assert (reply.status_code, reply.json()["field"]) == (415, "content-encoding")


def test_a_page_below_does_not_hide_what_a_route_takes(reward: RewardModel) -> None:
    app = create_app(SETTINGS, reward)

    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app.mount("/", page)
    with calling(app) as client:
        reply = client.get("/v1/score")
        assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
        assert json.loads(reply.content)["request_id"] == reply.headers["x-request-id"]
        assert client.head("/healthz").status_code == 200
        assert client.delete("/healthz").status_code == 405
        assert client.get("/elsewhere").status_code == 404
