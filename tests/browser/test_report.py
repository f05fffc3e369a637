"""The report in a real browser: no overflow on a phone, nothing fetched, both schemes are readable."""

import os
from pathlib import Path

import pytest

from dina_lrm.reporting.demo import build_report
from dina_lrm.reporting.html import write_html
from tests.unit.reporting.demo_results import make_demo_results

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of invented results, or the real one that TEST_REPORT names."""
    if "TEST_REPORT" in os.environ:
        return Path(os.environ["TEST_REPORT"]).resolve()
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_html(build_report(make_demo_results()), path)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1280, 900), ("phone", 390, 844)])
def test_report(browser, report, tmp_path, name, width, height, scheme):
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(report.as_uri())
    folder = Path(os.environ.get("TEST_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}-{scheme}.png", full_page=True)

    assert errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate(CONTRAST) >= 4.5  # WCAG AA for text
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
    )
    assert smallest >= 9  # axis labels stay legible on the phone
    page.close()


CONTRAST = """() => {
  const luminance = colour => {
    const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = luminance(getComputedStyle(document.body).backgroundColor);
  const texts = document.querySelectorAll('p, h1, h2, h3, td, th, figcaption, dt, dd');
  return Math.min(...[...texts].map(element => {
    const front = luminance(getComputedStyle(element).color);
    return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
  }));
}"""
