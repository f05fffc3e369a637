"""The server behind nginx, with TLS and a prefix, by the configuration that is in deploy/."""

import json
import os
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_lrm import RewardModel
from tests.end_to_end.test_server import a_request, free_port, server

CONFIG = Path(__file__).parents[2] / "deploy" / "proxies" / "nginx.conf"
NGINX = shutil.which("nginx")
pytestmark = pytest.mark.skipif(
    NGINX is None or shutil.which("openssl") is None, reason="needs nginx, openssl"
)


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[tuple[str, ssl.SSLContext, Path]]:
    """Address under the prefix, what to trust, and the server's log."""
    key, certificate = tmp_path / "reward.key", tmp_path / "reward.pem"
    made = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost".split()
    made += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    log = tmp_path / "log"
    flags = ("--root-path", "/reward", "--proxies", "127.0.0.1", "--hosts", "localhost", "127.0.0.1")
    with server(log, *flags) as (_, url):
        port = free_port()
        text = CONFIG.read_text()
        for before, after in (
            ("127.0.0.1:8000", url.removeprefix("http://")),
            ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
            ("reward.example.org;", "localhost;"),
            ("/etc/nginx/reward.pem", str(certificate)),
            ("/etc/nginx/reward.key", str(key)),
        ):
            assert before in text
            text = text.replace(before, after)
        places = "".join(
            f"{kind}_temp_path {tmp_path / kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        # Started by root its workers are somebody else, who may not write into the test's folder.
        user = "user root;\n" if os.geteuid() == 0 else ""
        (tmp_path / "nginx.conf").write_text(
            f"{user}daemon off;\npid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{places}{text}}}\n"
        )
        nginx = subprocess.Popen([str(NGINX), "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path)])
        trusted = ssl.create_default_context(cafile=str(certificate))
        try:
            for _ in range(100):
                try:
                    urllib.request.urlopen(f"https://localhost:{port}/reward/healthz", context=trusted)
                    break
                except urllib.error.HTTPError:
                    raise
                except OSError:
                    time.sleep(0.1)
            yield f"https://localhost:{port}", trusted, log
        finally:
            nginx.terminate()
            nginx.wait(20)


def test_behind_nginx_with_a_prefix_and_tls(proxied: tuple[str, ssl.SSLContext, Path]) -> None:
    url, trusted, log = proxied
    body, expected = a_request(RewardModel.from_pretrained("bundled").requires_grad_(False), 2)

    def ask(path: str, data: bytes | None = None, **headers: str) -> tuple[int, str]:
        request = urllib.request.Request(f"{url}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60, context=trusted) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    protocol: dict[str, Any] = {
        "x-drm-protocol-version": "1",
        "content-type": "application/octet-stream",
        "origin": url,  # of the page itself, as a browser sends it
    }
    status, reply = ask("/reward/v1/score", body, **protocol)
    assert status == 200
    torch.testing.assert_close(torch.tensor(json.loads(reply)["raw_scores"]), expected, rtol=1e-6, atol=1e-5)
    assert ask("/reward/v1/score", body, **protocol | {"origin": "https://evil.example"})[0] == 403
    status, page = ask("/reward/docs")
    assert (status, "/reward/static-offline-docs/" in page) == (200, True)
    assert ask("/reward/static-offline-docs/swagger-ui.css")[0] == 200
    assert ask("/reward/openapi.json")[0] == 200
    lines = [json.loads(line) for line in log.read_text().splitlines() if '"request"' in line]
    assert {one["client"] for one in lines} == {"127.0.0.1"}
