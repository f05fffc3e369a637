"""`dina-lrm label` as a user runs it: mistakes are one line and exit code 2; the server says where it is."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dina_lrm.cli.main import main
from tests.rows import write_json_lines
from tests.unit.serving.labelling.conftest import make_items


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "absent.jsonl"], "no items to label: nothing at absent.jsonl"),
        (["--choose", "uncertain"], "needs a reward"),
        (["--raters-per-pair", "0"], "--raters-per-pair is at least 1; got 0"),
        (["--root-path", "label"], "root_path = 'label': it begins with / and does not end with it"),
        (["--root-path", "//evil"], "root_path = '//evil'"),
        (["--proxies", "nginx"], "proxies: 'nginx' is neither an address nor a network"),
        (["--hosts", "a b"], "hosts: 'a b' is no name of a host"),
        (["--port", "70000"], "port = 70000: must be in [0, 65535]"),
        (["--token", " "], "--token is empty"),
        (["--output", "absent/votes.sqlite"], "no folder absent"),
        (["--output", "items.jsonl"], "items.jsonl cannot be used as a file of votes"),
        (["--host", "192.0.2.1"], "cannot listen at --host 192.0.2.1"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    make_items(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    assert main(["label", "--input", "items.jsonl", "--output", "votes.sqlite", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert "Traceback" not in error


def test_a_taken_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_items(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["label", "--input", "items.jsonl", "--output", "votes.sqlite", "--port", port]) == 2
    assert f"--port {port}: Address already in use" in capsys.readouterr().err


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The command in its own process, and its addresses: of the page, and of the results."""
    command = [
        sys.executable,
        "-m",
        "dina_lrm",
        "label",
        "--input",
        "items.jsonl",
        "--output",
        "votes.sqlite",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--port", "0", *arguments], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if "/results#" in line:
                    break
            else:
                pytest.fail(f"no address: {''.join(lines)}")
            yield process, lines[-2].split()[0], line.split()[0]
        finally:
            process.kill()


def results(address: str) -> dict[str, Any]:
    """What the page behind the link for the results shows."""
    page, _, key = address.partition("/results#")
    return httpx.get(f"{page}/api/results", headers={"x-results-key": key}).json()


@pytest.mark.long
def test_it_starts_serves_and_stops(tmp_path: Path) -> None:
    """Rows that give no pair are listed meanwhile."""
    path = make_items(tmp_path, 2)
    good = path.read_text()
    write_json_lines(path, [{"prompt": "p", "images": ["absent.png", "0.png"]}])
    path.write_text(good + path.read_text())
    with running(tmp_path) as (process, address, link):
        assert httpx.get(f"{address}/api/next", params={"rater": "ada"}).json()["left"] == 2
        assert results(link)["rejected_rows"] == 1
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=20)
        assert process.returncode == 0, rest
        assert "next: dina-lrm label export votes.sqlite" in rest
        logged = [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
        assert [(one["path"], one["status"]) for one in logged if one["message"] == "request"] == [
            ("/api/next", 200),
            ("/api/results", 200),
        ]
    assert '"row": 2' in (tmp_path / "votes.rejects.jsonl").read_text()
    assert "absent.png" in (tmp_path / "votes.rejects.jsonl").read_text()


@pytest.mark.long
def test_the_page_is_there_while_the_reward_is_loading(tmp_path: Path) -> None:
    make_items(tmp_path, 3)
    with running(tmp_path, "--model", "bundled") as (process, address, link):
        first = results(link)["reward"]
        assert first != "has looked at all 3 pairs"
        assert httpx.get(f"{address}/api/next", params={"rater": "ada"}).json()["pair"] is not None
        for _ in range(300):
            if results(link)["reward"] == "has looked at all 3 pairs":
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=30)
        assert process.returncode == 0, rest
    with sqlite3.connect(tmp_path / "votes.sqlite") as database:
        assert database.execute("SELECT count(*) FROM probabilities").fetchone()[0] == 3
    database.close()


def test_a_reward_that_is_none_ends_the_server(tmp_path: Path) -> None:
    make_items(tmp_path, 2)
    with running(tmp_path, "--model", "absent-folder/") as (process, *_):
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 2, rest
    assert "absent-folder" in rest
    assert "Traceback" not in rest
