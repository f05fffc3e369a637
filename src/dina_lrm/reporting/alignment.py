"""The page of an alignment run: gains of proxy and gold, distance, diversity, pictures before and now.

Written again at every evaluation, so that a browser's reload shows a run as it goes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dina_lrm.evaluation.metrics import Interval
from dina_lrm.reporting import figures
from dina_lrm.reporting.html import (
    Block,
    Fact,
    Gallery,
    Paragraph,
    Picture,
    Plot,
    Plots,
    Report,
    Section,
    Table,
    write_html,
)

__all__ = ["AlignmentPoint", "alignment_page"]


@dataclass(frozen=True, kw_only=True)
class AlignmentPoint:
    """One evaluation; gains are paired, over the first one that has the score."""

    step: int
    gains: Mapping[str, Interval]
    """By name, the proxy first, then the gold score; without those that are missing here."""
    means: Mapping[str, float]
    distance: float
    diversity: float
    overoptimised: str | None


def alignment_page(
    points: Sequence[AlignmentPoint],
    file: Path,
    *,
    title: str,
    missing: Mapping[str, tuple[int, str]],
    prompts: Sequence[str],
    before: Sequence[Image.Image],
    now: Sequence[Image.Image],
) -> None:
    """Write the page.

    Args:
        missing: gold scores that the last evaluation lacks: since which update, and why.
        prompts, before, now: held-out prompts and their pictures at the first and the last evaluation, from
            the same seeds.
    """
    steps, last = [point.step for point in points], points[-1]
    names = list(dict.fromkeys(name for point in points for name in point.gains))
    overoptimised = next((point for point in points if point.overoptimised is not None), None)
    plots = []
    for name in names:
        having = [point for point in points if name in point.gains]
        drawn = figures.gain_curve(
            [point.step for point in having],
            [point.gains[name] for point in having],
            label=name,
            overoptimised=overoptimised.step if overoptimised else None,
        )
        kind = "proxy, which is maximised" if name == names[0] else "gold, which the run never sees"
        plots.append(
            Plot(
                svg=figures.themed_svg(drawn, label=f"gain of {name} over updates"),
                caption=f"Gain of {name} ({kind}) over the start on held-out prompts; 95 % interval.",
            )
        )
    quantities = {
        "distance": "Norm of the adapter's change of the weights, relative to the weights.",
        "diversity": "Root mean square difference between the latents of pictures of one prompt.",
    }
    for name, meaning in quantities.items():
        drawn = figures.plain_curve(steps, [getattr(point, name) for point in points], label=name)
        plots.append(Plot(svg=figures.themed_svg(drawn, label=f"{name} over updates"), caption=meaning))
    facts = [
        _gained(name, next(point for point in reversed(points) if name in point.gains)) for name in names
    ]
    facts.append(Fact(value=str(last.step), label="updates"))
    blocks: list[Block] = [Plots(plots=plots)]
    if overoptimised is not None:
        blocks.insert(
            0,
            Paragraph(text=f"Update {overoptimised.step}: over-optimised: {overoptimised.overoptimised}."),
        )
    blocks[:0] = [
        Paragraph(
            text=f"The gold score {name} is missing since update {since}, and asked again at every "
            f"evaluation. What it said last: {reason}"
        )
        for name, (since, reason) in missing.items()
    ]
    rows = [
        [
            str(point.step),
            *(f"{point.means[name]:.4g}" if name in point.means else "missing" for name in names),
            f"{point.distance:.3g}",
            f"{point.diversity:.3g}",
        ]
        for point in points
    ]
    headers = ["update", *names, "distance", "diversity"]
    blocks.append(Table(headers=headers, rows=rows, caption="Means over held-out prompts."))
    pictures = [
        Picture(image=image, alternative=f"{when}: {prompt}", lines=[when, prompt])
        for prompt, pair in zip(prompts, zip(before, now, strict=True), strict=True)
        for when, image in zip(("before", f"update {last.step}"), pair, strict=True)
    ]
    gallery = Gallery(pictures=pictures, caption="Held-out prompts at the same seeds.", columns=8)
    summary = f"{len(points)} evaluations on held-out prompts with fixed seeds, with averaged weights."
    report = Report(
        title=title,
        summary=summary,
        facts=facts,
        sections=[
            Section(title="Gold against proxy", blocks=blocks),
            Section(title="Pictures", blocks=[gallery]),
        ],
    )
    write_html(report, file)


def _gained(name: str, point: AlignmentPoint) -> Fact:
    gain = point.gains[name]
    interval = (
        f"95 % interval {gain.low:+.3g} to {gain.high:+.3g}" if gain.known else "one prompt: no interval"
    )
    return Fact(value=f"{gain.value:+.3g}", label=f"{name} gained", note=f"update {point.step}, {interval}")
