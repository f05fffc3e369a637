"""Votes and results: what a page gets, what is refused, and that two raters do not disturb each other."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from dina_lrm.errors import InvalidInputError
from dina_lrm.serving.labelling.app import RESULTS_HEADER, Labelling, create_app
from dina_lrm.serving.labelling.items import Items, read_items
from dina_lrm.serving.labelling.store import VoteStore
from tests.unit.serving.labelling.conftest import make_items
from tests.unit.serving.labelling.page import HERE, Page, figures


def test_a_rater_sees_every_pair_once(client: TestClient, store: VoteStore) -> None:
    page = Page(client, "ada")
    seen = []
    while page.task["pair"] is not None:
        assert page.task["done"] + page.task["left"] == 6
        assert page.task["done"] == len(seen)
        seen.append(page.task["pair"]["index"])
        page.choose("left")
    assert sorted(seen) == list(range(6))
    assert page.task["votes"] == 6
    assert page.task["wanted"] == 12
    assert [vote.pair for vote in store.votes()] == seen


def test_what_stood_on_the_left_is_what_is_recorded(
    client: TestClient, store: VoteStore, items: Items
) -> None:
    page, shown = Page(client, "ada"), []
    while page.task["pair"] is not None:
        shown.append(page.task["pair"])
        page.choose("left")
    sides = set()
    for pair, vote in zip(shown, store.votes(), strict=True):
        preferred = getattr(items.pairs[vote.pair], str(vote.preferred))
        assert preferred == pair["left"]
        assert {pair["left"], pair["right"]} == {items.pairs[vote.pair].a, items.pairs[vote.pair].b}
        sides.add(vote.left_side)
    assert sides == {"a", "b"}


def test_the_next_pair_is_announced(client: TestClient) -> None:
    page = Page(client, "ada")
    while page.task["preload"]:
        announced = page.task["preload"]
        page.choose("tie")
        assert [page.task["pair"]["left"], page.task["pair"]["right"]] == announced
    assert page.task["left"] == 1


def test_reloading_shows_the_same_pair(client: TestClient) -> None:
    page = Page(client, "ada")
    before = page.task["pair"]
    Page(client, "bob").choose("left")
    assert page.load()["pair"] == before


def test_a_vote_that_is_sent_twice(client: TestClient, store: VoteStore) -> None:
    page = Page(client, "ada")
    request = page.request("right")
    first, second = page.send(request), page.send(request)
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.json() == second.json()
    assert len(store.votes()) == 1


def test_undo_goes_back_step_by_step(client: TestClient, store: VoteStore) -> None:
    page = Page(client, "ada")
    shown = [page.task["pair"], page.choose("left")["pair"]]
    page.choose("skip")
    assert page.undo()["pair"] == shown[1]
    assert page.undo()["pair"] == shown[0]
    assert page.task["last_vote"] is None
    assert store.votes() == []
    page.choose("right")
    assert [(vote.pair, vote.choice) for vote in store.votes()] == [(shown[0]["index"], "right")]


def test_a_pair_with_enough_votes_is_closed(items: Items, store: VoteStore) -> None:
    labelling = Labelling(items, store, raters_per_pair=1)
    with TestClient(create_app(labelling), base_url=HERE) as client:
        ada, bob = Page(client, "ada"), Page(client, "bob")
        assert ada.task["pair"]["index"] != bob.task["pair"]["index"]  # one need not wait for the other
        seen = set()
        while ada.task["pair"] is not None:
            seen.add(ada.task["pair"]["index"])
            ada.choose("left")
        assert len(seen) == 6
        assert bob.load()["pair"] is None


def test_skipped_pairs_stay_open_for_others(items: Items, store: VoteStore) -> None:
    labelling = Labelling(items, store, raters_per_pair=1)
    with TestClient(create_app(labelling), base_url=HERE) as client:
        ada = Page(client, "ada")
        while ada.task["pair"] is not None:
            ada.choose("skip")
        assert ada.task["votes"] == 0
        assert Page(client, "bob").task["left"] == 6


def test_many_raters_at_once(tmp_path: Path) -> None:
    items = read_items(make_items(tmp_path, 12))
    store = VoteStore(tmp_path / "votes.sqlite")
    labelling = Labelling(items, store, raters_per_pair=2)

    def work(name: str) -> int:
        page, given = Page(client, name), 0
        while page.task["pair"] is not None:
            page.choose(("left", "right", "tie")[given % 3])
            given += 1
        return given

    with TestClient(create_app(labelling), base_url=HERE) as client, ThreadPoolExecutor(6) as pool:
        given = sum(pool.map(work, [f"rater {number}" for number in range(6)]))
    votes = store.votes()
    store.close()
    assert len(votes) == given
    assert len({(vote.rater, vote.pair) for vote in votes}) == given
    counts = np.bincount([vote.pair for vote in votes], minlength=12)
    assert counts.min() >= 2
    assert counts.max() <= 6


@pytest.mark.parametrize(
    ("changed", "status", "message"),
    [
        ({"choice": "both"}, 422, "choice"),
        ({"pair": 6}, 422, r"pair = 6: must be in [0, 5]"),
        ({"pair": -1}, 422, "pair = -1"),
        ({"left": 999}, 422, "left = 999"),
        ({"rater": " "}, 422, "1 to 64 printable"),
        ({"id": "7"}, 422, "id"),
        ({"seconds": -1.0}, 422, "seconds"),
        ({"seconds": 1e308}, 422, "seconds"),
        ({"seconds": True}, 422, "seconds"),
        ({"seconds": "2"}, 422, "seconds"),
        ({"pair": True}, 422, "pair"),
        ({"pair": "1"}, 422, "pair"),
        ({"pair": 1.0}, 422, "pair"),
        ({"left": "0"}, 422, "left"),
        ({"items": "0" * 32}, 409, "other items"),
        ({"more": 1}, 422, "more"),
    ],
)
def test_wrong_votes_are_told_what_is_wrong(
    client: TestClient, store: VoteStore, changed: dict[str, Any], status: int, message: str
) -> None:
    page = Page(client, "ada")
    reply = page.send(page.request("left", **changed))
    assert reply.status_code == status
    assert message in reply.json()["error"]
    assert store.votes() == []


@pytest.mark.parametrize("route", ["/api/votes", "/api/undo"])
@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "not JSON"),
        (b'{"rater": "ada", "rater": "ben"}', "application/json", 400, "'rater' is said twice"),
        (b'{"seconds": NaN}', "application/json", 400, "NaN is not JSON"),
        (b"[]", "application/json", 422, "it must be a JSON object"),
        (b"{}", "text/plain", 415, "expected application/json"),
    ],
)
def test_bodies_that_are_no_votes(
    client: TestClient, route: str, body: bytes, kind: str, status: int, message: str
) -> None:
    reply = client.post(route, content=body, headers={"content-type": kind})
    assert reply.status_code == status
    assert message in reply.json()["error"]


def test_a_second_window_is_told(client: TestClient, store: VoteStore) -> None:
    first, second = Page(client, "ada"), Page(client, "ada")
    request = second.request("right")
    first.choose("left")
    reply = second.send(request | {"id": "f" * 32})
    assert reply.status_code == 409
    assert "already" in reply.json()["error"]
    assert [vote.choice for vote in store.votes()] == ["left"]


def test_a_full_disk_is_told_and_nothing_is_acknowledged(client: TestClient, store: VoteStore) -> None:
    pages = store._database.execute("PRAGMA page_count").fetchone()[0]
    store._database.execute(f"PRAGMA max_page_count = {pages}")
    page = Page(client, "ada")
    for _ in range(400):  # until the pages that are there are full
        request = page.request("left")
        reply = page.send(request)
        if reply.status_code != 200:
            break
        page.task = reply.json()
        page.undo()
    assert reply.status_code == 503
    assert "disk is full" in reply.json()["error"]
    assert store.votes() == []
    store._database.execute(f"PRAGMA max_page_count = {pages + 10}")
    assert page.send(request).status_code == 200  # the same vote, sent again
    assert [vote.id for vote in store.votes()] == [request["id"]]


def test_undo_of_a_vote_that_is_none(client: TestClient) -> None:
    task = Page(client, "ada").task
    reply = client.post("/api/undo", json={"items": task["items"], "rater": "ada", "vote": "0"})
    assert reply.status_code == 409


# --- results -----------------------------------------------------------------------------------------------


def test_results(client: TestClient, store: VoteStore) -> None:
    ada, bob = Page(client, "ada"), Page(client, "bob")
    for choice in ("left", "tie", "skip"):
        ada.choose(choice)
    bob.choose("right")
    found = figures(client, store)
    assert (found["votes"], found["skips"], found["pairs"]) == (3, 1, 6)
    assert found["ties"]["value"] == pytest.approx(1 / 3)
    assert found["left"]["value"] == 0.5
    assert [rater["rater"] for rater in found["raters"]] == ["ada", "bob"]
    assert found["reward"] is None


def test_raters_do_not_see_the_results(
    client: TestClient, store: VoteStore, reopened: Callable[[], VoteStore]
) -> None:
    """Neither one another's answers nor names of files, which may tell the answer; the key lasts."""
    Page(client, "ada").choose("left")
    for headers in ({}, {RESULTS_HEADER: ""}, {RESULTS_HEADER: "guess"}, {RESULTS_HEADER: "é".encode()}):
        reply = client.get("/api/results", headers=headers)  # type: ignore[arg-type]
        assert reply.status_code == 403
        assert "ada" not in reply.text
    assert "results" not in client.get("/").text.lower()
    assert len(store.results_key) >= 20
    assert reopened().results_key == store.results_key


# --- what operators ask for --------------------------------------------------------------------------------


def test_health(labelling: Labelling, store: VoteStore) -> None:
    """By any name and without the token; 503 where no vote could be kept."""
    app = create_app(labelling, token="secret", local_hosts=["127.0.0.1"])
    with TestClient(app, base_url=HERE) as client:
        reply = client.get("/healthz", headers={"host": "10.1.2.3:8080"})
        assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
        store.close()
        reply = client.get("/healthz")
        assert reply.status_code == 503
        assert "cannot be used" in reply.json()["error"]


def test_every_request_is_written_down(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """Without the query: it has the rater's name."""
    logging.getLogger("dina_lrm.serving").propagate = True
    caplog.set_level(logging.DEBUG, "dina_lrm.serving.labelling")
    page = Page(client, "ada")
    page.choose("left")
    page.send(page.request("left", pair=99))
    client.get("/healthz")
    lines = [vars(one) for one in caplog.records if one.message == "request"]
    assert [(one["method"], one["path"], one["status"], one["levelname"]) for one in lines] == [
        ("GET", "/api/next", 200, "INFO"),
        ("POST", "/api/votes", 200, "INFO"),
        ("POST", "/api/votes", 422, "INFO"),
        ("GET", "/healthz", 200, "DEBUG"),
    ]
    assert all(one["client"] == "testclient" and one["seconds"] >= 0 for one in lines)
    assert len({one["request_id"] for one in lines}) == 4


# --- who may come in ---------------------------------------------------------------------------------------


def test_settings_out_of_range(items: Items, store: VoteStore) -> None:
    with pytest.raises(InvalidInputError, match="raters_per_pair = 0"):
        Labelling(items, store, raters_per_pair=0)
