"""What operators rely on: several models, callers with limits, proxies, traces, metrics."""

import errno
import hashlib
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save
from torch import Tensor

from dina_lrm import Client, RewardModel, __version__
from dina_lrm.errors import InvalidInputError
from dina_lrm.serving.app import create_app
from dina_lrm.serving.callers import read_callers
from dina_lrm.serving.connections import descriptors_allow
from dina_lrm.serving.forwarded import ForwardedHeaders
from dina_lrm.serving.metrics import Metrics, joined
from dina_lrm.serving.settings import ServerSettings
from tests.unit.serving.conftest import HEADERS, calling, form, listening

Tensors = dict[str, Tensor]
SETTINGS = ServerSettings(page=False, max_wait_ms=0.0)


def test_several_models_in_one_server(reward: RewardModel, tensors: Tensors, pictures: list[bytes]) -> None:
    other = RewardModel.from_pretrained("bundled").requires_grad_(False)
    list(other.head.parameters())[-1].add_(1.0)
    settings = replace(SETTINGS, model=("good=bundled", "other=bundled"))
    with calling(create_app(settings, {"good": reward, "other": other})) as client:
        listed = client.get("/v1/models").json()
        assert [one["name"] for one in listed["models"]] == ["good", "other"]
        assert listed["version"] == __version__
        first, second = listed["models"]
        assert first["digest"] != second["digest"]
        assert first["noise_levels"] == list(reward.config.noise_levels)
        body = save(tensors)
        by_name = {
            name: client.post(f"/v1/score{query}", content=body, headers=HEADERS).json()["raw_scores"]
            for name, query in (("", ""), ("good", "?model=good"), ("other", "?model=other"))
        }
        assert by_name[""] == pytest.approx(by_name["good"], rel=1e-6)
        assert by_name["good"] != pytest.approx(by_name["other"], rel=1e-3)
        unknown = client.post("/v1/score?model=none", content=body, headers=HEADERS)
        assert (unknown.status_code, unknown.json()["field"]) == (422, "model")
        assert "only good, other" in unknown.json()["error"]
        text = client.get("/metrics").text
        assert 'dina_lrm_scores_total{model="other"} 2.0' in text
        assert f'model="good",version="{__version__}"' in text


def test_our_client_names_a_model_in_its_address(reward: RewardModel, pictures: list[bytes]) -> None:
    settings = replace(SETTINGS, model=("good=bundled", "other=bundled"))
    other = RewardModel.from_pretrained("bundled").requires_grad_(False)
    list(other.head.parameters())[-1].add_(1.0)
    with listening(settings, reward, {"good": reward, "other": other}) as port:
        url = f"http://127.0.0.1:{port}"
        with Client(f"{url}?model=other") as second, Client(url) as first:
            better = (
                second.score("a red circle", pictures[:1]).scores
                - first.score("a red circle", pictures[:1]).scores
            )
            assert better.item() == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(InvalidInputError, match="only model=NAME may stand"):
        Client(f"{url}?seed=3")


@pytest.fixture
def callers(tmp_path: Path) -> Path:
    file = tmp_path / "tokens.toml"
    digest = hashlib.sha256(b"bobs").hexdigest()
    file.write_text(f'[alice]\ntoken = "alices"\nmax_queue = 3\n[bob]\ntoken_sha256 = "{digest}"\n')
    return file


def test_callers_have_names_and_limits(
    reward: RewardModel, tensors: Tensors, callers: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(SETTINGS, token="the first", tokens=callers)
    app = create_app(settings, reward)
    with calling(app) as client:

        def ask(token: str) -> Any:
            headers = HEADERS | {"authorization": f"Bearer {token}"}
            return client.post("/v1/score", content=save(tensors), headers=headers)

        assert ask("nobody's").status_code == 401
        with caplog.at_level(logging.INFO, "dina_lrm.serving"):
            assert ask("bobs").status_code == 200
        assert [vars(one)["caller"] for one in caplog.records if hasattr(one, "rows")] == ["bob"]
        assert ask("the first").status_code == 200
        assert ask("alices").status_code == 200
        alice = next(one for one in app.state.service.login._callers.all if one.name == "alice")
        alice.rows = 2
        refused = ask("alices")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        alice.max_queue = 1  # of two rows, which would never fit
        assert ask("alices").status_code == 413
        assert ask("bobs").status_code == 200
        text = client.get("/metrics", headers={"authorization": "Bearer bobs"}).text
        assert 'dina_lrm_caller_rows_total{caller="bob"} 4.0' in text
        for secret in ("alices", "bobs"):
            assert secret not in text + caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no caller"),
        ("[a]\n", "[a] needs token or token_sha256"),
        ('[a]\ntoken = ""\n', "the token is a text, and not empty"),
        ('[a]\ntoken_sha256 = "abc"\n', "64 hexadecimal digits"),
        ('[a]\ntoken = "x"\nmax_rows = 1\n', "may hold token, token_sha256, max_queue only"),
        ('[a]\ntoken = "x"\nmax_queue = 0\n', "max_queue = 0 must be at least 1"),
        ('[a]\ntoken = "x"\n[b]\ntoken = "x"\n', "[b] has the token of another caller"),
        ("[a", "cannot be read"),
    ],
)
def test_wrong_tokens_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tokens.toml").write_text(text)
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        read_callers(None, tmp_path / "tokens.toml")


def test_a_request_that_never_fits_into_the_queue_is_too_large(reward: RewardModel, tensors: Tensors) -> None:
    with calling(create_app(replace(SETTINGS, max_queue=1), reward)) as client:
        reply = client.post("/v1/score", content=save(tensors), headers=HEADERS)
    assert reply.status_code == 413
    assert "at most 1 are taken (max_queue)" in reply.json()["error"]


def test_a_full_disk_is_told(
    reward: RewardModel, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files of a form are kept on disk while it is read."""

    def full(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("starlette.formparsers.SpooledTemporaryFile", full)
    with calling(create_app(SETTINGS, reward)) as client:
        reply = client.post("/v1/score/images", **form({"prompts": "a"}, images=pictures[:1]))
        assert reply.status_code == 503
        assert "disk is full" in reply.json()["error"]
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("stripped", [True, False])
def test_a_prefix_is_understood_whether_the_proxy_leaves_it_or_not(
    reward: RewardModel, tensors: Tensors, stripped: bool
) -> None:
    with calling(create_app(replace(SETTINGS, root_path="/reward"), reward)) as client:
        prefix = "" if stripped else "/reward"
        assert client.get(f"{prefix}/healthz").status_code == 200
        assert client.get(f"{prefix}/v1/score").status_code == 405
        assert client.post(f"{prefix}/v1/score", content=save(tensors), headers=HEADERS).status_code == 200
        page = client.get(f"{prefix}/docs").text
        assert 'src="/reward/static-offline-docs/' in page
        assert "'/reward/openapi.json'" in page
        assert client.get(f"{prefix}/openapi.json").status_code == 200
        assert client.get(f"{prefix}/static-offline-docs/swagger-ui.css").status_code == 200


def test_the_login_form_works_behind_a_prefix(reward: RewardModel) -> None:
    settings = replace(SETTINGS, root_path="/reward", token="secret")
    with calling(create_app(settings, reward)) as client:
        form = client.get("/docs", headers={"accept": "text/html"}).text
        assert 'action="/reward/login"' in form
        entered = client.post("/login", data={"token": "secret"}, follow_redirects=False)
        assert entered.headers["location"] == "/reward/"
        assert "Path=/reward/" in entered.headers["set-cookie"]


def test_only_named_proxies_are_believed() -> None:
    app = FastAPI()

    @app.get("/seen")
    def seen(request: Request) -> dict[str, Any]:
        client = request.client
        return {
            "client": client.host if client else None,
            "scheme": request.url.scheme,
            "host": request.headers["host"],
            "root": request.scope["root_path"],
        }

    forwarded = {
        "x-forwarded-for": "203.0.113.9",
        "x-forwarded-proto": "https",
        "x-forwarded-host": "reward.example",
        "x-forwarded-prefix": "/reward",
    }

    def ask(peer: str, headers: dict[str, str]) -> dict[str, Any]:
        wrapped = ForwardedHeaders(app, ["10.0.0.0/8"])
        with TestClient(wrapped, client=(peer, 1)) as client:
            return client.get("/seen", headers=headers).json()

    assert ask("10.1.2.3", forwarded) == {
        "client": "203.0.113.9",
        "scheme": "https",
        "host": "reward.example",
        "root": "/reward",
    }
    assert ask("192.168.0.1", forwarded) == {
        "client": "192.168.0.1",
        "scheme": "http",
        "host": "testserver",
        "root": "",
    }
    odd = forwarded | {"x-forwarded-prefix": "//evil.example/", "x-forwarded-host": "a b"}
    assert ask("10.1.2.3", odd)["root"] == ""
    assert ask("10.1.2.3", odd)["host"] == "testserver"


def test_a_trace_is_taken_and_given(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with caplog.at_level(logging.DEBUG, "dina_lrm.serving"):
        answered = client.get("/healthz", headers={"traceparent": given}).headers["traceparent"]
    version, trace, span, flags = answered.split("-")
    assert (version, trace, flags) == ("00", "0af7651916cd43dd8448eb211c80319c", "01")
    assert span != "b7ad6b7169203331"
    record = vars(caplog.records[-1])
    assert (record["trace_id"], record["parent_id"], record["span_id"]) == (trace, "b7ad6b7169203331", span)
    fresh = client.get("/healthz", headers={"traceparent": "00-zz-1-01"}).headers["traceparent"]
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", fresh)


def test_metrics_have_memory_and_no_series_about_their_own_age(client: Any) -> None:
    text = client.get("/metrics").text
    assert "_created" not in text
    assert "process_resident_memory_bytes" in text
    assert "dina_lrm_inflight_requests 1.0" in text


def test_metrics_of_replicas_are_told_apart() -> None:
    texts = {}
    for replica, count in (("one", 2), ("two", 5)):
        metrics = Metrics()
        metrics.scores.labels("bundled").inc(count)
        texts[replica] = metrics.text()
    families = {one.name: one for one in text_string_to_metric_families(joined(texts).decode())}
    found = {sample.labels["replica"]: sample.value for sample in families["dina_lrm_scores"].samples}
    assert found == {"one": 2.0, "two": 5.0}


def test_so_many_connections_as_files_may_be_opened(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import resource

    assert descriptors_allow(10) == 10
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 256))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: None)
    logging.getLogger("uvicorn.error").propagate = True
    assert descriptors_allow(1000) == 192
    assert "may open 256 files only" in caplog.text
