"""What operators need: settings from files and environment, several models and callers, proxies, reload."""

import asyncio
import errno
import gc
import hashlib
import logging
import re
import threading
import weakref
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save
from torch import Tensor

from dina_lrm import Client, RewardModel, __version__
from dina_lrm.cli.serve import read
from dina_lrm.errors import InvalidInputError
from dina_lrm.serving.app import create_app
from dina_lrm.serving.callers import read_callers
from dina_lrm.serving.connections import descriptors_allow
from dina_lrm.serving.forwarded import ForwardedHeaders
from dina_lrm.serving.login import Login
from dina_lrm.serving.metrics import Metrics, joined
from dina_lrm.serving.middleware import ServerMiddleware
from dina_lrm.serving.server import Reloadable
from dina_lrm.serving.settings import ServerSettings, settings_from
from tests.unit.serving.conftest import HEADERS, calling, form, listening

Tensors = dict[str, Tensor]
SETTINGS = ServerSettings(page=False, max_wait_ms=0.0)

# --- settings ----------------------------------------------------------------------------------------------


def test_settings_come_from_a_file_and_the_environment_goes_before_it(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('model = ["a=bundled", "b=/runs/b"]\nmax_rows = 7\npage = false\nmax_wait_ms = 3\n')
    environment = {
        "DINA_LRM_MAX_ROWS": "9",
        "DINA_LRM_HOSTS": "a.example, b.example",
        "DINA_LRM_TOKEN": "s3cret",
        "DINA_LRM_DTYPE": "bfloat16",
        "DINA_LRM_PORT": "",
    }
    found = settings_from(file, environment)
    assert found.models == (("a", "bundled"), ("b", "/runs/b"))
    assert (found.max_rows, found.page, found.max_wait_ms) == (9, False, 3.0)
    assert (found.hosts, found.token, found.dtype) == (("a.example", "b.example"), "s3cret", "bfloat16")
    assert found.port == ServerSettings.port


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("max_row = 7", {}, "'max_row' is no setting; max_rows is one"),
        ("weather = 7", {}, "'weather' is no setting; there are model, pipeline"),
        ("", {"DINA_LRM_MAX_ROW": "7"}, "DINA_LRM_MAX_ROW is no setting; DINA_LRM_MAX_ROWS is one"),
        ("", {"DINA_LRM_max_rows": "7"}, "DINA_LRM_max_rows is no setting; DINA_LRM_MAX_ROWS is one"),
        ("", {"DINA_LRM_TOKEN": " "}, "DINA_LRM_TOKEN is empty"),
        ("", {"DINA_LRM_TOKEN": ""}, "DINA_LRM_TOKEN is empty"),
        ("", {"DINA_LRM_HOSTS": "a b"}, "hosts: 'a b' is no name of a host"),
        ('hosts = ["a:8000"]', {}, "hosts: 'a:8000' is no name of a host"),
        ("max_rows = true", {}, "max_rows = true: true and false are for page alone"),
        ("max_wait_ms = inf", {}, "max_wait_ms = inf: must be a finite number, at least 0"),
        ("", {"DINA_LRM_BODY_SECONDS": "inf"}, "body_seconds = inf: must be a finite number, above 0"),
        ("max_body_mib = nan", {}, "max_body_mib = nan: must be a finite number, above 0"),
        ('hosts = ["10.0.0.0/8"]', {}, "hosts: '10.0.0.0/8' is no name of a host"),
        ('cors_origins = ["*"]', {}, "cors_origins: '*' is no origin"),
        ('cors_origins = ["https://a.example/"]', {}, "is no origin, such as https://friend.example"),
        ('root_path = "/.."', {}, "root_path = '/..'"),
        ("", {"DINA_LRM_HOST": " "}, "host is empty"),
        ('proxies = ["10.1.2.3/8"]', {}, "'10.1.2.3/8' is neither an address nor a network"),
        ('model = ["a b=bundled"]', {}, "model: 'a b' cannot name 'bundled'"),
        ('root_path = "//evil"', {}, "root_path = '//evil'"),
        ('root_path = "/a b"', {}, "root_path = '/a b'"),
        ('token = "x"', {}, "give the token in the environment, as DINA_LRM_TOKEN"),
        ("max_rows = 'many'", {}, "max_rows = 'many': input should be a valid integer"),
        ("max_rows = ", {}, "cannot be read"),
        ("", {"DINA_LRM_DTYPE": "float8"}, "DINA_LRM_DTYPE: dtype = 'float8'"),
        ("max_rows = 0", {}, "max_rows = 0: must be a whole number, at least 1"),
        ("max_queue_tokens = 5", {}, "max_queue_tokens = 5: must be at least max_request_tokens"),
        ('proxies = ["example.org"]', {}, "'example.org' is neither an address nor a network"),
        ('root_path = "reward/"', {}, "root_path = 'reward/'"),
        ("model = []", {}, "one model or more"),
        ('model = ["a=x", "a=y"]', {}, "a name of its own"),
    ],
)
def test_wrong_settings_are_named(
    tmp_path: Path, text: str, environment: dict[str, str], message: str
) -> None:
    (tmp_path / "serve.toml").write_text(text)
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        settings_from(tmp_path / "serve.toml", environment)


def test_what_kubernetes_puts_beside_the_settings_is_none_of_them() -> None:
    environment = {
        "DINA_LRM_PORT": "tcp://10.96.0.7:8000",
        "DINA_LRM_SERVICE_HOST": "10.96.0.7",
        "DINA_LRM_SERVICE_PORT": "8000",
        "DINA_LRM_SERVICE_PORT_HTTP": "8000",
        "DINA_LRM_PORT_8000_TCP": "tcp://10.96.0.7:8000",
        "DINA_LRM_PORT_8000_TCP_ADDR": "10.96.0.7",
        "DINA_LRM_TRACEBACK": "1",
        "DINA_LRM_GOLDEN": "tensors",
        "DINA_LRM_CONFIG": "elsewhere.toml",
    }
    assert settings_from(None, environment) == ServerSettings()


def test_the_environment_may_name_the_file_of_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "serve.toml").write_text("max_rows = 7\n")
    (tmp_path / "typed.toml").write_text("max_rows = 8\n")
    monkeypatch.setenv("DINA_LRM_CONFIG", str(tmp_path / "serve.toml"))
    assert read([]).settings.max_rows == 7
    assert read(["--config", str(tmp_path / "typed.toml")]).settings.max_rows == 8


def test_localhost_alone_is_known_where_anybody_may_call() -> None:
    assert "localhost" in (ServerSettings().known_hosts or ())
    assert ServerSettings(token="x").known_hosts is None
    assert ServerSettings(host="0.0.0.0").known_hosts is None
    assert ServerSettings(host="0.0.0.0", hosts=("r.example",)).known_hosts == ("r.example",)


# --- models ------------------------------------------------------------------------------------------------


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


# --- callers -----------------------------------------------------------------------------------------------


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


# --- proxies -----------------------------------------------------------------------------------------------


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


# --- what is told ------------------------------------------------------------------------------------------


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


# --- endings -----------------------------------------------------------------------------------------------


async def _asked(app: Any, path: str) -> tuple[int, bytes]:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://127.0.0.1"
    ) as client:
        reply = await client.get(path)
        return reply.status_code, reply.content


def _app(name: str, log: list[str], hold: asyncio.Event) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        log.append(f"{name} starts")
        yield
        log.append(f"{name} stops")

    app = FastAPI(lifespan=lifespan)
    app.state.service = SimpleNamespace(closing=asyncio.Event())

    @app.get("/name")
    async def tell() -> str:
        return name

    @app.get("/held")
    async def held() -> str:
        await hold.wait()
        return name

    return app


def test_a_reload_loses_no_request() -> None:
    log = list[str]()

    async def story() -> None:
        hold = asyncio.Event()
        made = iter(["second", "broken", "third"])

        def make() -> FastAPI:
            name = next(made)
            if name == "broken":
                raise InvalidInputError("no such model")
            return _app(name, log, hold)

        app = Reloadable(_app("first", log, hold), make)
        messages = iter(["startup", "shutdown"])
        done = asyncio.Event()

        async def receive() -> Any:
            if (kind := next(messages)) == "shutdown":
                await done.wait()
            return {"type": f"lifespan.{kind}"}

        async def send(message: Any) -> None:
            log.append(message["type"])

        life = asyncio.create_task(app({"type": "lifespan"}, receive, send))
        while "lifespan.startup.complete" not in log:
            await asyncio.sleep(0.001)
        under_way = asyncio.create_task(_asked(app, "/held"))
        await asyncio.sleep(0.01)
        app.reload()
        while (await _asked(app, "/name"))[1] != b'"second"':
            await asyncio.sleep(0.001)
        assert "first stops" not in log
        hold.set()
        assert await under_way == (200, b'"first"')
        while "first stops" not in log:
            await asyncio.sleep(0.001)
        app.reload()  # which fails
        await asyncio.sleep(0.05)
        assert await _asked(app, "/name") == (200, b'"second"')
        app.reload()
        while (await _asked(app, "/name"))[1] != b'"third"':
            await asyncio.sleep(0.001)
        done.set()
        await life

    asyncio.run(asyncio.wait_for(story(), 20))
    assert log[-2:] == ["third stops", "lifespan.shutdown.complete"]


@pytest.fixture
def gated() -> tuple[FastAPI, asyncio.Event]:
    app, closing = FastAPI(), asyncio.Event()

    @app.get("/v1/slow")
    async def slow() -> None:
        await asyncio.sleep(60)

    @app.get("/beats")
    async def beats() -> StreamingResponse:
        async def forever() -> Any:
            while True:
                yield b"data: x\n\n"
                await asyncio.sleep(0.01)

        return StreamingResponse(forever(), media_type="text/event-stream")

    app.add_middleware(
        ServerMiddleware,
        settings=SETTINGS,
        login=Login(None, cookie="c", title="t"),
        metrics=Metrics(),
        closing=closing,
    )
    return app, closing


@pytest.mark.parametrize("page", [False, True])
def test_a_server_that_has_ended_lets_go_of_its_model(page: bool) -> None:
    """A reload would otherwise keep every model that was ever served in memory."""

    async def made() -> FastAPI:  # inside a loop, because Gradio would make one, and never close it
        return create_app(replace(SETTINGS, page=page))

    app = asyncio.run(made())
    alive = weakref.ref(app.state.service.first.model)
    with calling(app) as client:
        assert client.get("/healthz").status_code == 200
    del app
    del client
    gc.collect()
    assert alive() is None


def test_a_reload_during_a_reload_is_done_after_it() -> None:
    made = list[str]()

    async def story() -> None:
        hold = threading.Event()

        def make() -> FastAPI:
            made.append("made")
            hold.wait()
            return _app("next", [], asyncio.Event())

        app = Reloadable(_app("first", [], asyncio.Event()), make)
        app.reload()
        while not made:
            await asyncio.sleep(0.001)
        app.reload()  # of what was changed since the first one read it
        app.reload()
        hold.set()
        while len(made) < 2:
            await asyncio.sleep(0.001)
        await app._reloading

    asyncio.run(story())
    assert len(made) == 2


def test_what_is_cut_off_at_the_end_is_told_to_come_again(gated: Any) -> None:
    app, _ = gated
    sent = list[dict[str, Any]]()

    async def story() -> None:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/slow",
            "headers": [(b"host", b"127.0.0.1")],
            "query_string": b"",
            "root_path": "",
        }

        async def receive() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        task = asyncio.create_task(app(scope, receive, send))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(story())
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"1") in sent[0]["headers"]


def test_a_stream_without_end_is_ended_with_the_server(gated: Any) -> None:
    app, closing = gated

    async def story() -> None:
        task = asyncio.create_task(_asked(app, "/beats"))
        await asyncio.sleep(0.05)
        assert not task.done()
        closing.set()
        async with asyncio.timeout(2):
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(story())


def test_the_listening_server_is_told_of_by_models(reward: RewardModel) -> None:
    with listening(SETTINGS, reward) as port:
        limits = httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["limits"]
    assert limits["max_request_tokens"] == SETTINGS.max_request_tokens
    assert limits["max_inflight_mib"] == SETTINGS.max_inflight_mib
