"""A rater's browser without the browser, and the figures that an operator sees."""

import zlib
from typing import Any

from fastapi.testclient import TestClient

from dina_lrm.serving.labelling.app import RESULTS_HEADER
from dina_lrm.serving.labelling.store import VoteStore

HERE = "http://127.0.0.1:8080"


class Page:
    """A rater's browser without the browser."""

    def __init__(self, client: TestClient, rater: str) -> None:
        self.client, self.rater = client, rater
        self.number = 0
        self.task = self.load()

    def load(self) -> dict[str, Any]:
        self.task = self.client.get("/api/next", params={"rater": self.rater}).json()
        return self.task

    def request(self, answer: str, **changed: Any) -> dict[str, Any]:
        self.number += 1
        pair = self.task["pair"]
        return {
            "items": self.task["items"],
            "id": f"{zlib.crc32(self.rater.encode()):016x}{self.number:016x}",
            "rater": self.rater,
            "pair": pair["index"],
            "left": pair["left"],
            "choice": answer,
            "seconds": 1.5,
        } | changed

    def send(self, request: dict[str, Any]) -> Any:
        return self.client.post("/api/votes", json=request)

    def choose(self, choice: str) -> dict[str, Any]:
        reply = self.send(self.request(choice))
        assert reply.status_code == 200, reply.text
        self.task = reply.json()
        return self.task

    def undo(self) -> dict[str, Any]:
        body = {"items": self.task["items"], "rater": self.rater, "vote": self.task["last_vote"]}
        reply = self.client.post("/api/undo", json=body)
        assert reply.status_code == 200, reply.text
        self.task = reply.json()
        return self.task


def figures(client: TestClient, store: VoteStore) -> dict[str, Any]:
    reply = client.get("/api/results", headers={RESULTS_HEADER: store.results_key})
    assert reply.status_code == 200, reply.text
    return reply.json()
