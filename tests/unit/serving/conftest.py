"""The bundled reward behind an app, and requests to it."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor

from dina_lrm import Conditioning, RewardModel
from dina_lrm.remote.protocol import CONTENT_TYPE, VERSION_HEADER
from dina_lrm.serving.app import create_app
from dina_lrm.serving.connections import uvicorn_config
from dina_lrm.serving.settings import ServerSettings
from tests.pictures import encoded

HEADERS = {VERSION_HEADER: "1", "content-type": CONTENT_TYPE}
PROMPTS = ["a red circle on a gray background", "a big blue square on a white background"]


@pytest.fixture(scope="session")
def reward() -> RewardModel:
    return RewardModel.from_pretrained("bundled").requires_grad_(False)


@pytest.fixture(scope="session")
def server_settings() -> ServerSettings:
    return ServerSettings(page=False, max_wait_ms=0.0, max_body_mib=1.0, max_megapixels=0.1)


@pytest.fixture(scope="session")
def client(reward: RewardModel, server_settings: ServerSettings) -> Iterator[TestClient]:
    with calling(create_app(server_settings, reward)) as client:
        yield client


def calling(app: Any) -> TestClient:
    """A client in this process, under the name that a server on this machine goes by."""
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


@contextmanager
def listening(
    settings: ServerSettings, reward: RewardModel, several: dict[str, RewardModel] | None = None
) -> Iterator[int]:
    """A server on a real socket, in a thread; its port."""
    config = uvicorn_config(
        create_app(settings, several or reward),
        drain_seconds=5,
        header_seconds=settings.header_seconds,
        max_connections=settings.max_connections,
        proxies=settings.proxies,
    )
    config.port = 0
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def address(reward: RewardModel, server_settings: ServerSettings) -> Iterator[str]:
    with listening(server_settings, reward) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def conditioning(reward: RewardModel) -> Conditioning:
    return reward.encode_prompts(PROMPTS)


@pytest.fixture(scope="session")
def tensors(conditioning: Conditioning) -> dict[str, Tensor]:
    """Of a request that is right."""
    pooled = conditioning.pooled_prompt_embeds
    assert pooled is not None
    return {
        "latents": torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3)),
        "prompt_embeds": conditioning.prompt_embeds.clone(),
        "pooled_prompt_embeds": pooled.clone(),
        "u": torch.tensor([0.4, 0.15]),
        "seeds": torch.tensor([5, -7]),
    }


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """PNG files of 64 x 64 pixels."""
    rng = np.random.default_rng(0)
    return [png(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(3)]


def png(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels))


def form(request: dict[str, Any], **files: list[bytes]) -> dict[str, Any]:
    """What to pass to `client.post` for a form with pictures."""
    return {
        "data": {"request": json.dumps(request)},
        "files": [(name, ("a.png", file)) for name, several in files.items() for file in several],
    }
