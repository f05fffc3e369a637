"""Gradio's own routes: of them only what the page needs, and refusals in the server's own words."""

import json
import re
import uuid
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from fastapi.testclient import TestClient

from dina_lrm import RewardModel
from dina_lrm.serving import page as page_module
from dina_lrm.serving import page_parts, page_routes
from tests.unit.serving.page.conftest import PROMPT, built, mounted

# Gradio computes statistics of its queue with options of pandas that are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.PandasDeprecationWarning")


# --- Gradio's own routes -----------------------------------------------------------------------------------


def test_the_page_comes_with_its_policy_and_the_apps_routes_go_before(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "A &lt;title&gt;" in answer.text
    assert client.get("/healthz").json() == "mine"


def test_no_font_comes_from_elsewhere(client: TestClient) -> None:
    theme = client.get("/theme.css").text
    assert "system-ui" in theme
    assert not re.findall(r"""(?:url\(|@import)\s*["']?https?:""", theme)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/gradio_api/call/score",
        "/gradio_api/run/score",
        "/gradio_api/proxy=http://example.org/",
        "/gradio_api/file=http://example.org/a.png",
        "/gradio_api/component_server",
        "/gradio_api/vibe-code",
        "/gradio_api/run-history/records",
        "/gradio_api/process_recording",
        "/monitoring",
        "/login",
        "/pwa_icon",
        "/gradio_api/queue/join/../../info",
    ],
)
def test_other_routes_are_closed(client: TestClient, path: str) -> None:
    for method in ("GET", "POST", "HEAD"):
        assert client.request(method, path).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "pyproject.toml",
        "../../etc/passwd",
        "src/dina_lrm/serving/page.py",
        "file:///etc/passwd",
    ],
)
def test_no_file_but_uploads_is_read(client: TestClient, path: str) -> None:
    answer = client.get(f"/gradio_api/file={path}")
    assert answer.status_code in (403, 404)
    assert "root:" not in answer.text


def join(client: TestClient, page: gr.Blocks, tab: str, data: list[Any]) -> list[dict[str, Any]]:
    """The messages that a browser would get for a click."""
    number = next(key for key, one in page.fns.items() if getattr(one.fn, "__name__", "") == tab)
    session = uuid.uuid4().hex
    body = {"data": data, "fn_index": number, "session_hash": session}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    stream = client.get("/gradio_api/queue/data", params={"session_hash": session}).text
    return [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line]


def as_file(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def test_an_upload_is_scored_over_http(
    client: TestClient, page: gr.Blocks, files: dict[str, Path], reward: RewardModel
) -> None:
    sent = {"files": ("fits.png", files["fits"].read_bytes(), "image/png")}
    (path,) = client.post("/gradio_api/upload", files=sent).json()
    messages = join(client, page, "score", [as_file(path), PROMPT])
    done = next(one for one in messages if one["msg"] == "process_completed")
    assert done["success"], done
    (expected,) = reward.score(PROMPT, files["fits"], seed=0, num_draws=8).scores.tolist()
    assert f"{expected:.2f}".replace("-", "−") in json.dumps(messages, ensure_ascii=False)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "pyproject.toml", "http://127.0.0.1:1/a.png", "https://example.org/a.png"]
)
def test_only_uploads_are_opened(
    client: TestClient, page: gr.Blocks, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(page_module.PageModel, "open", lambda *values: opened.append(values))
    for tab, data in (
        ("score", [as_file(path), PROMPT]),
        ("compare", [as_file(path), as_file(path), PROMPT]),
        ("rank", [[as_file(path), as_file(path)], PROMPT]),
        ("generate", [as_file(path), 0, 4, 4.0]),
    ):
        messages = join(client, page, tab, data)
        done = next(one for one in messages if one["msg"] == "process_completed")
        assert done["success"] is False
        assert "root:" not in json.dumps(messages)
    assert opened == []


def test_uploads_do_not_stay(reward: RewardModel, files: dict[str, Path], tmp_path: Path) -> None:
    """They go an hour later, or with the server; a picture that is gone has to be uploaded again."""
    sent = [("files", (f"{name}.png", files[name].read_bytes(), "image/png")) for name in ("fits", "other")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
        page = built(reward)
        assert page.delete_cache == (600, 3600)
        with TestClient(mounted(page)) as client:
            first, second = map(Path, client.post("/gradio_api/upload", files=sent).json())
            assert first.is_file()
            assert second.is_file()
            assert tmp_path in first.parents
            first.unlink()
            messages = join(client, page, "score", [as_file(str(first)), PROMPT])
            assert "upload it again" in json.dumps(messages)
        assert not second.exists()


def test_large_uploads_are_refused(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, page: gr.Blocks
) -> None:
    assert page.max_file_size == page_module.MAX_FILE_BYTES
    monkeypatch.setattr(page, "max_file_size", 1000)
    sent = {"files": ("large.png", b"0" * 2000, "image/png")}
    assert client.post("/gradio_api/upload", files=sent).status_code == 413


# --- what is refused, in the server's own words ------------------------------------------------------------


def refused(answer: Any, status: int, text: str) -> None:
    assert answer.status_code == status, answer.text
    content = answer.json()
    assert set(content) == {"error", "field", "request_id"}
    assert text in content["error"]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"fn_index": -1}, "fn_index = -1: the page has no such function"),
        ({"fn_index": 10**6}, "fn_index = 1000000"),
        ({"fn_index": None}, "fn_index = None"),
        ({"fn_index": True}, "fn_index = True"),
        ({"data": []}, "data: a list of 2 values"),
        ({"data": "text"}, "data: a list of 2 values"),
        ({"session_hash": 7}, "session_hash"),
        ({"data": ["x" * 300_000, ""]}, "body: more than the 262144 bytes"),
    ],
)
def test_a_call_that_the_page_does_not_make(
    client: TestClient, page: gr.Blocks, capfd: pytest.CaptureFixture[str], changed: dict[str, Any], text: str
) -> None:
    number = next(key for key, one in page.fns.items() if getattr(one.fn, "__name__", "") == "score")
    body = {"data": [None, PROMPT], "fn_index": number, "session_hash": uuid.uuid4().hex} | changed
    refused(client.post("/gradio_api/queue/join", json=body), 413 if "bytes" in text else 422, text)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_body_that_is_no_call(client: TestClient) -> None:
    for body, text in ((b"", "body: not JSON"), (b"[1]", "body: it must be a JSON object")):
        refused(client.post("/gradio_api/queue/join", content=body), 422, text)


def test_bad_values_print_no_traceback(
    client: TestClient, page: gr.Blocks, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """They are told in the answer, and are one record of the log."""
    page_parts.log.propagate = True
    for data in ([PROMPT, "no number", 4, 4.0], [{"a": 1}, {}, [], None], [PROMPT, 0, 10**9, 4.0]):
        messages = join(client, page, "generate", data)
        done = next(one for one in messages if one["msg"] == "process_completed")
        assert done["success"] is False or "must be a whole number" in json.dumps(messages)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert len([one for one in caplog.records if "was refused" in one.message]) >= 1


def test_errors_of_the_page_look_like_the_others(client: TestClient) -> None:
    refused(client.get("/nothing"), 404, "/nothing: there is nothing here")
    refused(client.get("/gradio_api/file=/etc/passwd"), 403, "")
    refused(client.post("/gradio_api/queue/data"), 405, "Method Not Allowed")
    refused(client.get("/gradio_api/queue/data"), 422, "session_hash: Field required")


def test_uploads_have_a_quota(
    reward: RewardModel, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all of them together, what is under way among them; 503 says that it passes."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    data = files["fits"].read_bytes()
    monkeypatch.setattr(page_routes, "MAX_UPLOADED_BYTES", 3 * len(data))
    with TestClient(mounted(built(reward))) as client:

        def send(part: bytes) -> Any:
            return client.post("/gradio_api/upload", files={"files": ("a.png", part, "image/png")})

        assert send(data + b"1").status_code == 200
        assert send(data + b"2").status_code == 200
        refused(send(data + b"3"), 503, "uploads: no room for more")
        chunks = client.post("/gradio_api/upload", content=iter([data]))
        refused(chunks, 411, "content-length")
        for path in tmp_path.rglob("*.png"):
            path.unlink()
        assert send(data + b"3").status_code == 200
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.png")) <= 3 * len(data)


@pytest.mark.parametrize("headers", [{}, {"x-forwarded-host": "elsewhere.example"}])
def test_the_page_knows_no_address_of_its_own(client: TestClient, headers: dict[str, str]) -> None:
    """So it works behind any name, scheme and prefix; and no header makes it call another server."""
    assert '"root":"."' in client.get("/", headers=headers).text.replace(" ", "")
    assert client.get("/config", headers=headers).json()["root"] == "."
    assert "elsewhere.example" not in client.get("/", headers=headers).text


def test_nothing_is_offered_to_programs_and_the_queue_is_bounded(page: gr.Blocks) -> None:
    assert page.get_api_info()["named_endpoints"] == {}
    assert page.get_api_info()["unnamed_endpoints"] == {}
    assert page._queue.max_size == page_module.MAX_WAITING
    assert page.allowed_paths == []
    assert page.analytics_enabled is False
