"""Pictures on the web: what is the row's fault, and what is the network's."""

import json
import shutil
import socket
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pyarrow.parquet
import pytest

from dina_lrm.cli.main import main
from dina_lrm.scaling import places
from tests.local_server import answering
from tests.unit.cli.fakes import use_brightness_model
from tests.unit.scaling.test_bulk import png

STATUS = {"/gone.png": 410, "/absent.png": 404, "/secret.png": 403, "/moved.png": 302}
FAILING = {"/fails.png": 500, "/busy.png": 429}


class Pictures(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0]
        status = STATUS.get(path) or (FAILING[path] if path in FAILING and self.server.ill else 200)
        self.send_response(status)
        if status == 302:
            self.send_header("location", "/100.png")
        body = png(100) if status == 200 else b"no"
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Score pictures, two a part, without trying again; the exit code."""
    monkeypatch.setattr(places, "HTTP_RETRIES", 0)
    places._web.cache_clear()
    use_brightness_model(monkeypatch)
    monkeypatch.chdir(tmp_path)

    def score(*urls):
        Path("rows.jsonl").write_text(
            "".join(json.dumps({"prompt": "p", "image": url}) + "\n" for url in urls)
        )
        arguments = ["--input", "rows.jsonl", "--output", "out.parquet", "--rows-per-part", "2"]
        return main(["score", *arguments])

    yield score
    places._web().close()
    places._web.cache_clear()


@pytest.fixture
def web(monkeypatch):
    from http.server import ThreadingHTTPServer

    monkeypatch.setattr(ThreadingHTTPServer, "ill", True, raising=False)
    with answering(Pictures) as address:
        yield address


def test_a_picture_that_is_not_there_is_a_reject(run, web, capsys):
    assert run(*(f"{web}{path}" for path in ("/100.png", *STATUS))) == 0
    table = pyarrow.parquet.read_table("out.parquet")
    assert table["score"].to_pylist() == pytest.approx([100 / 255, None, None, None, 100 / 255])
    for status, error in zip((410, 404, 403), table["error"].to_pylist()[1:4], strict=True):
        assert f"the server answers {status}" in error
    assert "3 rows could not be scored" in capsys.readouterr().err


@pytest.mark.parametrize("path", FAILING)
def test_a_server_that_fails_ends_the_run_and_a_second_one_goes_on(run, web, path, monkeypatch, capsys):
    urls = [f"{web}/{n}.png" for n in range(3)] + [f"{web}{path}"]
    assert run(*urls) == 1
    error = capsys.readouterr().err
    assert f"cannot fetch {web}{path}: the server answers {FAILING[path]}; what was done is kept" in error
    assert error.count("error:") == 1
    assert not Path("out.parquet").exists()
    monkeypatch.setattr("http.server.ThreadingHTTPServer.ill", False)
    assert run(*urls) == 0
    assert "continuing after 2 of 4 rows" in capsys.readouterr().err
    assert None not in pyarrow.parquet.read_table("out.parquet")["score"].to_pylist()


def test_no_server_no_name_and_no_answer_end_the_run(run, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        free = socket.create_server(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        monkeypatch.setattr(places, "HTTP_SECONDS", 0.2)
        for url in (
            f"http://127.0.0.1:{port}/a.png",
            "http://no-such-host.invalid/a.png",
            f"http://127.0.0.1:{silent.getsockname()[1]}/a.png",
        ):
            assert run(url) == 1
            assert f"cannot fetch {url}" in capsys.readouterr().err
            assert not Path("out.parquet").exists()
            shutil.rmtree("out.parquet.parts")
