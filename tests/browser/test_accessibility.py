"""axe-core on every state of both pages, at a desk and on a phone, light and dark: nothing serious."""

from importlib.resources import files
from typing import Any

import pytest

from tests.browser.labelling import PHONE, Server, write_items

pytestmark = [
    pytest.mark.browser,
    # Gradio computes statistics of its queue with options of pandas that are on their way out.
    pytest.mark.filterwarnings("ignore::pandas.errors.PandasDeprecationWarning"),
]

VIEWS = [(1280, 900, "light"), (1280, 900, "dark"), (390, 844, "light"), (390, 844, "dark")]


def found_by_axe(page: Any) -> list[tuple[str, str]]:
    """Rules that the page breaks seriously, each with the first part that does."""
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    violations = page.evaluate("() => axe.run()")["violations"]
    return [
        (one["id"], one["nodes"][0]["html"][:200])
        for one in violations
        if one["impact"] in ("serious", "critical")
    ]


def context(browser: Any, width: int, height: int, scheme: str) -> Any:
    options = {"viewport": {"width": width, "height": height}, "color_scheme": scheme, "bypass_csp": True}
    return browser.new_context(**options, **(PHONE if width < 1000 else {}))  # axe is evaluated as a text


@pytest.mark.parametrize(("width", "height", "scheme"), VIEWS)
def test_the_servers_page(browser, address, screenshots, width, height, scheme):
    page = context(browser, width, height, scheme).new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    for tab, done in (
        ("Compare", "text=Numbers"),
        ("Rank", "text=Download as CSV"),
        ("Score", "text=Numbers"),
        ("Generate", ".reward-number"),
    ):
        page.get_by_role("tab", name=tab).click()
        panel = page.locator("[role=tabpanel]:visible")
        panel.get_by_text("Try an example").wait_for()
        page.wait_for_timeout(300)  # what fades in has no contrast yet
        assert found_by_axe(page) == [], tab
        panel.locator(".reward-examples button").first.click()
        panel.locator(done).first.wait_for()
        page.wait_for_timeout(600)
        page.screenshot(path=screenshots / f"axe-{tab}-{width}-{scheme}.png".lower(), full_page=True)
        assert found_by_axe(page) == [], f"{tab}, answered"
    page.context.close()


@pytest.fixture(scope="module")
def labelling(tmp_path_factory):
    folder = tmp_path_factory.mktemp("label")
    write_items(folder, 3)
    server = Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.mark.parametrize(("width", "height", "scheme"), VIEWS)
def test_the_labelling_page(browser, labelling, screenshots, width, height, scheme):
    page = context(browser, width, height, scheme).new_page()
    page.goto(labelling.address)
    page.get_by_label("Your name").fill(f"{width} {scheme}")
    assert found_by_axe(page) == []
    page.keyboard.press("Enter")
    ready = page.locator('#finished:not([hidden]), #work:not([hidden]) #left[aria-disabled="false"]').first
    ready.wait_for()
    assert found_by_axe(page) == []
    page.locator("#left-enlarge").click()
    page.locator("#large[open]").wait_for()
    page.screenshot(path=screenshots / f"axe-large-{width}-{scheme}.png")
    assert found_by_axe(page) == []
    page.keyboard.press("Escape")
    while not page.locator("#finished").is_visible():
        before = page.locator("#mine").evaluate("progress => progress.value")
        page.keyboard.press("s")
        page.wait_for_function("before => document.querySelector('#mine').value !== before", arg=before)
        ready.wait_for()
    assert found_by_axe(page) == []
    page.goto(f"{labelling.address}/results")
    page.get_by_text("for whoever runs the labelling").wait_for()
    assert found_by_axe(page) == []
    page.goto("about:blank")
    page.goto(labelling.results)
    page.get_by_role("rowheader", name=f"{width} {scheme}").wait_for()
    assert found_by_axe(page) == []
    page.context.close()
