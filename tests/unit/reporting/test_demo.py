"""The demo's report from invented results: complete, self-contained, well-formed, honest when it must be."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from dina_lrm.reporting import demo as demo_report
from dina_lrm.reporting import demo_results
from dina_lrm.reporting.html import render_html
from tests.unit.reporting.demo_results import make_demo_results


@pytest.fixture(scope="module")
def results():
    return make_demo_results()


@pytest.fixture(scope="module")
def page(results):
    return render_html(demo_report.build_report(results))


class Outline(HTMLParser):
    """Checks nesting and collects headings, pictures and addresses."""

    VOID = frozenset(("meta", "link", "img", "br", "path", "use", "rect"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.addresses: list[str] = []
        self.images_without_text = 0

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.addresses += [
            value for key, value in attributes.items() if key in ("src", "href", "xlink:href") and value
        ]
        if tag == "img" and not attributes.get("alt"):
            self.images_without_text += 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.addresses += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_well_formed_and_complete(page):
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.tags["h1"] == 1
    assert outline.tags["h2"] == 6
    assert outline.tags["img"] >= 12 + 3 * 8
    assert outline.tags["svg"] == 6
    assert outline.tags["table"] == 2
    assert outline.images_without_text == 0


def test_page_asks_for_nothing_outside_itself(page):
    outline = Outline()
    outline.feed(page)
    assert {address.split(":")[0] if ":" in address else address[0] for address in outline.addresses} <= {
        "data",
        "#",
    }
    assert "<script" not in page
    assert not re.search(r"url\((?!#)", page)


def test_plots_take_the_pages_colours(page):
    assert "#0a00" not in page.lower()
    assert "var(--series-1)" in page


def test_page_is_reproducible(results, page):
    assert render_html(demo_report.build_report(results)) == page


def test_text_is_escaped(results):
    ranking = replace(results.rankings[0], caption="a <b>red</b> & blue circle")
    page = render_html(demo_report.build_report(replace(results, rankings=[ranking])))
    assert "<b>red</b>" not in page
    assert "a &lt;b&gt;red&lt;/b&gt; &amp; blue circle" in page


def test_best_of_group_by_hand(results):
    """Utilities (0.2, 0.8) and (0.6, 0.4), the favourite first: mean 0.5, favourites 0.4, best 0.7."""
    first, second = results.rankings[0].pictures[:2]
    rankings = [
        demo_results.Ranking(
            caption="a", pictures=[replace(first, utility=0.2), replace(second, utility=0.8)]
        ),
        demo_results.Ranking(
            caption="b", pictures=[replace(first, utility=0.6), replace(second, utility=0.4)]
        ),
    ]
    assert demo_report.best_of_group(rankings) == pytest.approx((0.5, 0.4, 0.7))
    assert demo_report.rank_correlation(rankings) == pytest.approx(
        0.0
    )  # one pair the right way, one the wrong way
    caption, preferred, better = demo_report.worst_disagreement(rankings)
    assert (caption, preferred.utility, better.utility) == ("a", 0.2, 0.8)


def test_no_disagreement_is_said(results):
    first, second = results.rankings[0].pictures[:2]
    ranking = demo_results.Ranking(
        caption="a", pictures=[replace(first, utility=0.9), replace(second, utility=0.1)]
    )
    assert demo_report.worst_disagreement([ranking]) is None
    page = render_html(demo_report.build_report(replace(results, rankings=[ranking])))
    assert "never prefers one that the judge finds worse" in page


@pytest.mark.parametrize(
    ("bonus", "words"), [(0.03, "gains 3.0 points"), (-0.03, "loses 3.0 points"), (0, "nothing")]
)
def test_ensemble_is_reported_whichever_way_it_goes(results, bonus, words):
    result = results.shipped.result
    best = max(result.sweep, key=lambda item: item.accuracy.value)
    accuracy = replace(best.accuracy, value=best.accuracy.value + bonus)
    ensemble = replace(result.ensembles[0], accuracy=accuracy)
    changed = replace(results, shipped=replace(results.shipped, result=replace(result, ensembles=[ensemble])))
    assert words in demo_report.verdict(changed)


def test_every_row_of_a_table_has_its_headers(page):
    for table in re.findall(r"<table>.*?</table>", page, flags=re.DOTALL):
        rows = [
            len(re.findall(r"<t[hd]", row)) for row in re.findall(r"<tr>.*?</tr>", table, flags=re.DOTALL)
        ]
        assert len(set(rows)) == 1
