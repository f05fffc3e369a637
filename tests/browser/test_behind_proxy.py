"""Both pages behind nginx: TLS, a name of their own, a prefix that it strips or leaves, and a token."""

import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from dina_lrm.serving.labelling.store import VoteStore
from tests.browser.labelling import COMMAND, write_items

pytestmark = [
    pytest.mark.browser,
    # Gradio computes statistics of its queue with options of pandas that are on their way out.
    pytest.mark.filterwarnings("ignore::pandas.errors.PandasDeprecationWarning"),
]

NAME = "pages.example.org"
CONFIG = """
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_max_body_size 64m;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {folder}/certificate.pem;
        ssl_certificate_key {folder}/key.pem;
        proxy_set_header Host $host;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        proxy_set_header X-Forwarded-Proto $scheme;
        proxy_buffering off;
        location /label/ {{ proxy_pass http://127.0.0.1:{label}; }}       # the prefix is left
        location /reward/ {{ proxy_pass {address}; }}                     # the prefix is stripped
    }}
}}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def proxied(address, tmp_path_factory):
    """nginx before the page and before `dina-lrm label`; its address, and the folder of the votes."""
    if shutil.which("nginx") is None or shutil.which("openssl") is None:
        pytest.skip("nginx or openssl is not installed")
    folder = tmp_path_factory.mktemp("proxy")
    write_items(folder, 4)
    subject = ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
    certificate = ["-keyout", folder / "key.pem", "-out", folder / "certificate.pem"]
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run([*request, *subject, *certificate], check=True, capture_output=True)
    label, port = free_port(), free_port()
    (folder / "nginx.conf").write_text(CONFIG.format(folder=folder, port=port, label=label, address=address))
    options = ["--port", str(label), "--root-path", "/label", "--hosts", NAME, "--proxies", "127.0.0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DINA_LRM_TOKEN": "open sesame"}
    servers = [
        subprocess.Popen([*COMMAND, *options], cwd=folder, env=environment),
        subprocess.Popen(["nginx", "-c", folder / "nginx.conf", "-g", "daemon off; master_process off;"]),
    ]
    try:
        trust = ssl._create_unverified_context()
        for _ in range(900):
            try:
                health = f"https://127.0.0.1:{port}/label/healthz"
                if httpx.get(health, verify=trust, trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert [server.poll() for server in servers] == [None, None]
            time.sleep(0.1)
        yield f"https://{NAME}:{port}", folder
    finally:
        for server in servers:
            server.send_signal(signal.SIGTERM)
            server.wait()


@pytest.fixture
def page(playwright_chromium):
    context = playwright_chromium.new_context(ignore_https_errors=True)
    page = context.new_page()
    page.set_default_timeout(120_000)
    yield page
    context.close()


@pytest.fixture(scope="module")
def playwright_chromium(browser):
    """A browser that finds the name on this machine."""
    instance = browser.browser_type.launch(
        executable_path=shutil.which("chromium"),
        args=["--headless", "--no-sandbox", "--disable-gpu", f"--host-resolver-rules=MAP {NAME} 127.0.0.1"],
    )
    yield instance
    instance.close()


def complaints(page: Any) -> list[str]:
    """What the browser says against the page, as it comes; not that a proxy has no icon at its own root."""
    found: list[str] = []

    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("response", lambda reply: found.append(reply.url) if reply.status >= 400 else None)
    return found


def test_the_page_scores_and_generates(page, proxied, screenshots):
    address, _ = proxied
    found = complaints(page)
    page.goto(f"{address}/reward/")
    panel = page.locator("[role=tabpanel]:visible")
    panel.get_by_role("button", name="sharp or blurred").click()
    panel.get_by_text("Numbers").wait_for()
    assert "A is preferred" in panel.locator(".reward-verdict").inner_text()
    loaded = "images => images.every(image => image.naturalWidth > 0)"
    assert panel.locator(".reward-picture img").evaluate_all(loaded)
    page.screenshot(path=screenshots / "proxy-page.png", full_page=True)
    page.get_by_role("tab", name="Generate").click()
    panel.get_by_role("button", name="Generate", exact=True).click()
    panel.locator(".reward-number").wait_for()
    final = panel.locator(".reward-picture img")
    final.wait_for()
    assert final.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    assert [one for one in found if urlsplit(one).path != "/favicon.ico"] == []


def test_labelling(page, proxied, screenshots):
    address, folder = proxied
    page.goto(f"{address}/label/")
    page.get_by_label("Access token").fill("open sesame")
    page.keyboard.press("Enter")
    page.get_by_label("Your name").wait_for()
    (cookie,) = page.context.cookies()
    assert (cookie["secure"], cookie["httpOnly"], cookie["path"]) == (True, True, "/label/")
    found = complaints(page)
    page.get_by_label("Your name").fill("Ada")
    page.keyboard.press("Enter")
    ready = page.locator('#work:not([hidden]) #left[aria-disabled="false"]')
    ready.wait_for()
    page.screenshot(path=screenshots / "proxy-label.png")
    assert page.locator("#left").evaluate("one => getComputedStyle(one).color") == "rgb(255, 255, 255)"
    page.keyboard.press("ArrowLeft")
    page.locator('#mine[value="1"]').wait_for()
    page.keyboard.press("z")
    page.locator('#mine[value="0"]').wait_for()
    ready.wait_for()
    page.keyboard.press("ArrowRight")
    page.locator('#mine[value="1"]').wait_for()
    store = VoteStore(Path(folder) / "votes.sqlite")
    assert [vote.choice for vote in store.votes()] == ["right"]
    key = store.results_key
    store.close()
    page.goto(f"{address}/label/results#{key}")
    page.get_by_role("rowheader", name="Ada").wait_for()
    assert found == []
