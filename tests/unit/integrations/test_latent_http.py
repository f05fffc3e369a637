"""A function for trainers over one client a process; what a client does is tested in test_client."""

import pytest
import torch
from torch import Tensor

from dina_lrm import Client, Conditioning, InvalidInputError, RewardModel
from dina_lrm.errors import ScoringError
from dina_lrm.integrations.latent_http import score_latents
from tests.unit.integrations.server import Server

SIGMA = torch.tensor([0.4, 0.6])


def test_scores_are_those_of_the_model(
    server: Server, bundled: RewardModel, latents: Tensor, conditioning: Conditioning
) -> None:
    scores = score_latents(server.url, latents, conditioning, SIGMA, [7, -8])
    assert scores == bundled.score_latents(latents, conditioning, SIGMA, seed=[7, -8]).tolist()
    ((headers, tensors),) = server.requests
    assert headers[":path"] == "/v1/score"
    assert torch.equal(tensors["u"], SIGMA)
    assert tensors["seeds"].tolist() == [7, -8]


def test_one_client_for_each_server_and_its_settings(
    server: Server, latents: Tensor, conditioning: Conditioning, clients: list[Client]
) -> None:
    for _ in range(3):
        score_latents(server.url, latents, conditioning, SIGMA, None)
    assert len(clients) == 1
    score_latents(server.url, latents, conditioning, SIGMA, None, timeout_seconds=9.0)
    assert len(clients) == 2


def test_retries_are_as_many_as_asked_for(
    server: Server, latents: Tensor, conditioning: Conditioning, waits: list[float]
) -> None:
    server.replies = [(503, {}, b'{"error": "full"}')] * 3
    with pytest.raises(ScoringError, match=r"3 attempts.* HTTP 503: full"):
        score_latents(server.url, latents, conditioning, SIGMA, None, max_retries=2)
    assert len(waits) == 2


def test_what_is_no_server(latents: Tensor, conditioning: Conditioning) -> None:
    with pytest.raises(InvalidInputError, match="must start with http"):
        score_latents("file:///etc/hostname", latents, conditioning, SIGMA, None)
