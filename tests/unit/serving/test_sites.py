"""Other sites, and names that are not the server's: refused on every route that does something."""

from typing import Any

import pytest

from dina_lrm import RewardModel
from dina_lrm.serving.app import create_app
from dina_lrm.serving.settings import ServerSettings
from tests.unit.serving.conftest import calling, form

ROUTES = [("POST", "/v1/score"), ("POST", "/v1/score/images"), ("POST", "/v1/compare"), ("GET", "/docs")]


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/metrics"), ("GET", "/nothing")])
def test_without_a_token_it_answers_to_its_own_names_only(
    client: Any, method: str, path: str, pictures: list[bytes]
) -> None:
    reply = client.request(method, path, headers={"host": "rebound.example"})
    assert (reply.status_code, reply.json()["field"]) == (403, "host")
    for own in ("localhost:8000", "127.0.0.1", "[::1]:80"):
        assert client.request(method, path, headers={"host": own}).status_code != 403


def test_other_sites_are_refused_on_every_route_that_does_something(
    client: Any, pictures: list[bytes]
) -> None:
    wanted = form({"prompts": "a red circle"}, images=pictures[:1])
    for strange in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"},
    ):
        reply = client.post("/v1/score/images", headers=strange, **wanted)
        assert (reply.status_code, reply.json()["field"]) == (403, "origin")
        assert client.post("/upload", headers=strange, **wanted).status_code == 403
    for own in ({"origin": "http://127.0.0.1"}, {"sec-fetch-site": "same-origin"}, {}):
        assert client.post("/v1/score/images", headers=own, **wanted).status_code == 200
    assert client.get("/healthz", headers={"host": "10.0.0.7:8000"}).status_code == 200  # an orchestrator


def test_named_hosts_and_origins_are_let_in(reward: RewardModel, pictures: list[bytes]) -> None:
    settings = ServerSettings(
        page=False,
        max_wait_ms=0.0,
        hosts=("reward.example",),
        cors_origins=("https://friend.example",),
        token="secret",
    )
    bearer = {"authorization": "Bearer secret", "host": "reward.example"}
    with calling(create_app(settings, reward)) as client:
        wanted = form({"prompts": "a red circle"}, images=pictures[:1])
        for origin in ("https://reward.example", "https://friend.example"):
            headers = bearer | {"origin": origin}
            assert client.post("/v1/score/images", headers=headers, **wanted).status_code == 200
        strange = bearer | {"host": "other.example"}
        assert client.post("/v1/score/images", headers=strange, **wanted).status_code == 403
