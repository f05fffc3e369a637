"""`dina-lrm serve` as a process: what a client written from the protocol text gets, and how it ends."""

import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_lrm import RewardModel
from dina_lrm.cli.main import main


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def server(log: Path, *flags: str, module: str = "dina_lrm", **environment: str) -> Iterator[tuple[Any, str]]:
    """The process and its address, once it is healthy."""
    port = free_port()
    command = [sys.executable, "-m", module, *(["serve"] if module == "dina_lrm" else [])]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, "--no-page", "--port", str(port), *flags],
            stderr=sink,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(3000):  # five minutes, on a machine that has other work
            assert process.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"{address}/healthz", timeout=5) as reply:
                    if reply.status == 200:
                        break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError(f"the server is not up: {log.read_text()}")
        yield process, address
    finally:
        process.kill()
        process.wait()


def body_by_hand(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """safetensors bytes from the format's description alone: length, JSON header, data."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def a_request(reward: RewardModel, count: int) -> tuple[bytes, torch.Tensor]:
    """A body of `count` rows, written by hand, and the library's scores of them."""
    conditioning = reward.encode_prompts(["a red circle on a gray background"] * count)
    assert conditioning.pooled_prompt_embeds is not None
    latents = torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    u = torch.linspace(0.0, 1.0, count)
    seeds = list(range(count))

    def floats(tensor: torch.Tensor) -> tuple[str, list[int], bytes]:
        return "F32", list(tensor.shape), tensor.contiguous().numpy().astype("<f4").tobytes()

    body = body_by_hand(
        {
            "latents": floats(latents),
            "prompt_embeds": floats(conditioning.prompt_embeds),
            "pooled_prompt_embeds": floats(conditioning.pooled_prompt_embeds),
            "u": floats(u),
            "seeds": ("I64", [count], struct.pack(f"<{count}q", *seeds)),
        }
    )
    with torch.no_grad():
        return body, reward.score_latents(latents, conditioning, u, seed=seeds)


def send(address: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"{address}/v1/score",
        data=body,
        headers={"x-drm-protocol-version": "1", "content-type": "application/octet-stream"} | headers,
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def reward() -> RewardModel:
    return RewardModel.from_pretrained("bundled").requires_grad_(False)


def test_a_client_written_from_the_protocol_gets_the_librarys_scores(
    reward: RewardModel, tmp_path: Path
) -> None:
    body, expected = a_request(reward, 5)
    flags = ("--model-path", "bundled", "--dtype", "float32", "--max-batch-size", "2", "--max-wait-ms", "1")
    with server(tmp_path / "log", *flags, module="dina_lrm.serving", DINA_LRM_TOKEN="s3cret") as (
        process,
        url,
    ):
        assert send(url, body)[0] == 401
        status, reply = send(url, body, authorization="Bearer s3cret")
        assert status == 200
        assert reply["protocol_version"] == "1"
        torch.testing.assert_close(torch.tensor(reply["raw_scores"]), expected, rtol=1e-6, atol=1e-5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    log = (tmp_path / "log").read_text()
    assert "s3cret" not in log
    scored = [json.loads(line) for line in log.splitlines() if '"rows": 5' in line]
    assert scored[0].keys() >= {
        "request_id",
        "path",
        "status",
        "seconds",
        "encode_seconds",
        "forward_seconds",
    }


def test_sigterm_under_load_loses_nothing_that_was_taken(reward: RewardModel, tmp_path: Path) -> None:
    body, expected = a_request(reward, 2)
    answered, lock = set[str](), threading.Lock()

    def client(number: int, url: str) -> None:
        count = 0
        while True:
            name, count = f"{number}-{count}", count + 1
            try:
                status, reply = send(url, body, **{"x-request-id": name})
            except (OSError, urllib.error.URLError):
                return  # the server is gone, or was when this came
            if status == 200:
                torch.testing.assert_close(torch.tensor(reply["raw_scores"]), expected, rtol=1e-6, atol=1e-5)
                with lock:
                    answered.add(name)

    with server(tmp_path / "log", "--max-batch-size", "8") as (process, url):
        threads = [threading.Thread(target=client, args=(number, url)) for number in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        for thread in threads:
            thread.join(60)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line[:1] == "{"]
    taken = {one["request_id"] for one in lines if one.get("path") == "/v1/score" and one["status"] == 200}
    assert len(taken) > 8
    assert taken <= answered
    assert {one["status"] for one in lines if "status" in one} <= {200, 503}


def test_a_body_of_a_gigabyte_is_refused_and_the_server_goes_on(reward: RewardModel, tmp_path: Path) -> None:
    body, _ = a_request(reward, 1)
    with server(tmp_path / "log") as (_, url):
        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(
                b"POST /v1/score HTTP/1.1\r\nhost: localhost\r\nx-drm-protocol-version: 1\r\n"
                b"content-type: application/octet-stream\r\ncontent-length: 1073741824\r\n\r\n"
            )
            part = b"\0" * 2**20
            for _ in range(1024):
                connection.sendall(part)
            answer = b""
            while b"}" not in answer and (more := connection.recv(4096)):
                answer += more
        assert answer.startswith(b"HTTP/1.1 413")
        assert b'"field":"body"' in answer
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:  # leaves in the middle
            connection.sendall(
                b"POST /v1/score HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nabc"
            )
        assert send(url, body)[0] == 200


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "no/such/folder"), "no/such/folder"),
        (("--max-batch-size", "0"), "max_batch_size = 0"),
        (("--port", "70000"), "port = 70000: must be in [0, 65535]"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--replicas", "0"), "--replicas is at least 1"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--no-page", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_is_loaded_ends_the_server(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "dina_lrm", "serve", "--no-page", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if '"loading bundled' in line:
                break
        process.send_signal(number)
        said = process.stderr.read()
        assert process.wait(60) == 128 + number
    assert "interrupted" in said
    assert "Traceback" not in said


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "dina_lrm", "serve", "--no-page", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 2
    assert f"cannot listen at --host 127.0.0.1 --port {port}: Address already in use" in done.stderr
    assert "loading bundled" not in done.stderr
    assert "Traceback" not in done.stderr


def test_out_of_files_it_says_so_and_goes_on(reward: RewardModel, tmp_path: Path) -> None:
    """In a few lines, not in one for each connection that waits, again and again."""
    body, _ = a_request(reward, 1)
    with server(tmp_path / "log") as (process, url):
        open_files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (open_files + 20, open_files + 20))
        port = int(url.rsplit(":", 1)[1])
        waiting = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(200)]
        time.sleep(3)
        for one in waiting:
            one.close()
        time.sleep(2)
        assert send(url, body)[0] == 200
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if "out of system resource" in line]
    assert 1 <= len(lines) <= 10


def test_sighup_loads_anew_and_loses_no_request(reward: RewardModel, tmp_path: Path) -> None:
    """Under load; settings are read again, too."""
    body, expected = a_request(reward, 1)
    config = tmp_path / "serve.toml"
    config.write_text("max_rows = 5\n")
    with server(tmp_path / "log", "--config", str(config)) as (process, url):

        def limit() -> int:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as reply:
                return json.loads(reply.read())["limits"]["max_rows"]

        answers, done = list[int](), threading.Event()

        def client() -> None:
            while not done.is_set():
                status, reply = send(url, body)
                answers.append(status)
                torch.testing.assert_close(torch.tensor(reply["raw_scores"]), expected, rtol=1e-6, atol=1e-5)

        threads = [threading.Thread(target=client) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert limit() == 5
        config.write_text("max_rows = 6\n")
        process.send_signal(signal.SIGHUP)
        for _ in range(1200):
            if limit() == 6:
                break
            time.sleep(0.1)
        assert limit() == 6
        config.write_text("max_rowz = 6\n")
        process.send_signal(signal.SIGHUP)
        for _ in range(600):
            if "the reload failed" in (tmp_path / "log").read_text():
                break
            time.sleep(0.1)
        assert limit() == 6
        done.set()
        for thread in threads:
            thread.join(60)
    assert len(answers) > 10
    assert set(answers) == {200}
    assert "'max_rowz' is no setting" in (tmp_path / "log").read_text()


def test_a_hangup_while_the_model_loads_is_heeded(tmp_path: Path) -> None:
    """As `systemctl reload` right after a start."""
    port, log = free_port(), tmp_path / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "dina_lrm", "serve", "--no-page", "--port", str(port)], stderr=sink
        )
    try:
        for said in ("loading bundled", "reloaded"):
            for _ in range(3000):
                assert process.poll() is None, log.read_text()
                if said in log.read_text():
                    break
                time.sleep(0.02)
            if said == "loading bundled":
                process.send_signal(signal.SIGHUP)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=30) as reply:
            assert reply.status == 200
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
