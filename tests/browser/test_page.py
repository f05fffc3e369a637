"""The reward server's page in a real browser: every tab at desk and on a phone, wrong input, a keyboard."""

import csv
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dina_lrm.shapes.render import blur, render
from dina_lrm.shapes.scenes import parse_caption, sample_scene
from tests.browser.probes import CONTRAST, CUT_OFF, FOCUSED, OUTLINE, SMALLEST_TEXT, luminance

pytestmark = [
    pytest.mark.browser,
    # Gradio computes statistics of its queue with options of pandas that are on their way out.
    pytest.mark.filterwarnings("ignore::pandas.errors.PandasDeprecationWarning"),
]

PROMPT = "a red circle on a gray background"
VIEWS = pytest.mark.parametrize(
    ("width", "height", "scheme"),
    [(1280, 900, "light"), (360, 780, "dark")],
    ids=["desk", "phone"],
)
PATIENCE = 120_000
"""Milliseconds; the machine may be busy."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    sharp = render(sample_scene(np.random.default_rng(0), parse_caption(PROMPT)))
    sharp.save(folder / "sharp.png")
    blur(sharp, 0.8, np.random.default_rng(0)).save(folder / "blurred.png")
    Image.new("RGB", (64, 64), (30, 60, 225)).resize((300, 200)).save(
        folder / "a rather long name of blue.jpg"
    )
    (folder / "text.png").write_text("not a picture")
    (folder / "notes.txt").write_text("not a picture either")
    return {path.stem: path for path in folder.iterdir()}


class Visit:
    """A page in the browser, and all that it asked for or complained about."""

    def __init__(self, browser, address, width=1280, height=900, scheme="light", **options) -> None:
        self.width = width
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **options
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._listen)
        self.page.on("response", self._note)
        self.page.goto(address)
        self.address = address
        self.panel.get_by_text("Try an example").wait_for()

    def _listen(self, message) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def _note(self, response) -> None:
        if response.status >= 400:
            self.complaints.append(f"{response.status} {response.url}")

    @property
    def panel(self):
        return self.page.locator("[role=tabpanel]:visible")

    @property
    def alert(self):
        return self.panel.get_by_role("alert")

    def open(self, tab) -> None:
        self.page.get_by_role("tab", name=tab).click()
        self.panel.get_by_text("Try an example").wait_for()

    def upload(self, *paths, place=0) -> None:
        self.panel.locator("input[type=file]").nth(place).set_input_files([str(path) for path in paths])
        for path in paths:
            if len(paths) > 1:
                self.panel.get_by_text(path.stem).first.wait_for()
        if len(paths) == 1:
            self.panel.locator(".reward-picture").nth(place).locator("img").wait_for()

    def click(self, name) -> None:
        self.panel.get_by_role("button", name=name, exact=True).click()

    def finish(self, name) -> None:
        """Look at the page as a whole, keep a picture of it, and leave."""
        self.page.wait_for_timeout(300)  # a moment for what still moves
        folder = os.environ.get("TEST_SCREENSHOTS")
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"page-{name}-{self.width}.png", full_page=True)
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.width
        assert self.page.evaluate(CUT_OFF) == []
        assert self.page.evaluate(SMALLEST_TEXT) >= 9
        assert self.page.evaluate(CONTRAST) >= 4.5  # WCAG AA for text
        assert [one for one in self.requests if not one.startswith((self.address, "data:", "blob:"))] == []
        assert self.complaints == []
        self.context.close()


def number(value, digits=2):
    return f"{value:.{digits}f}".replace("-", "−")


# --- the tabs ----------------------------------------------------------------------------------------------


@VIEWS
def test_score(browser, address, files, reward, width, height, scheme):
    visit = Visit(browser, address, width, height, scheme)
    visit.open("Score")
    visit.upload(files["sharp"])
    prompt = visit.panel.get_by_label("Prompt")
    prompt.fill(PROMPT)
    prompt.press("Enter")
    visit.panel.get_by_text("Numbers").click()
    (expected,) = reward.score(PROMPT, files["sharp"], seed=0, num_draws=8).scores.tolist()
    assert number(expected) in visit.panel.locator(".reward-number").inner_text()
    assert visit.panel.locator("tbody tr").count() == 9
    assert visit.panel.locator("svg.reward-plot").get_attribute("aria-label").startswith("Score at 9 noise")
    visit.finish("score")


@VIEWS
def test_compare(browser, address, files, reward, width, height, scheme):
    visit = Visit(browser, address, width, height, scheme)
    visit.open("Compare")
    visit.upload(files["sharp"], place=0)
    visit.upload(files["blurred"], place=1)
    visit.panel.get_by_label("Prompt").fill(PROMPT)
    visit.click("Compare")
    visit.panel.get_by_text("Numbers").wait_for()
    expected = 100 * reward.compare(PROMPT, files["sharp"], files["blurred"], num_draws=8)
    assert expected > 50
    assert visit.panel.locator(".reward-verdict").inner_text() == (
        f"A is preferred with a probability of {expected:.1f} %"
    )
    first, second = (visit.panel.locator(f".reward-{one}").bounding_box()["width"] for one in "ab")
    assert 100 * first / (first + second) == pytest.approx(expected, abs=1)
    visit.finish("compare")


@VIEWS
def test_rank(browser, address, files, reward, tmp_path, width, height, scheme):
    visit = Visit(browser, address, width, height, scheme)
    visit.open("Rank")
    paths = [files[name] for name in ("blurred", "a rather long name of blue", "sharp")]
    visit.upload(*paths)
    visit.panel.get_by_label("Prompt").fill(PROMPT)
    visit.click("Rank")
    visit.panel.get_by_text("Download as CSV").wait_for()
    expected = reward.rank(PROMPT, paths, num_draws=8)
    visit.panel.locator(".reward-gallery img").nth(2).wait_for()
    assert visit.panel.locator(".reward-gallery .caption-label").all_inner_texts() == [
        f"{place}: {number(one.score)}" for place, one in enumerate(expected, start=1)
    ]
    for nth in range(3):  # a caption stands below its picture
        item = visit.panel.locator(".reward-gallery .thumbnail-item").nth(nth)
        picture, caption = (item.locator(one).bounding_box() for one in ("img", ".caption-label"))
        assert caption["y"] >= picture["y"] + picture["height"] - 1
    with visit.page.expect_download() as download:
        visit.panel.get_by_text("Download as CSV").click()
    download.value.save_as(tmp_path / "ranking.csv")
    with open(tmp_path / "ranking.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert [row["picture"] for row in rows] == [one.image.name for one in expected]
    assert [float(row["score"]) for row in rows] == pytest.approx([one.score for one in expected], abs=1e-4)
    visit.finish("rank")


@VIEWS
def test_generate(browser, address, width, height, scheme):
    visit = Visit(browser, address, width, height, scheme)
    visit.open("Generate")
    visit.panel.get_by_label("Seed").fill("7")
    steps = visit.panel.get_by_role("spinbutton", name=re.compile("Steps"))
    steps.fill("12")
    steps.press("Tab")
    visit.panel.get_by_label("Prompt").fill(PROMPT)
    visit.click("Generate")
    visit.panel.locator(".reward-number").wait_for()
    assert visit.panel.locator(".reward-strip img").count() == 8
    final = visit.panel.locator(".reward-picture img")
    final.wait_for()
    assert final.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    visit.panel.get_by_text("Numbers").click()
    assert visit.panel.locator("tbody tr").count() == 12
    visit.finish("generate")


# --- at once -----------------------------------------------------------------------------------------------


def test_stopping_and_others_in_between(browser, address, model_thread):
    """While one visitor generates, another is answered; stopping frees the model."""
    one, other = Visit(browser, address), Visit(browser, address)
    one.open("Generate")
    steps = one.panel.get_by_role("spinbutton", name=re.compile("Steps"))
    steps.fill("50")
    steps.press("Tab")
    one.click("Generate")
    one.panel.get_by_text("of 50.").wait_for()
    other.open("Score")
    other.click(PROMPT)  # the example
    other.panel.locator(".reward-number").wait_for()
    assert "of 50." in one.panel.get_by_role("status").inner_text()
    one.click("Stop")
    one.panel.get_by_text("Stopped.").wait_for()
    other.panel.get_by_text("Numbers").wait_for()
    one.page.wait_for_timeout(2000)
    before = model_thread.jobs
    one.page.wait_for_timeout(2000)
    assert model_thread.jobs == before
    assert one.panel.get_by_text("Stopped.").is_visible()
    one.finish("stopped")
    other.finish("between")


def test_a_busy_server_is_told(browser, address, model_thread):
    visit = Visit(browser, address)
    visit.open("Score")
    model_thread.busy = True
    try:
        visit.click(PROMPT)
        visit.alert.wait_for()
    finally:
        model_thread.busy = False
    assert visit.alert.inner_text() == "the server is busy: try again in a moment"
    visit.click("Score")
    visit.panel.get_by_text("Numbers").wait_for()
    assert visit.alert.count() == 0
    visit.finish("busy")


# --- wrong input -------------------------------------------------------------------------------------------


@VIEWS
@pytest.mark.parametrize(
    ("tab", "name", "prompt", "told"),
    [
        ("Score", None, PROMPT, "Picture: none is given"),
        ("Score", "sharp", "  ", "Prompt: empty"),
        ("Score", "text", PROMPT, "Picture: not a readable picture"),
        ("Score", "notes", PROMPT, "Picture: none is given"),
        ("Compare", "sharp", PROMPT, "Picture B: none is given"),
        ("Rank", None, PROMPT, "Pictures: 0 given, 2 to 64 can be ranked"),
        ("Generate", None, "", "Prompt: empty"),
    ],
)
def test_wrong_input(browser, address, files, width, height, scheme, tab, name, prompt, told):
    visit = Visit(browser, address, width, height, scheme)
    visit.open(tab)
    if name == "notes":
        visit.panel.locator("input[type=file]").set_input_files(files[name])
        visit.page.get_by_text("Invalid file type: notes.txt").wait_for()
    elif name is not None:
        visit.upload(files[name])
    visit.panel.get_by_label("Prompt").fill(prompt)
    visit.click(tab)
    visit.alert.wait_for()
    assert visit.alert.inner_text().startswith(told)
    assert visit.page.locator(".toast-body").last.is_visible()
    visit.finish(f"wrong-{tab}-{name}".lower())


def test_unknown_words_are_noted(browser, address, files):
    visit = Visit(browser, address, 360, 780)
    visit.open("Score")
    visit.upload(files["sharp"])
    visit.panel.get_by_label("Prompt").fill("a red <b>zebra</b> on a gray background")
    visit.click("Score")
    visit.panel.get_by_text("Numbers").wait_for()
    assert "zebra" in visit.panel.get_by_role("note").inner_text()
    assert visit.panel.locator("b").count() == 0
    visit.finish("note")


# --- other ways in -----------------------------------------------------------------------------------------


def test_drag_and_drop(browser, address, files):
    visit = Visit(browser, address)
    visit.open("Score")
    bytes_ = list(files["sharp"].read_bytes())
    transfer = visit.page.evaluate_handle(
        """bytes => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
          return transfer;
        }""",
        bytes_,
    )
    target = visit.panel.get_by_text("Drop Image Here")
    for event in ("dragenter", "dragover", "drop"):
        target.dispatch_event(event, {"dataTransfer": transfer})
    visit.panel.locator(".reward-picture img").wait_for()
    visit.panel.get_by_label("Prompt").fill(PROMPT)
    visit.click("Score")
    visit.panel.get_by_text("Numbers").wait_for()
    visit.finish("dropped")


def test_paste(browser, address, files):
    visit = Visit(browser, address, permissions=["clipboard-read", "clipboard-write"])
    visit.open("Score")
    visit.page.evaluate(
        """async bytes => {
          const picture = new Blob([new Uint8Array(bytes)], {type: "image/png"});
          await navigator.clipboard.write([new ClipboardItem({"image/png": picture})]);
        }""",
        list(files["sharp"].read_bytes()),
    )
    visit.panel.get_by_label("clipboard", exact=False).first.click()
    visit.panel.locator(".reward-picture img").wait_for()
    visit.panel.get_by_label("Prompt").fill(PROMPT)
    visit.click("Score")
    visit.panel.get_by_text("Numbers").wait_for()
    visit.finish("pasted")


def test_a_keyboard_is_enough(browser, address):
    """From the tabs through the upload to prompt, button and examples, each with a name; Enter takes one."""
    visit = Visit(browser, address)
    visit.open("Score")
    visit.page.get_by_role("tab", name="Score").focus()
    names = []
    for _ in range(24):
        visit.page.keyboard.press("Tab")
        names.append(visit.page.evaluate(FOCUSED))
        assert visit.page.evaluate(OUTLINE) >= 2, names[-1]
        if names[-1] == PROMPT:
            break
    assert "" not in names
    upload = next(place for place, one in enumerate(names) if "Upload" in one)
    prompt = next(place for place, one in enumerate(names) if "Prompt" in one)
    assert upload < prompt < names.index("Score", prompt) < names.index(PROMPT)
    visit.page.keyboard.press("Enter")
    visit.panel.get_by_text("Numbers").wait_for()
    visit.finish("keyboard")


def test_arrows_go_from_tab_to_tab(browser, address):
    visit = Visit(browser, address)
    visit.page.get_by_role("tab", name="Compare").focus()
    for key, name in (
        ("ArrowRight", "Rank"),
        ("ArrowRight", "Score"),
        ("End", "Generate"),
        ("ArrowRight", "Compare"),
        ("ArrowLeft", "Generate"),
        ("Home", "Compare"),
    ):
        visit.page.keyboard.press(key)
        assert visit.page.get_by_role("tab", selected=True).inner_text() == name
        assert visit.page.evaluate("document.activeElement.innerText") == name
    visit.finish("arrows")


# --- to the eye and the finger -----------------------------------------------------------------------------


@VIEWS
def test_nothing_stands_on_a_picture(browser, address, files, width, height, scheme):
    """Its name and its buttons are beside it, and the buttons are hit by a finger."""
    visit = Visit(browser, address, width, height, scheme)
    visit.upload(files["sharp"], place=0)
    visit.upload(files["blurred"], place=1)
    boxes = visit.panel.locator(".reward-picture")
    for number in range(2):
        box = boxes.nth(number)
        picture = box.locator("img").bounding_box()
        assert min(picture["width"], picture["height"]) > 90
        pieces = box.locator("label, button")
        shown = [piece.bounding_box() for piece in pieces.all() if piece.is_visible()]
        assert len(shown) >= 4  # the name, full screen, remove, upload or paste
        for piece in shown:
            assert (
                piece["y"] + piece["height"] <= picture["y"] + 1
                or piece["y"] >= picture["y"] + picture["height"] - 1
            )
        names = [one.bounding_box() for one in box.locator("button").all() if one.is_visible()]
        assert min(min(one["width"], one["height"]) for one in names) >= 32
    visit.finish("pictures")


@VIEWS
def test_a_placeholder_can_be_read(browser, address, width, height, scheme):
    visit = Visit(browser, address, width, height, scheme)
    colours = visit.panel.get_by_label("Prompt").evaluate(
        """one => [getComputedStyle(one, "::placeholder").color, getComputedStyle(one).backgroundColor]"""
    )
    front, back = (luminance(colour) for colour in colours)
    assert (max(front, back) + 0.05) / (min(front, back) + 0.05) >= 4.5
    visit.finish("placeholder")
