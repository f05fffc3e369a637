"""A language model behind a server as a scorer."""

import base64
import http.server
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dina_lrm.errors import InvalidInputError, MissingComponentError
from dina_lrm.evaluation.baselines import (
    UNIFIED_REWARD,
    VISUAL_QUALITY_R1,
    Scorer,
    ServerScorer,
    load_scorer,
)


class FakeServer(http.server.ThreadingHTTPServer):
    """Answers with the next of `plan` (status, reply text), then by the picture: its red share, 1 to 5."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.plan: list[tuple[int, str]] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class FakeHandler(http.server.BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.headers.append(dict(self.headers))
        self.server.paths.append(self.path)
        status, reply = self.server.plan.pop(0) if self.server.plan else (200, self._judge(body))
        if status == 0:  # hang up without a word
            self.connection.close()
            return
        if status == 200 and not reply.startswith("{"):
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]})
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply.encode())))
        self.end_headers()
        self.wfile.write(reply.encode())

    def _judge(self, body: dict[str, Any]) -> str:
        red = np.asarray(sent_image(body))[..., 0].mean() / 255
        return f"It shows 2 things.\n**Final Score:** {1 + 4 * red:.2f}"

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def sent_image(body: dict[str, Any]) -> Image.Image:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def asking(server: FakeServer, **settings: Any) -> ServerScorer:
    return ServerScorer(server.address, "judge-7b", UNIFIED_REWARD, **{"backoff_seconds": 0.0} | settings)


def test_server_is_asked_about_each_pair_in_order(server: FakeServer) -> None:
    reds = [Image.new("RGB", (4, 3), (51 * level, 0, 0)) for level in range(6)]
    prompts = [f"{level} {{prompt}}" for level in range(6)]
    scorer = asking(server, concurrency=3)
    assert isinstance(scorer, Scorer)
    scores = scorer.score(prompts, reds)
    assert scores.tolist() == pytest.approx([1, 1.8, 2.6, 3.4, 4.2, 5])
    assert scores.dtype == torch.float32
    assert set(server.paths) == {"/v1/chat/completions"}
    for body in server.requests:
        level = round(np.asarray(sent_image(body))[0, 0, 0] / 51)
        assert body["model"] == "judge-7b"
        assert body["temperature"] == 0
        assert body["messages"][0]["content"][1]["text"].endswith(f"Caption: {level} {{prompt}}")
        assert sent_image(body).size == (4, 3)
    assert "Authorization" not in server.headers[0]


def test_address_with_v1_and_key(server: FakeServer) -> None:
    scorer = ServerScorer(f"{server.address}/v1/", "m", UNIFIED_REWARD, api_key="secret")
    scorer.score(["red"], [Image.new("RGB", (2, 2))])
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_server_is_asked_again_when_it_is_busy_or_hangs_up(server: FakeServer) -> None:
    server.plan = [(429, "slow down"), (503, "loading"), (0, ""), (200, "Final Score: 3.5")]
    assert asking(server).score(["red"], [Image.new("RGB", (2, 2))]).tolist() == [3.5]
    assert len(server.requests) == 4


def test_retries_end(server: FakeServer) -> None:
    server.plan = [(500, "out of memory")] * 9
    with pytest.raises(MissingComponentError, match=r"3 attempts.* HTTP 500 'out of memory'"):
        asking(server, num_retries=2).score(["red"], [Image.new("RGB", (2, 2))])
    assert len(server.requests) == 3


def test_nobody_listens() -> None:
    scorer = ServerScorer("http://127.0.0.1:9", "m", UNIFIED_REWARD, num_retries=1, backoff_seconds=0.0)
    with pytest.raises(MissingComponentError, match=r"no answer from http://127\.0\.0\.1:9/v1"):
        scorer.score(["red"], [Image.new("RGB", (2, 2))])


def test_a_refusal_is_not_repeated(server: FakeServer) -> None:
    server.plan = [(404, "no such model")]
    with pytest.raises(InvalidInputError, match="HTTP 404 'no such model'"):
        asking(server).score(["red"], [Image.new("RGB", (2, 2))])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("I cannot judge 2 cats.", "no score in the reply 'I cannot judge 2 cats.'"),
        ("Final Score: 7", r"7 is not in \[1, 5\] in the reply 'Final Score: 7'"),
        ("", "no score in the reply ''"),
        ('{"error": "none"}', 'sent no chat completion but \'{"error": "none"}\''),
        ('{"choices": [{"message": {"content": null}}]}', "sent no chat completion"),
    ],
)
def test_reply_without_a_score_is_quoted(server: FakeServer, reply: str, message: str) -> None:
    server.plan = [(200, reply)]
    with pytest.raises(InvalidInputError, match=message):
        asking(server).score(["red"], [Image.new("RGB", (2, 2))])


def test_long_replies_are_quoted_in_part() -> None:
    with pytest.raises(InvalidInputError, match=r"a \.\.\.'$"):
        UNIFIED_REWARD.read("a" * 1000)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Final Score: 4", 4.0),
        ("final score:**3.25**", 3.25),
        ("I would say Final Score: 2, no: Final Score: 3", 3.0),
        ("<think>Final Score: 1</think> Final Score: 5", 5.0),
        (" 2.5\n", 2.5),
    ],
)
def test_reading_a_reply(reply: str, score: float) -> None:
    assert UNIFIED_REWARD.read(reply) == score


def test_visual_quality_asks_without_the_prompt(server: FakeServer) -> None:
    server.plan = [(200, "<think>3 or 4?</think>\n<answer> 3.75 </answer>")]
    scorer = load_scorer("visualquality-r1", location=server.address, model="vq")
    assert scorer.name == VISUAL_QUALITY_R1.name
    assert scorer.score(["a very special prompt"], [Image.new("RGB", (2, 2))]).tolist() == [3.75]
    assert "special" not in json.dumps(server.requests)


def test_own_question(server: FakeServer) -> None:
    server.plan = [(200, "4")]
    scorer = load_scorer("unified-reward", location=server.address, model="u", template="How is {prompt}?")
    assert scorer.score(["tea"], [Image.new("RGB", (2, 2))]).tolist() == [4.0]
    assert server.requests[0]["messages"][0]["content"][1]["text"] == "How is tea?"


def test_server_settings_are_checked() -> None:
    with pytest.raises(InvalidInputError, match=r"base_url .*http"):
        ServerScorer("file:///etc/passwd", "m", UNIFIED_REWARD)
    with pytest.raises(InvalidInputError, match=r"concurrency = 0.* 1"):
        ServerScorer("http://a", "m", UNIFIED_REWARD, concurrency=0)
    with pytest.raises(InvalidInputError, match="unified-reward runs on a server"):
        load_scorer("unified-reward", model="m")
