"""Debian's Chromium, a server with the page alone, and where screenshots are kept."""

import asyncio
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from dina_lrm import RewardModel
from dina_lrm.errors import ScoringError
from dina_lrm.shapes.pipeline import load_pipeline


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(
            executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        yield instance
        instance.close()


@pytest.fixture
def screenshots(tmp_path):
    """The folder that TEST_SCREENSHOTS names, or one of the test's own."""
    folder = Path(os.environ.get("TEST_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class ModelThread:
    """Runs jobs in one thread, and counts them; refuses them while `busy`."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.jobs = 0
        self.busy = False

    def __call__(self, job: Callable[[], Any], /) -> Any:
        if self.busy:
            raise ScoringError("the server is busy: try again in a moment")
        self.jobs += 1
        return self.pool.submit(job).result()


@pytest.fixture(scope="module")
def reward():
    return RewardModel.from_pretrained("bundled").requires_grad_(False)


@pytest.fixture(scope="module")
def model_thread():
    thread = ModelThread()
    yield thread
    thread.pool.shutdown()


@pytest.fixture(scope="module")
def address(reward, model_thread, tmp_path_factory):
    """Of a server with the page alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Gradio's own imports
        from dina_lrm.serving.page import build_page, mount_page

    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        app = FastAPI()
        mount_page(app, build_page(reward, run=model_thread, pipeline=load_pipeline()))
        servers.append(uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none")))
        await servers[0].serve()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        while not (servers and servers[0].started):
            assert thread.is_alive()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{servers[0].servers[0].sockets[0].getsockname()[1]}/"
        servers[0].force_exit = servers[0].should_exit = True
        thread.join()
