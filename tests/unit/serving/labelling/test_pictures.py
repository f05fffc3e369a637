"""Pictures of the labelling page: the files' pixels and nothing else, by number alone."""

import io
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from dina_lrm.serving.labelling.app import Labelling
from dina_lrm.serving.labelling.items import Items, read_items
from dina_lrm.serving.labelling.store import VoteStore
from tests.rows import write_json_lines
from tests.unit.serving.labelling.conftest import write_picture
from tests.unit.serving.labelling.page import Page, figures


def test_pictures_are_the_files_pixels(client: TestClient, items: Items) -> None:
    for number, path in enumerate(items.pictures):
        reply = client.get(f"/pictures/{number}")
        assert reply.headers["content-type"] == "image/png"
        with Image.open(io.BytesIO(reply.content)) as sent, Image.open(str(path)) as stored:
            np.testing.assert_array_equal(np.asarray(sent), np.asarray(stored))


def test_pictures_are_not_sent_again(client: TestClient) -> None:
    etag = client.get("/pictures/0").headers["etag"]
    assert client.get("/pictures/0", headers={"if-none-match": etag}).status_code == 304
    assert client.get("/pictures/1", headers={"if-none-match": etag}).status_code == 200


@pytest.mark.parametrize(
    "place", ["12", "-1", "items.jsonl", "../items.jsonl", "%2e%2e%2fitems.jsonl", "0.png"]
)
def test_pictures_go_by_number_alone(client: TestClient, place: str) -> None:
    reply = client.get(f"/pictures/{place}")
    assert reply.status_code in (404, 422)
    assert "prompt" not in reply.text


def test_what_is_hidden_in_a_picture_is_not_passed_on(tmp_path: Path) -> None:
    names = [write_picture(tmp_path / f"{name}.jpg", ord(name)) for name in "ab"]
    for name in names:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"<script>alert(1)</script>")
    items = read_items(write_json_lines(tmp_path / "items.jsonl", [{"prompt": "p", "images": names}]))
    store = VoteStore(tmp_path / "votes.sqlite")
    sent = Labelling(items, store).picture(0)
    store.close()
    assert sent.startswith(b"\x89PNG")
    assert b"script" not in sent


def test_large_pictures_are_shrunk(tmp_path: Path) -> None:
    names = [write_picture(tmp_path / f"{name}.png", ord(name), size=(3000, 30)) for name in "ab"]
    items = read_items(write_json_lines(tmp_path / "items.jsonl", [{"prompt": "p", "images": names}]))
    store = VoteStore(tmp_path / "votes.sqlite")
    with Image.open(io.BytesIO(Labelling(items, store).picture(0))) as sent:
        assert sent.size == (2048, 20)
    store.close()


def test_a_pair_that_cannot_be_shown_is_left_out_and_told(
    client: TestClient, items: Items, store: VoteStore
) -> None:
    bad = items.pictures[items.pairs[2].a]
    assert isinstance(bad, Path)
    bad.write_bytes(b"no picture")
    page, seen = Page(client, "ada"), []
    while page.task["pair"] is not None:
        seen.append(page.task["pair"]["index"])
        page.choose("left")
    assert sorted(seen) == [0, 1, 3, 4, 5]
    assert page.task["wanted"] == 10
    assert client.get(f"/pictures/{items.pairs[2].a}").json() == {
        "error": f"picture {items.pairs[2].a} cannot be shown"  # no name: it may be the answer
    }
    (told,) = figures(client, store)["unreadable"]
    assert told["pair"] == 2
    assert bad.name in told["reason"]
