"""The labelling page in a real browser: two raters, a server that is killed, a phone, a keyboard, a token."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dina_lrm.cli.main import main
from dina_lrm.serving.labelling.items import read_items
from dina_lrm.serving.labelling.store import VoteStore
from tests.browser.labelling import PHONE, Rater, Server, write_items

pytestmark = pytest.mark.browser

NUM_PAIRS = 50
KILLED_AFTER = 20
"""Votes of each rater before the server is killed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("label")
    write_items(folder, NUM_PAIRS)
    return folder


@pytest.fixture
def server(folder, request):
    server = Server(folder, *getattr(request, "param", ()))
    yield server
    server.kill()
    for file in folder.glob("votes.*"):
        file.unlink()


def arrow(side: str) -> str:
    return f"Arrow{side.capitalize()}"


@pytest.mark.parametrize("server", [("--model", "bundled", "--seed", "3")], indirect=True)
def test_two_raters_and_a_killed_server(browser, server, folder, screenshots):
    """Ada always finds the right picture, with the keyboard. Bob, on a phone, takes every fifth
    pair for a tie. The server dies with choices on their way."""
    items = read_items(folder / "items.jsonl")
    server.start()
    ada = Rater(browser, server, items, "Ada", viewport={"width": 1280, "height": 900})
    bob = Rater(browser, server, items, "Bob", viewport={"width": 360, "height": 740}, **PHONE)
    ada.page.screenshot(path=screenshots / "label-name.png")
    ada.enter()
    bob.enter()

    def answer_bob() -> None:
        choice = "tie" if bob.done % 5 == 4 else bob.right_side()
        before = bob.done
        if bob.done == 2:  # a tap on a picture enlarges it, and is no choice
            bob.page.locator("#left-enlarge").tap()
            bob.page.locator("#large[open]").wait_for()
            bob.page.locator("#large-picture").tap()
            bob.page.locator("#large").wait_for(state="hidden")
            assert bob.done == before
        bob.page.locator(f"#{choice}").tap()
        bob.counted_from(before)
        bob.ready()

    for number in range(KILLED_AFTER):
        ada.press(arrow(ada.right_side()))
        answer_bob()
        if number == 4:
            ada.page.screenshot(path=screenshots / "label-desktop.png")
            bob.page.screenshot(path=screenshots / "label-phone.png")
    assert len(ada.acknowledged) == len(bob.acknowledged) == KILLED_AFTER

    server.kill()
    ada.press(arrow(ada.right_side()), wait=False)
    ada.page.locator("#offline").wait_for()
    assert "kept on this device" in ada.page.locator("#offline").inner_text()
    assert ada.page.locator("#left").get_attribute("aria-disabled") == "true"
    ada.page.screenshot(path=screenshots / "label-server-gone.png")
    bob.page.locator("#tie").click()
    bob.page.locator("#offline").wait_for()
    bob.page.screenshot(path=screenshots / "label-server-gone-phone.png")
    kept = VoteStore(server.votes)
    found = {vote.id for vote in kept.votes()}
    kept.close()
    assert found == {*ada.acknowledged, *bob.acknowledged}  # what was told to be kept is kept

    server.start()
    for rater in (ada, bob):
        rater.page.locator("#offline").wait_for(state="hidden")
        rater.ready()
        assert rater.done == KILLED_AFTER + 1  # the choice that was under way arrived by itself
    while not (ada.finished and bob.finished):
        if not ada.finished:
            ada.press(arrow(ada.right_side()))
        if not bob.finished:
            answer_bob()
    assert ada.done == bob.done == NUM_PAIRS
    bob.page.screenshot(path=screenshots / "label-finished.png")

    store = VoteStore(server.votes)
    votes = store.votes()
    store.close()
    assert {vote.id for vote in votes} == {*ada.acknowledged, *bob.acknowledged}
    assert len({(vote.rater, vote.pair) for vote in votes}) == len(votes) == 2 * NUM_PAIRS
    for vote in votes:
        right = "a" if "right" in Path(str(items.pictures[items.pairs[vote.pair].a])).name else "b"
        assert vote.preferred == ("tie" if vote.choice == "tie" else right)
    sides = [vote.left_side for vote in votes]
    assert 30 <= sides.count("a") <= 70  # a fair coin leaves it once in 20,000

    ada.page.goto(f"{server.address}/results")
    ada.page.get_by_text("for whoever runs the labelling").wait_for()
    assert ada.page.get_by_role("rowheader").count() == 0
    ada.page.close()
    ada.page = ada.page.context.new_page()
    ada.page.goto(server.results)
    ada.page.get_by_role("rowheader", name="Ada").wait_for()
    ada.page.screenshot(path=screenshots / "label-results.png", full_page=True)
    bob.page.goto(server.results)
    bob.page.get_by_role("rowheader", name="Bob").wait_for()
    bob.page.screenshot(path=screenshots / "label-results-phone.png", full_page=True)
    table = bob.page.locator(".wide")
    assert table.evaluate("table => table.scrollWidth <= table.clientWidth")  # nothing is cut off
    ties = sum(vote.choice == "tie" for vote in votes)
    equal = ada.page.get_by_role("row", name="Equal answers").inner_text()
    assert f"{100 * (NUM_PAIRS - ties) / NUM_PAIRS:.1f}" in equal
    for rater in (ada, bob):
        assert rater.errors == []
        assert [url for url in rater.addresses if not url.startswith((server.address, "data:"))] == []
        width = rater.page.viewport_size["width"]
        assert rater.page.evaluate("document.documentElement.scrollWidth") <= width
        rater.page.context.close()

    server.kill()
    rows, run = folder / "votes.rows.jsonl", folder / "votes.run"
    assert main(["label", "export", str(server.votes), "--output", str(rows)]) == 0
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(written) == NUM_PAIRS
    assert all("right" in row["chosen"] for row in written if row["votes_chosen"] > row["votes_rejected"])
    train = ["train", "shapes-quick", "--data.train", str(rows), "--data.validation", str(rows)]
    train += ["--output", str(run), "--num-steps", "6", "--batch-size", "8", "--validation.every", "6"]
    train += ["--model.num-blocks", "2", "--model.image-taps", "2", "--model.text-taps", "1"]
    assert main([*train, "--model.lora-rank", "2", "--cpu", "--json"]) == 0
    assert (run / "reward_head.safetensors").is_file()
    shutil.rmtree(run)


def test_every_key_and_undo(browser, server, folder, screenshots):
    server.start()
    items = read_items(folder / "items.jsonl")
    rater = Rater(browser, server, items, "Eve", color_scheme="dark", viewport={"width": 1000, "height": 800})
    rater.enter()
    keys = {
        "ArrowLeft": "left",
        "ArrowRight": "right",
        "ArrowDown": "tie",
        "t": "tie",
        "s": "skip",
        "S": "skip",
    }
    for key in keys:
        rater.press(key)
    for key in ("z", "Backspace"):
        rater.press(key)
    rater.page.keyboard.down("ArrowLeft")
    for _ in range(5):  # a key that is held down repeats
        rater.page.keyboard.down("ArrowLeft")
    rater.page.keyboard.up("ArrowLeft")
    rater.counted_from(4)
    rater.ready()
    store = VoteStore(server.votes)
    assert [vote.choice for vote in store.votes()] == ["left", "right", "tie", "tie", "left"]
    store.close()

    rater.page.keyboard.press("Tab")  # from the top of the page to the first button
    focused = "document.activeElement.id"
    order = []
    while (name := rater.page.evaluate(focused)) not in order:
        order.append(name)
        outline = "parseFloat(getComputedStyle(document.activeElement).outlineWidth)"
        assert rater.page.evaluate(outline) >= 2, name
        rater.page.keyboard.press("Tab")
    assert {"left", "tie", "right", "undo", "skip", "leave", "left-enlarge", "right-enlarge"} <= set(order)
    rater.page.locator("#right").focus()
    rater.page.screenshot(path=screenshots / "label-dark-focus.png")
    rater.press("Enter")
    assert rater.done == 6
    assert rater.page.evaluate(focused) == "right"  # a vote leaves the focus where it was
    seen = "[...document.querySelectorAll('#work img')].every(image => image.alt && image.naturalWidth > 0)"
    assert rater.page.evaluate(seen)
    rater.page.reload()
    rater.ready()
    assert rater.done == 6  # the name and the place are remembered
    assert rater.errors == []
    rater.page.context.close()


def test_a_choice_outlives_the_page(browser, server, folder):
    """The window is closed while the server is gone; the next one on this device delivers."""
    server.start()
    items = read_items(folder / "items.jsonl")
    rater = Rater(browser, server, items, "Joe")
    rater.enter()
    server.kill()
    rater.press("ArrowRight", wait=False)
    rater.page.locator("#offline").wait_for()
    context = rater.page.context
    rater.page.close()
    server.start()
    page = context.new_page()
    page.goto(server.address)
    page.locator('#mine[value="1"]').wait_for()
    store = VoteStore(server.votes)
    assert [(vote.rater, vote.choice) for vote in store.votes()] == [("Joe", "right")]
    store.close()
    context.close()


def test_an_answer_that_is_lost_on_its_way(browser, server, folder):
    """The server has kept the vote, and the browser does not know: sent again, it still counts once."""
    server.start()
    rater = Rater(browser, server, read_items(folder / "items.jsonl"), "Lou")
    rater.enter()

    def lose(route: Any) -> None:
        assert route.fetch().status == 200
        route.abort()

    rater.page.route("**/api/votes", lose, times=1)
    rater.press("ArrowLeft")
    store = VoteStore(server.votes)
    assert [(vote.choice, vote.id) for vote in store.votes()] == [("left", *rater.acknowledged)]
    store.close()
    assert rater.done == 1
    rater.page.context.close()


@pytest.mark.parametrize("server", [("--token", "open sesame")], indirect=True)
def test_the_token_is_asked_for(browser, server, folder, screenshots):
    server.start()
    items = read_items(folder / "items.jsonl")
    rater = Rater(browser, server, items, "Kim", viewport={"width": 360, "height": 640}, **PHONE)
    field = rater.page.get_by_label("Access token")
    field.fill("open barley")
    rater.page.keyboard.press("Enter")
    rater.page.get_by_text("This is not the token.").wait_for()
    rater.page.screenshot(path=screenshots / "label-token.png")
    field.fill("open sesame")
    rater.page.keyboard.press("Enter")
    rater.enter()
    rater.press("ArrowLeft")
    assert rater.done == 1
    rater.page.context.close()


def test_enlarged_pictures(browser, server, folder, screenshots):
    """With the mouse and with keys; no choice is made meanwhile, and the focus comes back."""
    server.start()
    items = read_items(folder / "items.jsonl")
    rater = Rater(browser, server, items, "Max", viewport={"width": 1000, "height": 800})
    rater.enter()
    focused = "document.activeElement.id"
    assert rater.page.evaluate(focused) == "prompt"  # the description is read first
    large, picture = rater.page.locator("#large"), rater.page.locator("#large-picture")
    sources = [rater.page.locator(f"#{side}-picture").get_attribute("src") for side in ("left", "right")]
    rater.page.locator("#left-enlarge").click()
    assert picture.get_attribute("src").endswith(sources[0])
    assert picture.get_attribute("alt") == "First picture"
    box = picture.bounding_box()
    assert min(box["width"], box["height"]) >= 650
    rater.page.screenshot(path=screenshots / "label-large.png")
    rater.page.keyboard.press("ArrowRight")
    assert picture.get_attribute("src").endswith(sources[1])
    rater.page.locator("#other").click()
    assert picture.get_attribute("src").endswith(sources[0])
    rater.page.keyboard.press("s")
    rater.page.keyboard.press("Escape")
    large.wait_for(state="hidden")
    assert rater.page.evaluate(focused) == "left-enlarge"
    rater.page.keyboard.press("2")
    assert picture.get_attribute("src").endswith(sources[1])
    rater.page.get_by_role("button", name="Close").click()
    large.wait_for(state="hidden")
    assert rater.done == 0
    rater.press("ArrowLeft")
    assert rater.page.locator("#spoken").inner_text().startswith("First picture recorded. Next: ")
    assert rater.errors == []
    rater.page.context.close()


@pytest.mark.parametrize(("width", "height"), [(390, 844), (844, 390), (1280, 900)])
def test_pictures_are_as_large_as_the_screen_allows(browser, server, folder, screenshots, width, height):
    """On a phone that is held upright one stands above the other; what one votes with is in sight."""
    server.start()
    items = read_items(folder / "items.jsonl")
    options = {"viewport": {"width": width, "height": height}} | (PHONE if width < 1000 else {})
    rater = Rater(browser, server, items, f"Size {width}", **options)
    rater.enter()
    rater.page.screenshot(path=screenshots / f"label-size-{width}.png")
    first, second = (rater.page.locator(f"#{side}-picture").bounding_box() for side in ("left", "right"))
    upright = width < height
    assert (second["y"] > first["y"], second["x"] > first["x"]) == (upright, not upright)
    assert min(first["width"], first["height"]) >= {390: 300, 844: 180, 1280: 500}[width]
    for side, name in (("left", "Upper" if upright else "Left"), ("right", "Lower" if upright else "Right")):
        button = rater.page.locator(f"#{side}")
        assert button.inner_text().split()[0] == name
        if upright or width > 1000:
            box = button.bounding_box()
            assert box["y"] + box["height"] <= height
    assert rater.page.evaluate("document.documentElement.scrollWidth") <= width
    rater.page.context.close()
