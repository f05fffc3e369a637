"""A scoring server of a few lines, written from the protocol's text and not from the client."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import safetensors.torch

from dina_lrm import Conditioning, RewardModel
from tests.local_server import answering

Reply = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


@dataclass
class Server:
    url: str
    model: RewardModel
    replies: list[Reply | None] = field(default_factory=list)
    """Given one by one before the server starts to score; None closes the connection."""
    requests: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    """Headers, in lower case, and tensors."""

    def score(self, tensors: dict[str, Any]) -> Reply:
        conditioning = Conditioning(tensors["prompt_embeds"], tensors["pooled_prompt_embeds"])
        seeds = tensors["seeds"].tolist() if "seeds" in tensors else None
        scores = self.model.score_latents(tensors["latents"], conditioning, tensors["u"], seed=seeds)
        return ok({"protocol_version": "1", "raw_scores": scores.tolist()})


def ok(content: Any) -> Reply:
    return 200, {"content-type": "application/json"}, json.dumps(content).encode()


@contextlib.contextmanager
def serving(model: RewardModel) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()} | {":path": self.path}
            tensors = safetensors.torch.load(body)
            server.requests.append((headers, tensors))
            reply = server.replies.pop(0) if server.replies else server.score(tensors)
            if reply is None:
                return
            status, extra, content = reply
            self.send_response(status)
            for name, value in ({"content-length": str(len(content))} | extra).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = Server("", model)
    with answering(Handler) as address:
        server.url = f"{address}/v1/score"
        yield server
