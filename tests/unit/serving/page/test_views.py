"""Numbers as markup: every number is in the table, texts of visitors are escaped, plots follow the scheme."""

import base64
import csv
import io
import re
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import pytest
from PIL import Image
from scipy import stats

from dina_lrm.serving.views import (
    VARIABLES,
    LevelScores,
    MeanScore,
    Ranked,
    Strip,
    comparison_view,
    levels_text,
    ranking_view,
    sampling_view,
    score_view,
)

MODEL_LEVELS = (0.2, 0.5)
TOTAL = MeanScore(-1.5, 0.25, 8)
BY_LEVEL = LevelScores((0.1, 0.9), (MeanScore(-2.0, 0.1, 8), MeanScore(3.25, 0.5, 8)))


class Outline(HTMLParser):
    """Texts of table cells row by row, and the tags that were opened and not closed."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_interval_is_students() -> None:
    """The mean of 2, 4, 6 is 4 with standard error 2 / sqrt(3)."""
    expected = stats.t.interval(0.95, df=2, loc=4, scale=2 / 3**0.5)
    assert MeanScore(4.0, 2 / 3**0.5, 3).interval == pytest.approx(expected)


def test_a_score_with_its_levels() -> None:
    markup = score_view(TOTAL, MODEL_LEVELS, BY_LEVEL, [])
    outline = Outline(markup)
    assert outline.open == []
    assert outline.rows == [
        ["σ", "Score", "Standard error"],
        ["0.1", "−2.00", "0.100"],
        ["0.9", "3.25", "0.500"],
    ]
    assert "−1.50 <small>± 0.25" in markup
    assert levels_text(MODEL_LEVELS) in markup
    assert 'aria-label="Score at 2 noise levels, from −2.00 at σ = 0.1 to 3.25 at σ = 0.9"' in markup


def test_a_score_before_its_levels_are_known() -> None:
    markup = score_view(TOTAL, MODEL_LEVELS, None, [])
    assert "−1.50" in markup
    assert "<svg" not in markup


@pytest.mark.parametrize(
    ("probability", "verdict", "width"),
    [
        (0.875, "A is preferred with a probability of 87.5 %", "87.5"),
        (0.125, "B is preferred with a probability of 87.5 %", "12.5"),
        (0.5, "A and B are equally likely to be preferred", "50.0"),
    ],
)
def test_a_comparison(probability: float, verdict: str, width: str) -> None:
    markup = comparison_view(probability, (TOTAL, MeanScore(0.5, 0.1, 8)), MODEL_LEVELS, BY_LEVEL, [])
    outline = Outline(markup)
    assert outline.open == []
    assert outline.rows[1:3] == [["A", "−1.50", "0.250"], ["B", "0.50", "0.100"]]
    assert verdict in markup
    assert f'class="reward-a" style="width:{width}%"' in markup
    assert "above zero at 1 of 2 noise levels" in markup


def test_a_ranking_and_its_file() -> None:
    names = ["<b>x</b>.png", 'comma, "quote".png']
    ranking = [Ranked(name, TOTAL, place) for place, name in enumerate(names, start=1)]
    markup = ranking_view(ranking, MODEL_LEVELS, [])
    assert Outline(markup).rows[1:] == [
        ["1", names[0], "−1.50", "0.250"],
        ["2", names[1], "−1.50", "0.250"],
    ]
    assert "<b>" not in markup
    (data,) = re.findall(r'href="data:text/csv;base64,([^"]+)"', markup)
    rows = list(csv.reader(io.StringIO(base64.b64decode(data).decode())))
    assert rows == [
        ["rank", "picture", "score", "standard_error"],
        ["1", names[0], "-1.500000", "0.250000"],
        ["2", names[1], "-1.500000", "0.250000"],
    ]


def test_shared_places() -> None:
    ranking = [Ranked(f"{name}.png", TOTAL, place) for name, place in zip("abcd", (1, 2, 2, 4), strict=True)]
    markup = ranking_view(ranking, MODEL_LEVELS, [])
    assert [row[0] for row in Outline(markup).rows[1:]] == ["1", "=2", "=2", "4"]
    assert "marks a place that is shared" in markup
    assert "marks a place that is shared" not in ranking_view(ranking[:2], MODEL_LEVELS, [])
    assert [row[0] for row in csv_of(markup)[1:]] == ["1", "2", "2", "4"]


@pytest.mark.parametrize("name", ["=1+2.png", "+1.png", "-1.png", "@sum.png", "\t=1.png"])
def test_a_spreadsheet_computes_nothing(name: str) -> None:
    markup = ranking_view([Ranked(name, TOTAL, 1)], MODEL_LEVELS, [])
    assert csv_of(markup)[1][1] == f"'{name}"
    assert Outline(markup).rows[1][1] == name


def csv_of(markup: str) -> list[list[str]]:
    (data,) = re.findall(r'href="data:text/csv;base64,([^"]+)"', markup)
    return list(csv.reader(io.StringIO(base64.b64decode(data).decode())))


def test_sampling() -> None:
    strip = [Strip(1, 1.0, Image.new("RGB", (512, 256)))]
    markup = sampling_view((1.0, 0.5), (7.0, 8.0), (-3.0, -1.0), MODEL_LEVELS, strip, [], num_steps=2)
    outline = Outline(markup)
    assert outline.open == []
    assert outline.rows[1:] == [["1", "1.000", "−3.00", "7.00"], ["2", "0.500", "−1.00", "8.00"]]
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', markup)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (128, 64)


@pytest.mark.parametrize("view", ["score", "comparison", "ranking", "sampling"])
def test_notes_are_escaped_and_shown(view: str) -> None:
    notes = ["unknown: <script>"]
    markup = {
        "score": lambda: score_view(TOTAL, MODEL_LEVELS, None, notes),
        "comparison": lambda: comparison_view(0.5, (TOTAL, TOTAL), MODEL_LEVELS, None, notes),
        "ranking": lambda: ranking_view([Ranked("a", TOTAL, 1)], MODEL_LEVELS, notes),
        "sampling": lambda: sampling_view((1.0,), (1.0,), (1.0,), MODEL_LEVELS, [], notes, num_steps=1),
    }[view]()
    assert 'role="note">Note: unknown: &lt;script&gt;' in markup


def test_plots_follow_the_pages_colours_and_share_no_names() -> None:
    plots = [
        score_view(TOTAL, MODEL_LEVELS, BY_LEVEL, []),
        comparison_view(0.5, (TOTAL, TOTAL), MODEL_LEVELS, BY_LEVEL, []),
        sampling_view((1.0, 0.5), (7.0, 8.0), (-3.0, -1.0), MODEL_LEVELS, [], [], num_steps=2),
    ]
    for markup in plots:
        assert "#0a00" not in markup
        assert "var(--reward-first)" in markup
        assert "var(--body-text-color)" in markup
    clips = [set(re.findall(r'<(?:path|clipPath) id="([mp][0-9a-f]{10})"', markup)) for markup in plots]
    assert all(clips)
    assert not clips[0] & clips[1]
    assert not clips[0] & clips[2]
    assert len(VARIABLES) == 5


def test_drawing_in_several_threads_changes_nothing() -> None:
    alone = score_view(TOTAL, MODEL_LEVELS, BY_LEVEL, [])
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: score_view(TOTAL, MODEL_LEVELS, BY_LEVEL, []), range(8)))
    assert set(together) == {alone}


@pytest.mark.parametrize(
    ("levels", "text"),
    [((0.4,), "σ = 0.4"), ((0.2, 0.5, 0.7), "σ = 0.2, 0.5 and 0.7 together")],
)
def test_levels_in_words(levels: tuple[float, ...], text: str) -> None:
    assert levels_text(levels) == text
