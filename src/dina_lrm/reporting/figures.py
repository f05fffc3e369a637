"""The plots of a result, as SVG that follows the page's light or dark colours, or as PNG.

Functions take plain numbers, draw on the axes given or on new ones, and return the figure; `themed_svg` turns
a figure into markup. Lines are drawn in placeholder colours that become CSS variables (`--ink`, `--series-1`,
...), so one drawing serves both schemes. Figures are about as wide as a phone, because text in a drawing
shrinks with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

from dina_lrm.evaluation.metrics import Interval
from dina_lrm.reporting import style
from dina_lrm.reporting.style import INK, MUTED, RULE, SERIES, page_svg

VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)},
}
"""Placeholder colours, which nobody would choose to see, and the CSS variables they become."""

PRINTED = {
    INK: "#1a1d21",
    MUTED: "#5c6570",
    RULE: "#d9dde2",
    SERIES[0]: "#2456c9",
    SERIES[1]: "#b8500a",
    SERIES[2]: "#1d7a57",
    SERIES[3]: "#8a3ba8",
}
"""The light scheme, for PNG files."""

FIGURE_SIZE = (5.2, 3.7)
MARKERS = ("o", "s", "D", "^")

STYLE: Any = style.STYLE | {
    "font.size": 11,
    "axes.labelsize": 11,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "svg.hashsalt": "dina-lrm",
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Our settings for what is drawn inside; also a decorator."""
    with mpl.rc_context(STYLE):
        yield


@dataclass(frozen=True, kw_only=True)
class AccuracyCurve:
    """One model's accuracy at single noise levels, and of its ensemble of several."""

    label: str
    noise_levels: Sequence[float]
    accuracy: Sequence[Interval]
    ensemble: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class ReliabilityCurve:
    """Pairs in bins of the stated probability: what was stated on average, and how often it came true."""

    label: str
    stated: Sequence[float]
    observed: Sequence[Interval]
    counts: Sequence[int]


@figure_style()
def accuracy_by_noise_level(
    curves: Sequence[AccuracyCurve],
    *,
    bayes_accuracy: float | None = None,
    chance: float = 0.5,
    axes: Axes | None = None,
) -> Figure:
    """Accuracy against sigma with intervals; ensembles stand at the right, the Bayes rate is the ceiling."""
    axes = axes or new_figure()
    at_right = 1.1
    for number, curve in enumerate(curves):
        colour, marker = SERIES[number], MARKERS[number]
        sigma, values = list(curve.noise_levels), [100 * point.value for point in curve.accuracy]
        axes.fill_between(
            sigma,
            [100 * point.low for point in curve.accuracy],
            [100 * point.high for point in curve.accuracy],
            color=colour,
            alpha=0.16,
            linewidth=0,
        )
        axes.plot(sigma, values, color=colour, marker=marker, markersize=4.5, label=curve.label)
        if curve.ensemble is not None:
            point, x = curve.ensemble, at_right + 0.05 * (number - (len(curves) - 1) / 2)
            spread = [[100 * (point.value - point.low)], [100 * (point.high - point.value)]]
            axes.errorbar(
                [x], [100 * point.value], spread, color=colour, marker=marker, markersize=5.5, capsize=3
            )
    if bayes_accuracy is not None:
        axes.axhline(100 * bayes_accuracy, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"Bayes-optimal {100 * bayes_accuracy:.1f}",
            (0, 100 * bayes_accuracy),
            xytext=(0, 4),
            textcoords="offset points",
            color=INK,
        )
    axes.axhline(100 * chance, color=RULE, linewidth=1)
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    labels = ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    if any(curve.ensemble is not None for curve in curves):
        ticks, labels = [*ticks, at_right], [*labels[:-1], "", "ens."]
    axes.set_xticks(ticks, labels)
    axes.set_xlim(-0.04, at_right + 0.08 if len(ticks) > 6 else 1.04)
    axes.set_ylim(100 * chance - 3, max(100 * (bayes_accuracy or 0) + 5, axes.get_ylim()[1]))
    axes.set_xlabel("noise level σ")
    axes.set_ylabel("pairs ranked right, %")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.08))
    return whole_figure(axes)


@figure_style()
def reliability_diagram(curves: Sequence[ReliabilityCurve], *, axes: Axes | None = None) -> Figure:
    """Observed against stated probability; on the diagonal, a stated 80 % comes true in 80 of 100 pairs."""
    axes = axes or new_figure()
    axes.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for number, curve in enumerate(curves):
        largest = max(curve.counts, default=1)
        stated, observed = [100 * p for p in curve.stated], [100 * point.value for point in curve.observed]
        below = [100 * (point.value - point.low) for point in curve.observed]
        above = [100 * (point.high - point.value) for point in curve.observed]
        axes.errorbar(
            stated, observed, [below, above], color=SERIES[number], linewidth=1.4, elinewidth=1, alpha=0.9
        )
        areas = [12 + 80 * count / largest for count in curve.counts]
        axes.scatter(
            stated, observed, areas, color=SERIES[number], marker=MARKERS[number], label=curve.label, zorder=3
        )
    start = 50 if curves and min(min(curve.stated, default=1) for curve in curves) >= 0.5 else 0
    axes.set_xlim(start - 1, 101)
    axes.set_ylim(start - 4, 102)
    axes.set_xlabel("stated probability, %")
    axes.set_ylabel("came true, %")
    legend = axes.legend(loc="upper left")
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_sizes([36])  # pyright: ignore[reportAttributeAccessIssue]
    return whole_figure(axes)


@figure_style()
def accuracy_against_cost(
    names: Sequence[str],
    accuracies: Sequence[Interval],
    costs: Sequence[float | None],
    *,
    unit: str,
    axes: Axes | None = None,
) -> Figure:
    """One point a model, named beside it; a model of unknown cost is left out.

    The axis of cost is logarithmic where costs differ by more than ten, and starts at 0 otherwise.
    """
    axes = axes or new_figure()
    known = [cost for cost in costs if cost is not None and cost > 0]
    if known and max(known) > 10 * min(known):
        axes.set_xscale("log")
        axes.margins(x=0.3)
    elif known:
        axes.set_xlim(0, 1.3 * max(known))
    for number, (name, accuracy, cost) in enumerate(zip(names, accuracies, costs, strict=True)):
        if cost is None or cost <= 0:
            continue
        value = 100 * accuracy.value
        spread = [[value - 100 * accuracy.low], [100 * accuracy.high - value]]
        colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
        axes.errorbar([cost], [value], spread, color=colour, marker=marker, markersize=6, capsize=3)
        offset = (7, -13 if number % 2 else 5)  # neighbours of equal cost do not write over each other
        axes.annotate(name, (cost, value), xytext=offset, textcoords="offset points", color=colour)
    axes.set_xlabel(unit)
    axes.set_ylabel("accuracy, %")
    return whole_figure(axes)


@figure_style()
def training_curve(
    steps: Sequence[int],
    accuracy: Sequence[float],
    *,
    ceiling: float | None = None,
    axes: Axes | None = None,
) -> Figure:
    """Accuracy of the training batches, as it was and smoothed."""
    axes = axes or new_figure()
    axes.plot(steps, percents(accuracy), color=SERIES[1], linewidth=1, alpha=0.25)
    axes.plot(steps, percents(exponential_average(accuracy)), color=SERIES[1], label="running mean")
    finish_curve(axes, ceiling)
    return whole_figure(axes)


@figure_style()
def validation_curves(
    steps: Sequence[int],
    accuracy: Mapping[str, Sequence[float]],
    *,
    ceiling: float | None = None,
    axes: Axes | None = None,
) -> Figure:
    """Accuracy of held-out pairs while training, a line for each noise level."""
    axes = axes or new_figure()
    for number, (level, values) in enumerate(accuracy.items()):
        colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
        axes.plot(steps, percents(values), color=colour, marker=marker, markersize=4.5, label=f"σ = {level}")
    finish_curve(axes, ceiling)
    return whole_figure(axes)


@figure_style()
def gain_curve(
    steps: Sequence[int],
    gains: Sequence[Interval],
    *,
    label: str,
    overoptimised: int | None = None,
    axes: Axes | None = None,
) -> Figure:
    """A gain over the start with its interval; `overoptimised` marks the update at which a warning came."""
    axes = axes or new_figure()
    axes.axhline(0, color=RULE, linewidth=1)
    lows, highs = [gain.low for gain in gains], [gain.high for gain in gains]
    axes.fill_between(steps, lows, highs, color=SERIES[0], alpha=0.18, linewidth=0)
    axes.plot(steps, [gain.value for gain in gains], color=SERIES[0], marker="o", markersize=4.5)
    if overoptimised is not None:
        axes.axvline(overoptimised, color=SERIES[1], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            "overoptimised",
            (overoptimised, axes.get_ylim()[0]),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color=SERIES[1],
        )
    axes.set_xlabel("update")
    axes.set_ylabel(f"gain of {label}")
    return whole_figure(axes)


@figure_style()
def plain_curve(
    steps: Sequence[int], values: Sequence[float], *, label: str, axes: Axes | None = None
) -> Figure:
    """Some quantity of at least 0 over updates."""
    axes = axes or new_figure()
    axes.plot(steps, list(values), color=SERIES[2], marker="D", markersize=4.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("update")
    axes.set_ylabel(label)
    return whole_figure(axes)


def finish_curve(axes: Axes, ceiling: float | None) -> None:
    """What every accuracy over time has in common."""
    if ceiling is not None:
        axes.axhline(100 * ceiling, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "Bayes-optimal",
            (1, 100 * ceiling),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color=INK,
        )
    axes.axhline(50, color=RULE, linewidth=1)
    axes.set_xlim(left=0)
    axes.set_ylim(40, 100)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("pairs ranked right, %")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")


@figure_style()
def utility_by_rank(utilities: Sequence[Sequence[float]], *, axes: Axes | None = None) -> Figure:
    """Mean gold utility at each place, in the reward's order (as given) and in the judge's own."""
    axes = axes or new_figure()
    places = range(1, min(map(len, utilities)) + 1)
    own = [sorted(group, reverse=True) for group in utilities]
    for number, (label, groups) in enumerate((("reward's order", utilities), ("judge's order", own))):
        means = [sum(group[place - 1] for group in groups) / len(groups) for place in places]
        colour = SERIES[0] if number == 0 else MUTED
        axes.plot(places, means, color=colour, marker=MARKERS[number], markersize=4.5, label=label)
    axes.set_xticks(list(places))
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("place in the ranking")
    axes.set_ylabel("gold judge, mean")
    axes.legend(loc="lower left")
    return whole_figure(axes)


@figure_style()
def agreement_scatter(
    groups: Sequence[tuple[Sequence[float], Sequence[float]]], *, axes: Axes | None = None
) -> Figure:
    """Gold judge against reward; scores are centred within each caption, whose pictures are one group."""
    axes = axes or new_figure()
    for scores, judged in groups:
        centre = sum(scores) / max(len(scores), 1)
        axes.scatter([s - centre for s in scores], judged, 26, color=SERIES[0], alpha=0.55, linewidth=0)
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("reward, minus its mean for the caption")
    axes.set_ylabel("gold judge")
    return whole_figure(axes)


def percents(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def exponential_average(values: Sequence[float], *, decay: float = 0.9) -> list[float]:
    """A running average that starts without bias.

    >>> exponential_average([1.0, 1.0, 1.0])
    [1.0, 1.0, 1.0]
    """
    averages, total, weight = list[float](), 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        averages.append(total / weight)
    return averages


# --- drawing and saving ------------------------------------------------------------------------------------


@figure_style()
def new_figure(size: tuple[float, float] = FIGURE_SIZE) -> Axes:
    """The axes of a new figure that belongs to no window and to no global state."""
    figure = Figure(figsize=size, layout="constrained", facecolor="none")
    return figure.add_subplot(facecolor="none")


def whole_figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def themed_svg(figure: Figure, *, label: str) -> str:
    """Markup for a page: colours are the page's variables, `label` is read to those who cannot see it."""
    with figure_style():
        return page_svg(figure, label, variables=VARIABLES, font="--sans")


def save_png(figure: Figure, path: Any, *, dots_per_inch: int = 200) -> None:
    """Write the figure with the light scheme's colours on white."""
    for artist in figure.findobj():
        for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            recolour(artist, name)
    with figure_style():
        figure.savefig(path, dpi=dots_per_inch, facecolor="white")


def recolour(artist: Any, name: str) -> None:
    """Replace a placeholder colour of a matplotlib artist by the printed one; anything else is left alone."""
    getter, setter = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
    if getter is None or setter is None:
        return
    value = getter()
    try:
        single = to_rgba(value if isinstance(value, str | tuple) else value[0])
    except (TypeError, ValueError, IndexError):
        return
    printed = PRINTED.get(to_hex(single))
    if printed is not None:
        setter((*to_rgba(printed)[:3], single[3]))
