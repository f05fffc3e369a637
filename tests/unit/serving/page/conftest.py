"""The bundled reward and generator, one thread that may use them, and pictures as uploads."""

import asyncio
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from dina_lrm import RewardModel
from dina_lrm.serving.page_model import PageModel
from dina_lrm.shapes.pipeline import load_pipeline
from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import parse_caption, sample_scene

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries, about themselves, while they are imported
    import gradio as gr

    from dina_lrm.serving.page import build_page, mount_page

PROMPT = "a red circle on a gray background"
OTHER = "a blue square on a white background"

T = TypeVar("T")


class ModelThread:
    """Runs jobs in a thread of its own, and remembers how many."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="the model's")
        self.jobs = 0

    def __call__(self, job: Callable[[], T], /) -> T:
        self.jobs += 1
        return self.pool.submit(job).result()

    @staticmethod
    def here() -> bool:
        return threading.current_thread().name.startswith("the model's")


@pytest.fixture(scope="session")
def reward() -> RewardModel:
    return RewardModel.from_pretrained("bundled").requires_grad_(False)


@pytest.fixture(scope="session")
def pipeline() -> Any:
    return load_pipeline()


@pytest.fixture
def run() -> Iterator[ModelThread]:
    thread = ModelThread()
    yield thread
    thread.pool.shutdown()


@pytest.fixture
def page_model(reward: RewardModel, run: ModelThread) -> PageModel:
    return PageModel(model=reward, run=run, max_megapixels=0.1, max_prompt_length=200)


def picture_of(caption: str, seed: int = 0) -> Image.Image:
    return render(sample_scene(np.random.default_rng(seed), parse_caption(caption)))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures and what only looks like one, by name."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, picture in (
        ("fits", picture_of(PROMPT)),
        ("other", picture_of(OTHER)),
        ("wide", picture_of(PROMPT).resize((96, 64))),
        ("narrow", Image.new("RGB", (64, 2))),
        ("huge", Image.new("1", (700, 700))),
    ):
        picture.save(folder / f"{name}.png")
    (folder / "text.png").write_text("not a picture")
    (folder / "bomb.png").write_bytes(bomb())
    return {path.stem: path for path in folder.iterdir()}


def bomb() -> bytes:
    """A PNG file that says it has 50000 x 50000 pixels, and has none."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


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
