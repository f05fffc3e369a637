"""Every route: right answers equal the library's, wrong requests are told which field is wrong."""

import base64
import json
import pickle
import socket
import time
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import save
from torch import Tensor

from dina_lrm import Conditioning, RewardModel
from dina_lrm.remote import protocol
from dina_lrm.serving.app import create_app
from dina_lrm.serving.settings import ServerSettings
from tests.unit.serving.conftest import HEADERS, PROMPTS, calling, form, listening, png

Tensors = dict[str, Tensor]


def post(client: TestClient, tensors: Tensors) -> Any:
    return client.post("/v1/score", content=save(tensors), headers=HEADERS)


# --- the latent protocol -----------------------------------------------------------------------------------


def test_scores_of_latents_are_the_librarys(
    client: TestClient, reward: RewardModel, tensors: Tensors, conditioning: Conditioning
) -> None:
    reply = post(client, tensors)
    assert reply.status_code == 200
    expected = reward.score_latents(tensors["latents"], conditioning, tensors["u"], seed=[5, -7])
    assert reply.json()["protocol_version"] == "1"
    torch.testing.assert_close(torch.tensor(reply.json()["raw_scores"]), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_are_scored_as_what_they_are(
    client: TestClient, reward: RewardModel, tensors: Tensors, conditioning: Conditioning, dtype: torch.dtype
) -> None:
    halves = {name: value.to(dtype) if name == "latents" else value for name, value in tensors.items()}
    expected = reward.score_latents(halves["latents"].float(), conditioning, tensors["u"], seed=[5, -7])
    found = torch.tensor(post(client, halves).json()["raw_scores"])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_a_row_scores_the_same_alone(client: TestClient, tensors: Tensors) -> None:
    together = post(client, tensors).json()["raw_scores"]
    alone = [
        post(client, {name: value[row : row + 1] for name, value in tensors.items()}).json()["raw_scores"][0]
        for row in range(2)
    ]
    assert alone == pytest.approx(together, rel=1e-6, abs=1e-5)


def test_without_seeds_the_noise_is_fresh(client: TestClient, tensors: Tensors) -> None:
    unseeded = {name: value for name, value in tensors.items() if name != "seeds"}
    first, second = (post(client, unseeded).json()["raw_scores"] for _ in range(2))
    assert first != second


WRONG: dict[str, tuple[str, Any]] = {
    "latents missing": ("latents", lambda t: t.pop("latents")),
    "u missing": ("u", lambda t: t.pop("u")),
    "pooled missing": ("pooled_prompt_embeds", lambda t: t.pop("pooled_prompt_embeds")),
    "latents of rank 3": ("latents", lambda t: t.update(latents=t["latents"][0])),
    "latents with 4 channels": ("latents", lambda t: t.update(latents=t["latents"][:, :4].contiguous())),
    "latents of odd size": ("latents", lambda t: t.update(latents=torch.zeros(2, 16, 7, 8))),
    "latents larger than the table": ("latents", lambda t: t.update(latents=torch.zeros(2, 16, 8, 512))),
    "latents in int64": ("latents", lambda t: t.update(latents=torch.ones(2, 16, 8, 8, dtype=torch.int64))),
    "latents in float64": ("latents", lambda t: t.update(latents=t["latents"].double())),
    "latents with NaN": ("latents", lambda t: t.update(latents=torch.full((2, 16, 8, 8), torch.nan))),
    "latents beyond measure": ("latents", lambda t: t.update(latents=torch.full((2, 16, 8, 8), 3e38))),
    "no rows": ("latents", lambda t: t.update(latents=torch.zeros(0, 16, 8, 8))),
    "embeds of another width": ("prompt_embeds", lambda t: t.update(prompt_embeds=torch.zeros(2, 5, 3))),
    "one row of embeds": ("prompt_embeds", lambda t: t.update(prompt_embeds=t["prompt_embeds"][:1])),
    "infinite embeds": ("prompt_embeds", lambda t: t["prompt_embeds"].fill_(torch.inf)),
    "pooled of rank 3": (
        "pooled_prompt_embeds",
        lambda t: t.update(pooled_prompt_embeds=torch.zeros(2, 1, 3)),
    ),
    "u of 1.5": ("u", lambda t: t.update(u=torch.tensor([0.4, 1.5]))),
    "u of -0.1": ("u", lambda t: t.update(u=torch.tensor([-0.1, 0.5]))),
    "u with NaN": ("u", lambda t: t.update(u=torch.tensor([0.4, torch.nan]))),
    "u in float16": ("u", lambda t: t.update(u=t["u"].half())),
    "u as a column": ("u", lambda t: t.update(u=t["u"][:, None])),
    "seeds in float": ("seeds", lambda t: t.update(seeds=t["seeds"].float())),
    "seeds of rank 2": ("seeds", lambda t: t.update(seeds=t["seeds"][:, None])),
    "three seeds": ("seeds", lambda t: t.update(seeds=torch.arange(3))),
    "an unknown tensor": ("prompt", lambda t: t.update(prompt=torch.zeros(2))),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_wrong_tensor_is_named(client: TestClient, tensors: Tensors, case: str) -> None:
    field, change = WRONG[case]
    copy = {name: value.clone() for name, value in tensors.items()}
    change(copy)
    reply = post(client, {name: value.contiguous() for name, value in copy.items()})
    assert reply.status_code == 422
    assert field in reply.json()["error"]
    assert reply.json()["request_id"] == reply.headers["x-request-id"]
    assert reply.json()["field"] == field


def test_bytes_that_are_no_tensors_are_refused(client: TestClient, tensors: Tensors) -> None:
    body = save(tensors)
    endless_header = (2**40).to_bytes(8, "little") + b"{}"
    for wrong in (b"", body[:-1], body[: len(body) // 2], pickle.dumps([1]), b"\x00" * 100, endless_header):
        reply = client.post("/v1/score", content=wrong, headers=HEADERS)
        assert reply.status_code == 422
        assert reply.json()["field"] == "body"


@pytest.mark.parametrize("version", [None, "2", "", "one"])
def test_another_version_is_refused(client: TestClient, tensors: Tensors, version: str | None) -> None:
    headers = dict(HEADERS)
    if version is None:
        del headers[protocol.VERSION_HEADER]
    else:
        headers[protocol.VERSION_HEADER] = version
    reply = client.post("/v1/score", content=save(tensors), headers=headers)
    assert reply.status_code == 400
    assert reply.json()["field"] == protocol.VERSION_HEADER


def test_another_content_type_is_refused(client: TestClient, tensors: Tensors) -> None:
    headers = HEADERS | {"content-type": "application/x-pickle"}
    assert client.post("/v1/score", content=save(tensors), headers=headers).status_code == 415


def test_too_many_rows_and_bytes_are_refused(client: TestClient, tensors: Tensors) -> None:
    many = {name: torch.cat([value] * 129) for name, value in tensors.items() if name == "u"} | {
        "latents": torch.zeros(258, 16, 2, 2),
        "prompt_embeds": tensors["prompt_embeds"][:1, :1].expand(258, 1, -1).contiguous(),
        "pooled_prompt_embeds": tensors["pooled_prompt_embeds"][:1].expand(258, -1).contiguous(),
    }
    reply = post(client, {name: value.half() if name != "u" else value for name, value in many.items()})
    assert (reply.status_code, reply.json()["field"]) == (413, "latents")
    large = post(client, tensors | {"latents": torch.zeros(64, 16, 32, 32)})
    assert (large.status_code, large.json()["field"]) == (413, "body")

    def parts() -> Any:  # without a content-length
        for _ in range(20):
            yield b"x" * 100_000

    streamed = client.post("/v1/score", content=parts(), headers=HEADERS)
    assert (streamed.status_code, streamed.json()["field"]) == (413, "body")


# --- pictures ----------------------------------------------------------------------------------------------


def test_scores_of_pictures_are_the_librarys(
    client: TestClient, reward: RewardModel, pictures: list[bytes]
) -> None:
    wanted = {
        "prompts": [*PROMPTS, PROMPTS[0]],
        "seed": [1, 2, 3],
        "noise_levels": [0.2, 0.6],
        "num_draws": 3,
    }
    expected = reward.score(wanted["prompts"], pictures, noise_levels=[0.2, 0.6], seed=[1, 2, 3], num_draws=3)
    as_json = wanted | {"images": [base64.b64encode(one).decode() for one in pictures]}
    for reply in (
        client.post("/v1/score/images", json=as_json),
        client.post("/v1/score/images", **form(wanted, images=pictures)),
    ):
        assert reply.status_code == 200
        found = reply.json()
        torch.testing.assert_close(torch.tensor(found["scores"]), expected.scores, rtol=1e-6, atol=1e-5)
        assert expected.standard_errors is not None
        torch.testing.assert_close(
            torch.tensor(found["standard_errors"]), expected.standard_errors, rtol=1e-3, atol=1e-5
        )
        assert found["noise_levels"] == [0.2, 0.6]
        assert found["notes"] == []


def test_one_prompt_serves_all_pictures_at_the_models_levels(
    client: TestClient, reward: RewardModel, pictures: list[bytes]
) -> None:
    reply = client.post("/v1/score/images", **form({"prompts": PROMPTS[0]}, images=pictures)).json()
    assert reply["scores"] == pytest.approx(reward.score(PROMPTS[0], pictures).scores.tolist(), abs=1e-5)
    assert reply["standard_errors"] is None
    assert reply["noise_levels"] == list(reward.config.noise_levels)


def test_unknown_words_are_noted(client: TestClient, pictures: list[bytes]) -> None:
    for _ in range(2):  # also of a prompt that was met before
        reply = client.post("/v1/score/images", **form({"prompts": "a red elephant"}, images=pictures[:1]))
        assert "elephant" in reply.json()["notes"][0]


def test_comparisons_are_the_librarys(client: TestClient, reward: RewardModel, pictures: list[bytes]) -> None:
    wanted = {"prompt": PROMPTS[0], "seed": 4, "noise_levels": 0.3}
    urls = ["data:image/png;base64," + base64.b64encode(one).decode() for one in pictures[:2]]
    expected = reward.compare(PROMPTS[0], *pictures[:2], noise_levels=0.3, seed=4)
    for reply in (
        client.post("/v1/compare", json=wanted | dict(zip(("image_a", "image_b"), urls, strict=True))),
        client.post("/v1/compare", **form(wanted, image_a=pictures[:1], image_b=pictures[1:2])),
    ):
        assert reply.json()["probability"] == pytest.approx(expected, abs=1e-6)


IMAGES, COMPARE = "/v1/score/images", "/v1/compare"
API = ("/v1/score", IMAGES, COMPARE)
B64 = base64.b64encode(png(np.zeros((64, 64, 3), dtype=np.uint8))).decode()


@pytest.mark.parametrize(
    ("route", "content", "field"),
    [
        (IMAGES, {"prompts": "", "images": [B64]}, "prompts"),
        (IMAGES, {"prompts": "  ", "images": [B64]}, "prompts"),
        (IMAGES, {"prompts": "x" * 3000, "images": [B64]}, "prompts"),
        (IMAGES, {"prompts": ["a", "b"], "images": [B64]}, "prompts"),
        (IMAGES, {"prompts": 5, "images": [B64]}, "prompts"),
        (IMAGES, {"prompts": "a \ud800", "images": [B64]}, "prompts"),
        (IMAGES, {"images": [B64]}, "prompts"),
        (IMAGES, {"prompts": "a"}, "images"),
        (IMAGES, {"prompts": "a", "images": []}, "images"),
        (IMAGES, {"prompts": "a", "images": ["not base64!"]}, "images.0"),
        (IMAGES, {"prompts": "a", "images": ["data:text/plain,hello"]}, "images.0"),
        (IMAGES, {"prompts": "a", "images": [base64.b64encode(b"GIF89a junk").decode()]}, "images.0"),
        (IMAGES, {"prompts": "a", "images": ["/etc/passwd"]}, "images.0"),
        (IMAGES, {"prompts": "a", "images": [B64], "noise_levels": 1.5}, "noise_levels"),
        (IMAGES, {"prompts": "a", "images": [B64], "noise_levels": []}, "noise_levels"),
        (IMAGES, {"prompts": "a", "images": [B64], "noise_levels": [0.5] * 99}, "noise_levels"),
        (IMAGES, {"prompts": "a", "images": [B64], "seed": 2**70}, "seed"),
        (IMAGES, {"prompts": "a", "images": [B64], "seed": [1, 2]}, "seed"),
        (IMAGES, {"prompts": "a", "images": [B64], "num_draws": 0}, "num_draws"),
        (IMAGES, {"prompts": "a", "images": [B64], "num_draws": 10**6}, "num_draws"),
        (IMAGES, {"prompts": "a", "images": [B64], "path": "x"}, "path"),
        (IMAGES, {"prompts": "a", "images": [B64, 5]}, "images.1"),
        (IMAGES, {"prompts": ["a", " "], "images": [B64, B64]}, "prompts.1"),
        (IMAGES, {"prompts": "a", "images": [B64], "model": ""}, "model"),
        (IMAGES + "?model=a", {"prompts": "a", "images": [B64], "model": "bundled"}, "model"),
        (IMAGES + "?model=bundled&model=a", {"prompts": "a", "images": [B64]}, "model"),
        (IMAGES, [], "body"),
        (COMPARE, {"prompt": "", "image_a": B64, "image_b": B64}, "prompt"),
        (COMPARE, {"prompt": "a", "image_a": B64}, "image_b"),
        (COMPARE, {"prompt": "a", "image_a": B64, "image_b": "?"}, "image_b"),
    ],
)
def test_a_wrong_field_is_named(client: TestClient, route: str, content: Any, field: str) -> None:
    reply = client.post(route, content=json.dumps(content), headers={"content-type": "application/json"})
    assert reply.status_code == 422
    assert reply.json()["field"] == field
    assert field in reply.json()["error"]
    assert "Request" not in reply.json()["error"]  # names of classes say nothing to a client


def test_pictures_that_would_not_fit_are_refused_before_they_are_decoded(client: TestClient) -> None:
    bomb = png(np.zeros((400, 400, 3), dtype=np.uint8))  # 0.16 million pixels in 600 bytes; 0.1 are allowed
    reply = client.post(IMAGES, **form({"prompts": "a"}, images=[bomb]))
    assert reply.status_code == 422
    assert "400x400 pixels, at most 0.1 million" in reply.json()["error"]
    tiny = client.post(IMAGES, **form({"prompts": "a"}, images=[png(np.zeros((2, 900, 3), dtype=np.uint8))]))
    assert (tiny.status_code, tiny.json()["field"]) == (422, "images.0")


def test_wrong_forms_are_refused(client: TestClient, pictures: list[bytes]) -> None:
    for wrong, field in (
        ({"files": [("images", ("a.png", pictures[0]))]}, "request"),
        (form({"prompts": "a"}, pictures=pictures), "pictures"),
        (
            {"data": {"request": ['{"prompts": "a"}'] * 2}, "files": [("images", ("a", pictures[0]))]},
            "request",
        ),
        (form({"prompts": "a", "images": ["x"]}, images=pictures), "images"),
        ({"data": {"request": "{"}, "files": [("images", ("a.png", pictures[0]))]}, "request"),
        ({"data": {"request": "NaN"}, "files": [("images", ("a.png", pictures[0]))]}, "request"),
        ({"data": {"request": "[]"}, "files": [("images", ("a.png", pictures[0]))]}, "request"),
        ({"data": {"request": '{"prompts": "a"}', "images": "text"}, "files": [("x", ("x", b""))]}, "images"),
    ):
        reply = client.post(IMAGES, **wrong)
        assert reply.status_code in (400, 422), wrong
        assert reply.json()["field"] == field
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post(IMAGES, content=b"--y\r\n", headers=headers).status_code in (400, 422)
    assert (
        client.post(IMAGES, content=b"--y", headers={"content-type": "multipart/form-data"}).status_code
        == 400
    )


def test_json_that_is_none_is_refused(client: TestClient) -> None:
    for wrong in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"prompts": NaN}'):
        reply = client.post(IMAGES, content=wrong, headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert reply.json()["field"] == "body"


# --- around it ---------------------------------------------------------------------------------------------


def test_health_and_metrics(client: TestClient, tensors: Tensors, pictures: list[bytes]) -> None:
    assert client.get("/healthz").json() == {"status": "ok", "model": "bundled", "queued": 0}
    assert client.get("/readyz").json()["status"] == "ready"
    before = _metric(client, "dina_lrm_scores_total")
    post(client, tensors)
    assert _metric(client, "dina_lrm_scores_total") == before + 2
    client.post("/v1/score/images", **form({"prompts": PROMPTS[0]}, images=pictures[:1]))
    text = client.get("/metrics").text
    for name in (
        'dina_lrm_queued_rows{model="bundled"} 0.0',
        'dina_lrm_batch_rows_count{model="bundled",stage="forward"}',
        'dina_lrm_stage_seconds_count{model="bundled",stage="wait"}',
        'dina_lrm_stage_seconds_count{model="bundled",stage="encode"}',
        'dina_lrm_stage_seconds_count{model="bundled",stage="forward"}',
        'dina_lrm_requests_total{route="/v1/score",status="200"}',
    ):
        assert name in text


def _metric(client: TestClient, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_unknown_routes_and_methods_are_answered_in_json(client: TestClient) -> None:
    assert client.get("/nothing").json()["error"] == "Not Found"
    assert client.get("/v1/score").status_code == 405


def test_the_documentation_needs_no_other_host(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "swagger-ui" in page
    assert "https://" not in page
    paths = client.get("/openapi.json").json()["paths"]
    assert {*API, "/v1/models", "/healthz", "/readyz", "/metrics"} == set(paths)


def test_request_ids_come_back(client: TestClient) -> None:
    assert client.get("/healthz", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    forged = client.get("/healthz", headers={"x-request-id": 'a"b'}).headers["x-request-id"]
    assert len(forged) == 32


def test_a_token_is_asked_for(reward: RewardModel, tensors: Tensors) -> None:
    settings = ServerSettings(page=False, token="open sesame é", max_wait_ms=0.0)
    with calling(create_app(settings, reward)) as client:
        assert client.get("/healthz").status_code == 200
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic open sesame"}):
            reply = client.post("/v1/score", content=save(tensors), headers=HEADERS | given)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"
        assert client.get("/metrics").status_code == 401
        right = {"authorization": "Bearer open sesame é".encode()}
        assert client.post("/v1/score", content=save(tensors), headers=HEADERS | right).status_code == 200


def test_a_browser_logs_in_once(reward: RewardModel) -> None:
    with calling(create_app(ServerSettings(page=False, token="secret"), reward)) as client:
        page = client.get("/docs", headers={"accept": "text/html"})
        assert page.status_code == 401
        assert 'name="token"' in page.text
        assert client.post("/login", data={"token": "guess"}).status_code == 401
        entered = client.post("/login", data={"token": "secret"}, follow_redirects=False)
        assert entered.status_code == 303
        cookie = entered.headers["set-cookie"]
        assert "secret" not in cookie
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert client.get("/docs", headers={"accept": "text/html"}).status_code == 200
        client.cookies.clear()
        assert client.get("/docs", headers={"cookie": "dina_lrm_page=forged"}).status_code == 401


def test_other_origins_are_let_in_only_by_name(reward: RewardModel, client: TestClient) -> None:
    asks = {"origin": "https://friend.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client.options("/v1/compare", headers=asks).headers
    settings = ServerSettings(page=False, cors_origins=("https://friend.example",), token="secret")
    with calling(create_app(settings, reward)) as open_client:
        allowed = open_client.options("/v1/compare", headers=asks)
        assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
        other = open_client.options("/v1/compare", headers=asks | {"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_past_capacity_it_sheds(reward: RewardModel, tensors: Tensors) -> None:
    app = create_app(ServerSettings(page=False, max_queue=2), reward)
    with calling(app) as client, app.state.service.first.batcher.admit(1, 1.0):
        reply = post(client, tensors)  # two rows
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert 'dina_lrm_rejected_total{reason="full"} 1.0' in client.get("/metrics").text
        one = {name: value[:1] for name, value in tensors.items()}
        assert post(client, one).status_code == 200


def test_what_a_client_that_leaves_was_waiting_for_is_dropped(reward: RewardModel, tensors: Tensors) -> None:
    settings = ServerSettings(page=False, max_batch_size=64, max_wait_ms=60_000.0)
    with listening(settings, reward) as port:

        def metrics() -> str:
            return httpx.get(f"http://127.0.0.1:{port}/metrics").text

        def until(line: str) -> None:
            for _ in range(500):
                if line in metrics():
                    return
                time.sleep(0.01)
            raise AssertionError(f"{line} is not in {metrics()}")

        body = save(tensors)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST /v1/score HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
            connection.sendall(head.encode() + b"\r\n" + body)
            until('dina_lrm_queued_rows{model="bundled"} 2.0')
        until('dina_lrm_rejected_total{reason="gone"} 1.0')
        until('dina_lrm_queued_rows{model="bundled"} 0.0')
        assert "dina_lrm_scores_total{" not in metrics()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size = 0: must be a whole number, at least 1"),
        ({"max_body_mib": 0.0}, "max_body_mib = 0"),
        ({"max_wait_ms": -1.0}, "max_wait_ms = -1"),
        ({"token": " "}, "token is empty"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerSettings(**settings)
