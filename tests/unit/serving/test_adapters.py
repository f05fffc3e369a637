"""Other trainers' routes: what their clients send, and the library's scores."""

import base64
import io
import json
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from dina_lrm import RewardModel
from dina_lrm.serving import adapters
from dina_lrm.serving.app import create_app
from dina_lrm.serving.settings import ServerSettings
from tests.unit.serving.conftest import PROMPTS, calling


@pytest.fixture(scope="module")
def adapted(reward: RewardModel) -> Iterator[TestClient]:
    settings = ServerSettings(page=False, max_wait_ms=0.0, adapters=("cosmos-rl", "unirl"), max_rows=4)
    with calling(create_app(settings, reward)) as client:
        yield client


def payload(array: np.ndarray, **meta: Any) -> bytes:
    """As cosmos-rl's client packs it."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return (
        json.dumps({"prompts": PROMPTS, "reward_fn": {"dina": 1.0}} | meta).encode()
        + b"\n"
        + stream.getvalue()
    )


def pulled(client: TestClient, ticket: str, reward: str = "dina") -> Any:
    for _ in range(1000):
        reply = client.post("/api/reward/pull", data={"uuid": ticket, "type": reward})
        if reply.status_code != 400:
            return reply
        time.sleep(0.01)
    raise AssertionError("never ready")


def test_the_routes_are_there_only_where_they_are_asked_for(client: TestClient) -> None:
    assert client.post("/api/reward/ping").status_code == 404
    assert client.post("/score").status_code == 404


def test_cosmos_rl_scores_latents(adapted: TestClient, reward: RewardModel) -> None:
    assert adapted.post("/api/reward/ping", data={"info_data": "{}"}).json()["status"] == "ok"
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    expected = reward.score_latents(latents.float(), reward.encode_prompts(PROMPTS), seed=0).tolist()
    for shape in ((2, 16, 1, 8, 8), (2, 16, 8, 8)):
        body = payload(latents.reshape(shape).numpy(), media_type="latent", video_infos=[{"fps": 16}])
        ticket = adapted.post("/api/reward/enqueue", content=body).json()["uuid"]
        assert pulled(adapted, ticket).json()["scores"]["dina"] == pytest.approx(expected, abs=1e-5)
    assert pulled(adapted, ticket).status_code == 200  # a result may be fetched again


def test_cosmos_rl_scores_pictures(adapted: TestClient, reward: RewardModel) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    expected = reward.score(PROMPTS, torch.from_numpy(pixels).permute(0, 3, 1, 2), seed=0).scores.tolist()
    ticket = adapted.post("/api/reward/enqueue", content=payload(pixels, media_type="image")).json()["uuid"]
    assert pulled(adapted, ticket).json()["scores"]["dina"] == pytest.approx(expected, abs=1e-5)


LATENTS = np.zeros((2, 16, 8, 8), np.float16)


def header(shape: tuple[int, ...], dtype: str) -> bytes:
    """np.save bytes of an array that is not there."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


META = json.dumps({"prompts": ["a"], "reward_fn": {"d": 1}}).encode() + b"\n"


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"{}", 422, "body"),
        (b"[]\n", 422, "body"),
        (META + header((1, 16, 2**20, 2**16), "<f4"), 422, "body"),  # 4 TiB
        (META + header((1, 16, 2**10, 2**13), "<f4") + b"0" * 64, 422, "body"),  # 512 MiB
        (META + header((-1, -16, 4, 4), "<f4") + b"0" * 1024, 422, "body"),
        (META + header((1, 16, 4, 4), "|V0"), 422, "body"),
        (META + header((1,), "|O") + b"0" * 8, 422, "body"),
        (META + header((0, 16, 4, 4), "<f4"), 422, "body"),
        (b"{\n", 400, "body"),
        (payload(LATENTS) + b"", 200, None),
        (payload(LATENTS)[:-400], 422, "body"),
        (payload(LATENTS, prompts=["a"]), 422, "body"),
        (payload(LATENTS, prompts=["", "a"]), 422, "prompts.0"),
        (payload(LATENTS, media_type="sound"), 422, "media_type"),
        (payload(LATENTS, reward_fn={"a": 1, "b": 1}), 422, "reward_fn"),
        (payload(LATENTS, media_type="image"), 422, "body"),
        (payload(np.zeros((2, 4, 8, 8), np.float16)), 422, "latents"),
        (payload(np.zeros((5, 16, 8, 8), np.float16), prompts=["a"] * 5), 413, "body"),
        (json.dumps({"prompts": ["a"], "reward_fn": {"d": 1}}).encode() + b"\n\x80\x04.", 422, "body"),
    ],
)
def test_wrong_requests_of_cosmos_rl_are_named(
    adapted: TestClient, body: bytes, status: int, field: str | None
) -> None:
    reply = adapted.post("/api/reward/enqueue", content=body)
    assert reply.status_code == status
    assert reply.json().get("field") == field


def test_an_array_is_not_made_before_its_bytes_are_there(adapted: TestClient) -> None:
    tracemalloc.start()
    try:
        adapted.post("/api/reward/enqueue", content=META + header((1, 16, 2**10, 2**13), "<f4") + b"0" * 64)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_columns_first_is_the_same_array(adapted: TestClient) -> None:
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    scores = []
    for array in (latents, np.asfortranarray(latents)):
        ticket = adapted.post("/api/reward/enqueue", content=payload(array)).json()["uuid"]
        scores.append(pulled(adapted, ticket).json()["scores"]["dina"])
    assert scores[0] == scores[1]


def test_a_picture_without_its_media_type_is_told_of_it(adapted: TestClient) -> None:
    pixels = np.zeros((2, 64, 64, 3), np.uint8)
    reply = adapted.post("/api/reward/enqueue", content=payload(pixels))
    assert reply.status_code == 422
    assert "pictures are media_type image" in reply.json()["error"]


def test_a_ticket_comes_in_a_form(adapted: TestClient) -> None:
    reply = adapted.post("/api/reward/pull", json={"uuid": "x", "type": "dina"})
    assert (reply.status_code, reply.json()["field"]) == (415, "content-type")


def test_the_routes_are_documented(adapted: TestClient) -> None:
    document = adapted.get("/openapi.json").json()
    for route in (
        "/api/reward/ping",
        "/api/reward/enqueue",
        "/api/reward/pull",
        "/score",
        "/health",
        "/rewards",
    ):
        assert route in document["paths"]
    assert "media_type" in json.dumps(document["paths"]["/api/reward/enqueue"])


def test_tickets_that_do_not_exist_and_old_ones(adapted: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = adapted.post("/api/reward/enqueue", content=payload(LATENTS)).json()["uuid"]
    assert pulled(adapted, ticket).status_code == 200
    assert pulled(adapted, ticket, "other").status_code == 422
    assert pulled(adapted, "nothing").status_code == 404
    monkeypatch.setattr(adapters, "KEPT_SECONDS", 0.0)
    assert pulled(adapted, ticket).status_code == 404


def test_what_nobody_has_fetched_is_kept(reward: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "KEPT_RESULTS", 2)
    settings = ServerSettings(page=False, max_wait_ms=0.0, adapters=("cosmos-rl",))
    with calling(create_app(settings, reward)) as client:
        first, second = (
            client.post("/api/reward/enqueue", content=payload(LATENTS)).json()["uuid"] for _ in range(2)
        )
        assert client.post("/api/reward/enqueue", content=payload(LATENTS)).status_code == 503
        assert pulled(client, second).status_code == 200
        assert client.post("/api/reward/enqueue", content=payload(LATENTS)).status_code == 200
        assert pulled(client, first).status_code == 200
        assert pulled(client, second).status_code == 404  # it had been fetched, and made room


def test_callers_have_tickets_of_their_own(
    reward: RewardModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(adapters, "KEPT_RESULTS", 1)
    (tmp_path / "tokens.toml").write_text('[alice]\ntoken = "a"\n[bob]\ntoken = "b"\n')
    settings = ServerSettings(
        page=False, max_wait_ms=0.0, adapters=("cosmos-rl",), tokens=tmp_path / "tokens.toml"
    )
    with calling(create_app(settings, reward)) as client:

        def post(route: str, token: str, **content: Any) -> Any:
            headers = {"authorization": f"Bearer {token}"}
            return client.post(f"/api/reward/{route}", headers=headers, **content)

        ticket = post("enqueue", "a", content=payload(LATENTS)).json()["uuid"]
        assert post("enqueue", "b", content=payload(LATENTS)).status_code == 200
        assert post("enqueue", "a", content=payload(LATENTS)).status_code == 503
        form = {"uuid": ticket, "type": "dina"}
        assert post("pull", "b", data=form).status_code == 404
        reply = post("pull", "a", data=form)
        assert reply.status_code in (200, 400)
        assert reply.json().get("request_id", reply.headers["x-request-id"]) == reply.headers["x-request-id"]


def test_a_request_that_a_caller_may_never_send_is_refused_at_once(
    reward: RewardModel, tmp_path: Path
) -> None:
    (tmp_path / "tokens.toml").write_text('[alice]\ntoken = "a"\nmax_queue = 1\n')
    settings = ServerSettings(
        page=False, max_wait_ms=0.0, adapters=("cosmos-rl",), tokens=tmp_path / "tokens.toml"
    )
    headers = {"authorization": "Bearer a"}
    with calling(create_app(settings, reward)) as client:
        reply = client.post("/api/reward/enqueue", content=payload(LATENTS), headers=headers)  # two rows
    assert reply.status_code == 413
    assert "at most 1 are taken (max_queue of this token)" in reply.json()["error"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"history": []},
        {"history": [5]},
        {"history": [{"text": "a"}]},
        {"history": [{"text": None, "image_b64": ""}]},
        {"history": [{"text": "a", "image_b64": "iVBORw0KGgo="}]},
    ],
)
def test_unirl_tells_of_a_picture_that_is_alone_and_wrong(adapted: TestClient, wrong: dict[str, Any]) -> None:
    wanted = [wrong | {"required_rewards": ["bundled"]}]
    reply = adapted.post("/score", json={"requests": wanted})
    assert reply.status_code == 200
    assert reply.json()["results"] == [{"bundled": {"score": None}}]
    assert reply.json()["errors"][0]["bundled"]


def test_unirl_scores_pictures_and_tells_of_single_failures(
    adapted: TestClient, reward: RewardModel, pictures: list[bytes]
) -> None:
    assert adapted.get("/rewards").json() == {"rewards": ["bundled"]}
    assert adapted.get("/health").status_code == 200

    def turn(picture: bytes) -> dict[str, Any]:
        return {"text": PROMPTS[0], "image_b64": base64.b64encode(picture).decode()}

    wanted = [
        {"history": [turn(pictures[2]), turn(pictures[0])], "required_rewards": ["bundled"], "metadata": {}},
        {"history": [turn(b"no picture")], "required_rewards": ["bundled"]},
        {"history": [turn(pictures[1])], "required_rewards": ["hpsv2", "bundled"]},
        {"history": [turn(pictures[1])]},
    ]
    reply = adapted.post("/score", json={"protocol_version": "1", "requests": wanted}).json()
    expected = reward.score(PROMPTS[0], pictures[:2], seed=0).scores.tolist()
    results, errors = reply["results"], reply["errors"]
    assert results[0]["bundled"]["score"] == pytest.approx(expected[0], abs=1e-5)
    assert errors[0] == {}
    assert results[1]["bundled"]["score"] is None
    assert "requests.1: not a readable picture" in errors[1]["bundled"]
    assert results[2]["bundled"]["score"] == pytest.approx(expected[1], abs=1e-5)
    assert results[2]["hpsv2"]["score"] is None
    assert "there is no 'hpsv2'" in errors[2]["hpsv2"]
    assert "required_rewards" in errors[3]["request"]
    assert adapted.post("/score", json={"requests": wanted * 2}).status_code == 413
    for wrong in ({}, [], {"requests": {}}):
        reply = adapted.post("/score", json=wrong)
        assert reply.status_code == 422
        assert "_Uni" not in reply.json()["error"]
