"""What the page shows: numbers as markup, with a plot for the eye and the same numbers in a table.

Every text that comes from a visitor is escaped here. Plots are SVG drawn in placeholder colours that become
CSS variables, so one drawing serves light and dark; they are about as wide as a phone, because text in a
drawing shrinks with it. Classes are those of page.css.
"""

import base64
import csv
import io
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import t as student

from dina_lrm.reporting import style
from dina_lrm.reporting.style import INK, MUTED, RULE, page_svg

__all__ = [
    "LevelScores",
    "MeanScore",
    "Ranked",
    "Strip",
    "comparison_view",
    "headline",
    "levels_text",
    "number",
    "place_names",
    "ranking_view",
    "sampling_view",
    "score_view",
]

FIRST, SECOND = style.SERIES[:2]
VARIABLES = {
    INK: "--body-text-color",
    MUTED: "--body-text-color-subdued",
    RULE: "--border-color-primary",
    FIRST: "--reward-first",
    SECOND: "--reward-second",
}
"""Placeholder colours and the CSS variables they become."""

STYLE: Any = style.STYLE | {"font.size": 11.5, "lines.markersize": 4.5}

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a cell begins that a spreadsheet would compute."""
SHARED = (
    '<p class="reward-muted">= marks a place that is shared: under other noise these scores could stand in '
    "another order (95 % interval of the difference).</p>"
)

_drawing = threading.Lock()
"""matplotlib's settings are one for the process, and handlers draw in threads."""


@dataclass(frozen=True)
class MeanScore:
    """A mean over noise draws."""

    value: float
    standard_error: float
    num_draws: int

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of 95 % for the mean under other noise draws, by Student's t."""
        reach = float(student.ppf(0.975, self.num_draws - 1)) * self.standard_error
        return self.value - reach, self.value + reach


@dataclass(frozen=True)
class LevelScores:
    """Scores, or leads, at single noise levels."""

    levels: Sequence[float]
    scores: Sequence[MeanScore]


@dataclass(frozen=True)
class Ranked:
    """One picture of a ranking, best first."""

    name: str
    score: MeanScore
    place: int
    """From 1; the same for pictures whose scores cannot be told apart."""


@dataclass(frozen=True)
class Strip:
    """One picture on the way to a sample."""

    step: int
    """From 1."""
    sigma: float
    picture: Image.Image


def levels_text(levels: Sequence[float]) -> str:
    """
    >>> levels_text([0.2, 0.5])
    'σ = 0.2 and 0.5 together'
    """
    names = [f"{level:g}" for level in levels]
    if len(names) == 1:
        return f"σ = {names[0]}"
    return f"σ = {', '.join(names[:-1])} and {names[-1]} together"


def number(value: float, digits: int = 2) -> str:
    """With a true minus sign.

    >>> number(-1.5)
    '−1.50'
    """
    return f"{value:.{digits}f}".replace("-", "−")


# --- the four results --------------------------------------------------------------------------------------


def headline(total: MeanScore, model_levels: Sequence[float]) -> str:
    """A score with its interval."""
    low, high = total.interval
    return (
        f'<p class="reward-number">{number(total.value)} <small>± {number(total.standard_error)}</small></p>'
        f"<p>Mean and standard error over {total.num_draws} noise draws at {levels_text(model_levels)}; 95 % "
        f"interval {number(low)} to {number(high)}.</p>"
    )


def score_view(
    total: MeanScore, model_levels: Sequence[float], by_level: LevelScores | None, notes: Sequence[str]
) -> str:
    """A score with its interval, and what it is at single noise levels once that is known."""
    head = headline(total, model_levels)
    if by_level is None:
        return _notes(notes) + head + '<p class="reward-muted">Looking at single noise levels …</p>'
    label = (
        f"Score at {len(by_level.levels)} noise levels, from {number(by_level.scores[0].value)} at σ = "
        f"{by_level.levels[0]:g} to {number(by_level.scores[-1].value)} at σ = {by_level.levels[-1]:g}"
    )
    return (
        _notes(notes)
        + head
        + _level_plot(by_level, "score", label)
        + '<p class="reward-muted">σ is the noise that was added: 0 is none, 1 leaves nothing else. Each '
        "level has its own offset; compare pictures at the same level.</p>"
        + _level_table(by_level, "Score", "Score at single noise levels")
    )


def comparison_view(
    probability: float,
    scores: tuple[MeanScore, MeanScore],
    model_levels: Sequence[float],
    lead: LevelScores | None,
    notes: Sequence[str],
) -> str:
    """Which of two pictures is preferred, as a bar; A's lead at single noise levels once that is known."""
    a, b = f"{100 * probability:.1f}", f"{100 * (1 - probability):.1f}"
    if probability == 0.5:
        verdict = "A and B are equally likely to be preferred"
    elif probability > 0.5:
        verdict = f"A is preferred with a probability of {a} %"
    else:
        verdict = f"B is preferred with a probability of {b} %"
    head = (
        f'<p class="reward-verdict">{verdict}</p>'
        f'<div class="reward-bar" role="img" aria-label="A {a} percent, B {b} percent">'
        f'<span class="reward-a" style="width:{a}%"></span><span class="reward-b" style="width:{b}%"></span>'
        f'</div><div class="reward-ends" aria-hidden="true"><span>A {a} %</span><span>B {b} %</span></div>'
        + _table(
            f"Scores at {levels_text(model_levels)}, {scores[0].num_draws} noise draws",
            ["Picture", "Score", "Standard error"],
            [
                [name, number(score.value), number(score.standard_error, 3)]
                for name, score in zip("AB", scores, strict=True)
            ],
        )
    )
    if lead is None:
        return _notes(notes) + head + '<p class="reward-muted">Looking at single noise levels …</p>'
    ahead = sum(score.value > 0 for score in lead.scores)
    label = f"Lead of A over B: above zero at {ahead} of {len(lead.levels)} noise levels"
    return (
        _notes(notes)
        + head
        + _level_plot(lead, "lead of A over B", label, zero=True)
        + _level_table(lead, "Lead of A", "Score of A minus score of B")
    )


def ranking_view(ranking: Sequence[Ranked], model_levels: Sequence[float], notes: Sequence[str]) -> str:
    """The ranking as a table, and as a CSV file that the link itself holds."""
    places = place_names(ranking)
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["rank", "picture", "score", "standard_error"])
    for one in ranking:
        name = f"'{one.name}" if one.name.startswith(FORMULA) else one.name
        writer.writerow([one.place, name, f"{one.score.value:.6f}", f"{one.score.standard_error:.6f}"])
    data = base64.b64encode(stream.getvalue().encode()).decode()
    return (
        _notes(notes)
        + _table(
            f"Best first, scores at {levels_text(model_levels)}, {ranking[0].score.num_draws} noise draws",
            ["Rank", "Picture", "Score", "Standard error"],
            [
                [place, escape(one.name), number(one.score.value), number(one.score.standard_error, 3)]
                for place, one in zip(places, ranking, strict=True)
            ],
            texts=2,
        )
        + (SHARED if any(place.startswith("=") for place in places) else "")
        + f'<p><a class="reward-download" download="ranking.csv" href="data:text/csv;base64,{data}">'
        "Download as CSV</a></p>"
    )


def place_names(ranking: Sequence[Ranked]) -> list[str]:
    """The places as they are written: "=2" for each of several pictures that share the second."""
    counts = Counter(one.place for one in ranking)
    return [f"={one.place}" if counts[one.place] > 1 else str(one.place) for one in ranking]


def sampling_view(
    sigmas: Sequence[float],
    of_states: Sequence[float],
    of_pictures: Sequence[float],
    model_levels: Sequence[float],
    strip: Sequence[Strip],
    notes: Sequence[str],
    *,
    num_steps: int,
) -> str:
    """The reward along sampling, and pictures of what the denoiser predicts on the way.

    Args:
        sigmas: noise level at which each step started.
        of_states: scores of the noisy states, each at its own noise level.
        of_pictures: scores of the predicted clean latents, all at `model_levels` and under one noise.
        num_steps: of the whole sampling.
    """
    with _style("sampling"):
        figure = Figure(figsize=(4.2, 4.2), layout="constrained", facecolor="none")
        steps = list(range(1, len(sigmas) + 1))
        upper, lower = figure.subplots(2, sharex=True)
        for axes, values, colour, marker, name in (
            (upper, of_pictures, FIRST, "o", "predicted picture"),
            (lower, of_states, SECOND, "s", "noisy state"),
        ):
            axes.set_facecolor("none")
            axes.plot(steps, list(values), color=colour, marker=marker, clip_on=False)
            axes.set_ylabel(name)
        lower.set_xlabel("step")
        lower.xaxis.get_major_locator().set_params(integer=True)
        lower.set_xlim(0.5, num_steps + 0.5)
        plot = _svg(
            figure,
            f"Score of the predicted picture at step {len(steps)}: {number(of_pictures[-1])}; at the first "
            f"step it was {number(of_pictures[0])}",
        )
    pictures = "".join(
        f'<figure><img src="{_png(one.picture)}" alt="Predicted picture at step {one.step}">'
        f"<figcaption>step {one.step}<br>σ {one.sigma:.2f}</figcaption></figure>"
        for one in strip
    )
    rows = [
        [str(step), f"{sigma:.3f}", number(picture), number(state)]
        for step, sigma, picture, state in zip(steps, sigmas, of_pictures, of_states, strict=True)
    ]
    return (
        _notes(notes)
        + f'<div class="reward-strip">{pictures}</div>'
        + plot
        + '<p class="reward-muted">Above: the clean picture that the denoiser predicts, always scored at '
        f"{levels_text(model_levels)} under one noise, so steps can be compared. Below: the noisy state "
        "itself at its own noise level, which falls from step to step and brings its own offset.</p>"
        + _folded(
            _table("Scores along sampling", ["Step", "σ", "Predicted picture", "Noisy state"], rows),
            "Numbers",
        )
    )


# --- pieces ------------------------------------------------------------------------------------------------


def _notes(notes: Sequence[str]) -> str:
    return "".join(f'<p class="reward-note" role="note">Note: {escape(note)}</p>' for note in notes)


def _table(caption: str, headers: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """Cells are markup; those of the first `texts` columns are texts, the others numbers."""

    def kind(column: int) -> str:
        return ' class="reward-text"' if column < texts else ""

    head = "".join(f'<th scope="col"{kind(column)}>{header}</th>' for column, header in enumerate(headers))
    body = "".join(
        f'<tr><th scope="row"{kind(0)}>{row[0]}</th>'
        + "".join(f"<td{kind(column)}>{cell}</td>" for column, cell in enumerate(row[1:], start=1))
        + "</tr>"
        for row in rows
    )
    return (
        f'<table class="reward-table"><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _folded(content: str, summary: str) -> str:
    return f'<details class="reward-details"><summary>{summary}</summary>{content}</details>'


def _level_table(by_level: LevelScores, name: str, caption: str) -> str:
    rows = [
        [f"{level:g}", number(score.value), number(score.standard_error, 3)]
        for level, score in zip(by_level.levels, by_level.scores, strict=True)
    ]
    return _folded(_table(caption, ["σ", name, "Standard error"], rows), "Numbers")


def _level_plot(by_level: LevelScores, quantity: str, label: str, *, zero: bool = False) -> str:
    with _style(quantity):
        axes = _new_axes()
        if zero:
            axes.axhline(0, color=MUTED, linewidth=1)
        axes.errorbar(
            list(by_level.levels),
            [score.value for score in by_level.scores],
            [score.standard_error for score in by_level.scores],
            color=FIRST,
            marker="o",
            capsize=3,
            elinewidth=1.2,
        )
        axes.set_xlim(0, 1)
        axes.set_xlabel("noise level σ")
        axes.set_ylabel(quantity)
        figure = axes.get_figure(root=True)
        assert isinstance(figure, Figure)
        return _svg(figure, label)


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """Settings of our drawings, for one thread at a time.

    Args:
        salt: of the names of what an SVG defines, so that two plots in one page do not share them.
    """
    with _drawing, mpl.rc_context(STYLE | {"svg.hashsalt": salt}):
        yield


def _new_axes() -> Axes:
    figure = Figure(figsize=(4.2, 2.8), layout="constrained", facecolor="none")
    return figure.add_subplot(facecolor="none")


def _svg(figure: Figure, label: str) -> str:
    """Markup of a figure, to be called within its style."""
    return page_svg(figure, label, variables=VARIABLES, font="--font", attributes='class="reward-plot" ')


def _png(picture: Image.Image) -> str:
    """A picture of a strip as a data URL, at most 128 pixels a side."""
    small = picture.copy()
    small.thumbnail((128, 128))
    stream = io.BytesIO()
    small.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
