"""A server that answers as it is told."""

import io
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from email import message_from_bytes
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from dina_lrm import Conditioning

PROMPTS = ["a red circle on a gray background", "a big blue square on a white background"]
Reply = tuple[int, dict[str, str], bytes]


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def tensors(self) -> dict[str, Tensor]:
        return safetensors.torch.load(self.body)

    @property
    def form(self) -> list[tuple[str, bytes]]:
        """Fields in order, read by the standard library's parser of MIME messages."""
        head = f"content-type: {self.headers['content-type']}\r\n\r\n".encode()
        parts: Any = message_from_bytes(head + self.body).get_payload()
        return [
            (part.get_param("name", header="content-disposition"), part.get_payload(decode=True))
            for part in parts
        ]


@dataclass
class Fake:
    """A server that scores by arithmetic: mean of the latent + 10 u + 100 seed; mean red of a picture."""

    url: str
    plan: list[Reply | str] = field(default_factory=list)
    """Answers before it scores; "hang up" closes the connection, "break" does so in the middle of a reply."""
    requests: list[Request] = field(default_factory=list)
    connections: int = 0

    def answer(self, request: Request) -> Reply:
        match request.path:
            case "/healthz":
                return ok({"status": "ok"})
            case "/v1/score":
                t = request.tensors
                scores = t["latents"].double().mean(dim=(1, 2, 3)) + 10 * t["u"] + 100 * t["seeds"]
                return ok({"protocol_version": "1", "raw_scores": scores.tolist()})
            case "/v1/score/images":
                reds = [red(file) for name, file in request.form if name == "images"]
                errors = [value / 100 for value in reds]
                draws = json.loads(request.form[0][1])["num_draws"]
                return ok({"scores": reds, "standard_errors": errors if draws > 1 else None, "notes": []})
            case "/v1/compare":
                a, b = (red(file) for name, file in request.form[1:])
                return ok({"probability": a / (a + b), "scores": [a, b]})
        return 404, {}, b"no such page"


def ok(content: Any) -> Reply:
    return 200, {"content-type": "application/json"}, json.dumps(content).encode()


def red(file: bytes) -> float:
    with Image.open(io.BytesIO(file), formats=["PNG"]) as picture:
        return float(np.asarray(picture)[..., 0].mean())


Call = Callable[..., Any]
"""(url, method, *arguments, **settings of the client): one method of a client that is closed after."""


def rows(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(count)
    latents = torch.randn(count, 16, 8, 8, generator=generator).to(dtype)
    embeds = torch.randn(count, 5, 12, generator=generator)
    return latents, Conditioning(embeds, torch.randn(count, 6, generator=generator))


def pictures(count: int) -> list[Image.Image]:
    """Of 6 x 4 pixels, the red of each being its place."""
    return [Image.new("RGB", (6, 4), (10 * index + 1, 0, 255)) for index in range(count)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]
