"""What the page answers, and what it refuses: wrong input in words, and of Gradio what it does not need."""

import asyncio
import json
import re
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from dina_lrm import RewardModel
from dina_lrm.errors import ScoringError
from dina_lrm.serving import page as page_module
from dina_lrm.serving import page_parts, page_routes
from dina_lrm.serving.page import MAX_PICTURES, build_page, mount_page
from dina_lrm.shapes.pipeline import GUIDANCE_SCALE
from tests.unit.serving.page.conftest import OTHER, PROMPT

# Gradio computes statistics of its queue with options of pandas that are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.PandasDeprecationWarning")


def built(reward: RewardModel, **options: Any) -> gr.Blocks:
    """A page that was built within an event loop: outside, Gradio makes loops of its own, and leaves them."""

    async def build() -> gr.Blocks:
        return build_page(reward, **options)

    return asyncio.run(build())


@pytest.fixture(scope="module")
def page(reward: RewardModel, pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[gr.Blocks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        yield built(reward, pipeline=pipeline, title="A <title>")


def mounted(page: gr.Blocks) -> FastAPI:
    app = FastAPI()

    @app.get("/healthz")
    def healthz() -> str:
        return "mine"

    async def mount() -> None:
        mount_page(app, page)

    asyncio.run(mount())
    return app


@pytest.fixture(scope="module")
def client(page: gr.Blocks) -> Iterator[TestClient]:
    with TestClient(mounted(page)) as client:
        yield client


def handler(page: gr.Blocks, name: str) -> Any:
    return next(one.fn for one in page.fns.values() if getattr(one.fn, "__name__", "") == name)


def upload(path: Path) -> dict[str, str]:
    return {"path": str(path)}


# --- answers -----------------------------------------------------------------------------------------------


def test_a_score(page: gr.Blocks, reward: RewardModel, files: dict[str, Path]) -> None:
    first, last = handler(page, "score")(upload(files["fits"]), PROMPT)
    (expected,) = reward.score(PROMPT, files["fits"], seed=0, num_draws=8).scores.tolist()
    shown = f"{expected:.2f}".replace("-", "−")
    assert shown in first
    assert shown in last
    assert last.count("<tr>") == 10  # nine levels and the head


def test_a_comparison_is_the_librarys(page: gr.Blocks, reward: RewardModel, files: dict[str, Path]) -> None:
    *_, last = handler(page, "compare")(upload(files["fits"]), upload(files["other"]), PROMPT)
    expected = reward.compare(PROMPT, files["fits"], files["other"], num_draws=8)
    assert expected > 0.5
    assert f"A {100 * expected:.1f} %" in last


def test_a_ranking_is_the_librarys(page: gr.Blocks, reward: RewardModel, files: dict[str, Path]) -> None:
    paths = [files[name] for name in ("other", "fits", "wide")]
    *steps, last = handler(page, "rank")([upload(path) for path in paths], PROMPT)
    assert len(steps) == 3
    expected = reward.rank(PROMPT, paths, num_draws=8)
    names = [Path(one.image).name for one in expected]
    assert [row[0] for row in re.findall(r'reward-text">(\w+\.png)()', last[2])] == names
    assert "marks a place" not in last[2]  # these three are told apart
    captions = [caption for _, caption in last[1]["value"]]
    assert captions == [
        f"{place}: {one.score:.2f}".replace("-", "−") for place, one in enumerate(expected, start=1)
    ]


def test_equal_pictures_share_a_place(page: gr.Blocks, files: dict[str, Path]) -> None:
    *_, last = handler(page, "rank")([upload(files[name]) for name in ("fits", "other", "fits")], PROMPT)
    captions = [caption for _, caption in last[1]["value"]]
    assert [caption.partition(":")[0] for caption in captions] == ["=1", "=1", "3"]
    assert "marks a place" in last[2]


@pytest.mark.long
def test_a_shrunk_picture_is_told(page: gr.Blocks, tmp_path: Path) -> None:
    """Twice the pixels that are taken, as a telephone makes them, on every tab that takes pictures."""
    Image.new("1", (8000, 4000)).save(tmp_path / "large.png")
    large = upload(tmp_path / "large.png")
    told = "was shrunk from 8000x4000 to"
    assert told in next(iter(handler(page, "score")(large, PROMPT)))
    assert told in next(iter(handler(page, "compare")(large, large, PROMPT)))
    *_, last = handler(page, "rank")([large, large], PROMPT)
    assert last[2].count(told) == 2


def test_a_sampling(page: gr.Blocks) -> None:
    *steps, last = handler(page, "generate")(PROMPT, 3, 4, GUIDANCE_SCALE)
    assert len(steps) == 4
    assert "Step 4 of 4" in steps[-1][0]
    assert steps[-1][2].count("<figure>") == 4
    assert steps[-1][2].count("<tr>") == 5
    assert last[1]["value"].size == (64, 64)
    again = list(handler(page, "generate")(PROMPT, 3, 4, GUIDANCE_SCALE))
    assert again[-1][0] == last[0]


def test_what_was_not_understood_is_noted(page: gr.Blocks, files: dict[str, Path]) -> None:
    first, _ = handler(page, "score")(upload(files["fits"]), "a red <zebra> on a gray background")
    assert re.search(r'role="note">[^<]*zebra', first)


def test_examples_fit_the_inputs_and_are_told_apart(page: gr.Blocks, reward: RewardModel) -> None:
    """Every example fills the inputs of its tab; of the first comparison, the sharp picture is preferred."""
    examples = [one for one in page.fns.values() if hasattr(one.fn, "args")]
    assert len(examples) == 11
    for one in examples:
        values = one.fn()
        assert len(one.outputs) == (len(values) if isinstance(values, tuple | list) else 1)
    compared = [one.fn() for one in examples if len(one.outputs) == 3]
    sharp, blurred, prompt = compared[0]
    assert reward.compare(prompt, sharp, blurred) > 0.5
    (ranked,) = [one for one in examples if len(one.outputs) == 2 and isinstance(one.outputs[0], gr.File)]
    paths, prompt = ranked.fn()
    assert len(paths) == 4
    assert Path(reward.rank(prompt, paths)[0].image).name == "fits.png"


def test_a_page_alone_takes_one_job_at_a_time() -> None:
    run, inside, most = page_module.one_at_a_time(), [0], [0]

    def job() -> int:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        inside[0] -= 1
        return 7

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: run(job), range(16))) == [7] * 16
    assert most == [1]


def test_no_generator(reward: RewardModel) -> None:
    page = built(reward)
    assert "This server has no generator" in json.dumps(page.get_config_file())
    assert not [one for one in page.fns.values() if getattr(one.fn, "__name__", "") == "generate"]


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tab", "values", "told"),
    [
        ("score", (None, PROMPT), "Picture: none is given"),
        ("score", ("fits", ""), "Prompt: empty"),
        ("score", ("text", PROMPT), "Picture: not a readable picture"),
        ("score", ("bomb", PROMPT), "Picture: far more than the 64 million pixels that are taken"),
        ("compare", ("fits", None, PROMPT), "Picture B: none is given"),
        ("compare", ("narrow", "fits", PROMPT), "Picture A of 64x2 pixels is too small"),
        ("rank", (None, PROMPT), f"Pictures: 0 given, 2 to {MAX_PICTURES} can be ranked"),
        ("rank", (["fits"], PROMPT), f"Pictures: 1 given, 2 to {MAX_PICTURES} can be ranked"),
        ("rank", (["fits"] * 65, PROMPT), f"Pictures: 65 given, 2 to {MAX_PICTURES} can be ranked"),
        ("rank", (["fits", "text"], PROMPT), "text.png: not a readable picture"),
        ("generate", ("", 0, 4, 4.0), "Prompt: empty"),
        ("generate", (PROMPT, -1, 4, 4.0), "seed = -1: must be a whole number"),
    ],
)
def test_wrong_input_is_told_in_place_of_the_result(
    page: gr.Blocks, files: dict[str, Path], tab: str, values: tuple[Any, ...], told: str
) -> None:
    def given(value: Any) -> Any:
        if isinstance(value, list):
            return [given(one) for one in value]
        return upload(files[value]) if isinstance(value, str) and value in files else value

    with pytest.warns(UserWarning, match=re.escape(told)):
        *_, last = handler(page, tab)(*map(given, values))
    alert, *others = last if isinstance(last, tuple) else (last,)
    assert 'role="alert"' in alert
    assert told in alert
    assert all(one == "" or one["visible"] is False for one in others)


def test_a_busy_server_is_told(reward: RewardModel, files: dict[str, Path]) -> None:
    def busy(job: Any) -> Any:
        raise ScoringError("the server is busy: try again in a moment")

    page = built(reward, run=busy)
    with pytest.warns(UserWarning, match="busy"):
        (alert,) = handler(page, "score")(upload(files["fits"]), OTHER)
    assert "try again in a moment" in alert


def test_a_fault_is_logged_and_not_shown(
    reward: RewardModel, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(job: Any) -> Any:
        raise RuntimeError("/a/secret/path")

    page = built(reward, run=broken)
    page_parts.log.propagate = True
    with pytest.warns(UserWarning, match="A fault of the server"):
        (alert,) = handler(page, "score")(upload(files["fits"]), PROMPT)
    assert "secret" not in alert
    assert "/a/secret/path" in caplog.text


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


def test_a_probability_comes_first(page: gr.Blocks) -> None:
    tabs = [one.label for one in page.blocks.values() if isinstance(one, gr.Tab)]
    assert tabs == ["Compare", "Rank", "Score", "Generate"]


def test_nothing_is_offered_to_programs_and_the_queue_is_bounded(page: gr.Blocks) -> None:
    assert page.get_api_info()["named_endpoints"] == {}
    assert page.get_api_info()["unnamed_endpoints"] == {}
    assert page._queue.max_size == page_module.MAX_WAITING
    assert page.allowed_paths == []
    assert page.analytics_enabled is False
