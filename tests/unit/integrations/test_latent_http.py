"""Protocol version 1, as it is on the wire, and all that a server can do wrong."""

import socket
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_lrm import Conditioning, InvalidInputError, RewardModel
from dina_lrm.errors import ScoringError
from dina_lrm.integrations.latent_http import score_latents
from tests.unit.integrations.server import Server, ok

SIGMA = torch.tensor([0.4, 0.6])


def test_what_is_sent(server: Server, latents: Tensor, conditioning: Conditioning) -> None:
    score_latents(server.url, latents.bfloat16(), conditioning, SIGMA, [7, -1])
    ((headers, tensors),) = server.requests
    assert headers[":path"] == "/v1/score"
    assert headers["content-type"] == "application/octet-stream"
    assert headers["x-drm-protocol-version"] == "1"
    assert sorted(tensors) == ["latents", "pooled_prompt_embeds", "prompt_embeds", "seeds", "u"]
    assert torch.equal(tensors["latents"], latents.bfloat16())
    assert torch.equal(tensors["prompt_embeds"], conditioning.prompt_embeds)
    assert tensors["u"].dtype == torch.float32
    assert torch.equal(tensors["u"], SIGMA)
    assert tensors["seeds"].dtype == torch.int64
    assert tensors["seeds"].tolist() == [7, -1]


def test_scores_are_those_of_the_model(
    server: Server, bundled: RewardModel, latents: Tensor, conditioning: Conditioning
) -> None:
    scores = score_latents(server.url, latents, conditioning, SIGMA, [7, 8])
    assert scores == bundled.score_latents(latents, conditioning, SIGMA, seed=[7, 8]).tolist()


def test_fresh_noise_sends_no_seeds(server: Server, latents: Tensor, conditioning: Conditioning) -> None:
    score_latents(server.url, latents.clone().requires_grad_(), conditioning, SIGMA, None)
    assert "seeds" not in server.requests[0][1]


@pytest.mark.parametrize(
    "passing", [(503, {}, b"full"), (408, {}, b""), (429, {}, b""), (500, {}, b"oops"), None]
)
def test_what_passes_is_tried_again(
    server: Server, latents: Tensor, conditioning: Conditioning, waits: list[float], passing: Any
) -> None:
    server.replies = [passing, passing]
    scores = score_latents(server.url, latents, conditioning, SIGMA, [0, 0])
    assert len(scores) == 2
    assert len(server.requests) == 3
    assert waits == [0.5, 1.0]


def test_retry_after_is_respected_up_to_the_time_out(
    server: Server, latents: Tensor, conditioning: Conditioning, waits: list[float]
) -> None:
    server.replies = [(503, {"Retry-After": "4"}, b""), (503, {"Retry-After": "4000"}, b"")]
    score_latents(server.url, latents, conditioning, SIGMA, [0, 0], timeout_seconds=30.0)
    assert waits == [4.0, 30.0]


def test_an_overloaded_server_is_given_up(
    server: Server, latents: Tensor, conditioning: Conditioning, waits: list[float]
) -> None:
    server.replies = [(503, {}, b'{"error": "queue is full"}')] * 4
    with pytest.raises(ScoringError, match=r"no score in 4 attempts, at last: HTTP 503: .*queue is full"):
        score_latents(server.url, latents, conditioning, SIGMA, [0, 0], max_retries=3)
    assert waits == [0.5, 1.0, 2.0]


def test_no_server(latents: Tensor, conditioning: Conditioning, waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ScoringError, match=f"127.0.0.1:{port}/v1/score gave no score in 3 attempts.*refused"):
        score_latents(f"http://127.0.0.1:{port}/v1/score", latents, conditioning, SIGMA, None)
    assert waits == [0.5, 1.0]


def test_a_server_that_says_nothing(latents: Tensor, conditioning: Conditioning) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/score"
        with pytest.raises(ScoringError, match="no score in 1 attempts, at last: TimeoutError"):
            score_latents(url, latents, conditioning, SIGMA, None, timeout_seconds=0.1, max_retries=0)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((400, {}, b'{"error": "u is outside [0, 1]"}'), r'refuses: HTTP 400: {"error": "u is outside'),
        ((404, {}, b"no such page"), "refuses: HTTP 404: no such page"),
        ((200, {}, b"<html>"), "which is not JSON"),
        (ok([1.0, 2.0]), "protocol version None"),
        (ok({"raw_scores": [1.0, 2.0]}), "protocol version None: this client speaks '1'"),
        (ok({"protocol_version": "2", "raw_scores": [1.0, 2.0]}), "protocol version '2'"),
        (ok({"protocol_version": "1"}), "raw_scores = None: expected 2 finite numbers"),
        (ok({"protocol_version": "1", "raw_scores": [1.0]}), r"\[1.0\]: expected 2 finite"),
        (ok({"protocol_version": "1", "raw_scores": [1.0, float("nan")]}), r"\[1.0, nan\]: expected 2"),
        (ok({"protocol_version": "1", "raw_scores": [float("inf"), 1.0]}), r"\[inf, 1.0\]: expected 2"),
        (ok({"protocol_version": "1", "raw_scores": ["1.0", True]}), "expected 2 finite"),
    ],
)
def test_refusals_and_broken_replies_are_final(
    server: Server, latents: Tensor, conditioning: Conditioning, reply: Any, message: str
) -> None:
    server.replies = [reply]
    with pytest.raises(ScoringError, match=message):
        score_latents(server.url, latents, conditioning, SIGMA, [0, 0])
    assert len(server.requests) == 1


def test_bad_input_is_never_sent(server: Server, latents: Tensor, conditioning: Conditioning) -> None:
    embeds, pooled = conditioning.prompt_embeds, conditioning.pooled_prompt_embeds
    cases = [
        (torch.full_like(latents, torch.nan), conditioning, SIGMA, [0, 0], "latents holds .* NaN"),
        (latents[0], conditioning, SIGMA, [0, 0], "latents has shape"),
        (latents[:, :4], conditioning, SIGMA, [0, 0], "4 channels: a server takes 16"),
        (latents, Conditioning(embeds), SIGMA, [0, 0], "pooled_prompt_embeds are missing"),
        (latents, Conditioning(embeds * torch.inf, pooled), SIGMA, [0, 0], "prompt_embeds holds"),
        (latents, conditioning, torch.tensor([0.4, 1.4]), [0, 0], r"u = 1.4 is outside \[0, 1\]"),
        (latents, conditioning, SIGMA, [0], "rows differ.*'seeds': 1"),
        (latents, conditioning, SIGMA[:1], [0, 0], "rows differ.*'u': 1"),
    ]
    for latent, given, sigma, seeds, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            score_latents(server.url, latent, given, sigma, seeds)
    with pytest.raises(InvalidInputError, match="must start with http"):
        score_latents("file:///etc/hostname", latents, conditioning, SIGMA, [0, 0])
    assert server.requests == []
