"""The bundled reward, and pictures and latents that it can score."""

import types
from collections.abc import Iterator

import httpx_retries.retry
import pytest
import torch
from torch import Tensor

from dina_lrm import Client, Conditioning, RewardModel
from dina_lrm.integrations import latent_http
from tests.unit.integrations.server import Server, serving

PROMPTS = ["a red circle on a gray background", "a blue square on a white background"]


@pytest.fixture(scope="session")
def bundled() -> RewardModel:
    return RewardModel.from_pretrained("bundled").requires_grad_(False)


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return PROMPTS


@pytest.fixture(scope="session")
def pictures() -> Tensor:
    """(2, 3, 64, 64), uint8: a red and a blue block, with some noise so that none is like another."""
    pixels = torch.randint(
        0, 60, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    pixels[0, 0, 16:48, 16:48] += 180
    pixels[1, 2, 16:48, 16:48] += 180
    return pixels


@pytest.fixture(scope="session")
def latents() -> Tensor:
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def conditioning(bundled: RewardModel) -> Conditioning:
    return bundled.encode_prompts(PROMPTS)


@pytest.fixture
def server(bundled: RewardModel) -> Iterator[Server]:
    with serving(bundled) as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a client would have waited between attempts."""
    found: list[float] = []
    monkeypatch.setattr(httpx_retries.retry, "time", types.SimpleNamespace(sleep=found.append))
    return found


@pytest.fixture(autouse=True)
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Client]]:
    """Those that this process has made, which are closed after the test."""
    made: list[Client] = []

    def make(*arguments: object, **settings: object) -> Client:
        made.append(Client(*arguments, **settings))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(latent_http, "Client", make)
    latent_http._client.cache_clear()
    yield made
    latent_http._client.cache_clear()
    for one in made:
        one.close()
