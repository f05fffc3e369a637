"""The page of a result: accuracies with intervals, noise levels, calibration, and what accuracy costs."""

from collections.abc import Sequence
from pathlib import Path

from scipy import stats

from dina_lrm.evaluation.benchmarks import EvaluationResult
from dina_lrm.evaluation.metrics import Interval, Reliability
from dina_lrm.evaluation.public import PublicResult
from dina_lrm.evaluation.rules import RULES
from dina_lrm.reporting import figures
from dina_lrm.reporting.html import Block, Fact, Paragraph, Plot, Plots, Report, Section, Table, write_html

__all__ = ["cost_page", "pairs_page", "public_page", "reliability_curve"]


def reliability_curve(label: str, bins: Reliability) -> figures.ReliabilityCurve:
    """Bins of stated probability, with Wilson intervals for what was observed."""
    observed: list[Interval] = []
    for share, count in zip(bins.bin_accuracy, bins.bin_count, strict=True):
        interval = stats.binomtest(round(share * count), count).proportion_ci(method="wilson")
        observed.append(Interval(value=share, low=min(interval.low, share), high=max(interval.high, share)))
    return figures.ReliabilityCurve(
        label=label, stated=bins.bin_probability, observed=observed, counts=bins.bin_count
    )


CAPTION = (
    "Intervals resample prompts. ECE is by the reward's own scale where it has one for the levels, else by "
    "one fitted to the other half of the prompts."
)
BAYES = " % of Bayes is expected agreement with fresh raters over that of the best reward."


def pairs_page(result: EvaluationResult, folder: Path) -> None:
    """FOLDER/results.html of a result on pairs of latents."""
    known = result.bayes is not None
    rows = [
        [
            setting.setting.label,
            str(setting.setting.passes),
            *setting.accuracy.percents(),
            *(setting.expected_bayes_share.percents() if setting.expected_bayes_share else ()),
            f"{100 * setting.reliability.expected_calibration_error:.1f}",
        ]
        for setting in result.settings
    ]
    headers = ["noise levels", "passes", "accuracy %", "95 % interval"]
    headers += [*(["% of Bayes", "95 % interval"] if known else []), "ECE %"]
    curve = [(one.setting.noise_levels[0], one.accuracy) for one in result.sweep]
    _write(
        folder,
        title=f"A reward on {result.benchmark}",
        summary=f"{result.num_pairs:,} pairs of {result.num_prompts:,} prompts.",
        facts=[
            Fact(value=f"{100 * result.default.accuracy.value:.1f} %", label="accuracy", note="by default")
        ],
        table=Table(headers=headers, rows=rows, caption=CAPTION + (BAYES if known else "")),
        curve=curve,
        bayes=None if result.bayes is None else result.bayes.accuracy.value,
        bins=result.default.reliability,
    )


def public_page(result: PublicResult, benchmark: str, folder: Path) -> None:
    """FOLDER/results.html of a result on a public benchmark."""
    rule = result.published.rule
    rows = [
        [
            setting.label,
            *setting.accuracy.accuracy.percents(),
            *setting.by_pair.accuracy.percents(),
            f"{100 * setting.reliability.expected_calibration_error:.1f}",
        ]
        for setting in result.settings
    ]
    headers = ["scores", f"{rule} %", "95 % interval", "strict, by pair %", "95 % interval", "ECE %"]
    singles = [
        (setting.label, setting.by_pair.accuracy) for setting in result.settings if _is_number(setting.label)
    ]
    rejected = f"{len(result.rejects):,} could not be used (rejects.jsonl)."
    compared = f"{len(result.comparisons):,} of {result.num_items:,} comparisons of {result.num_rows:,} rows,"
    compared += f" {result.published.num_prompts:,} prompts."
    _write(
        folder,
        title=f"{result.model} on {benchmark}",
        summary=f"{compared} {rejected}",
        facts=[
            Fact(
                value=f"{100 * result.published.accuracy.value:.1f} %",
                label=f"accuracy, rule {rule}",
                note=RULES[rule].source,
            ),
            Fact(value=f"{1000 * result.cost.seconds:.0f} ms", label="a picture", note="encoding included"),
        ],
        table=Table(headers=headers, rows=rows, caption=CAPTION),
        curve=sorted((float(label), accuracy) for label, accuracy in singles),
        bayes=None,
        bins=result.settings[0].reliability,
    )


def cost_page(results: Sequence[PublicResult], benchmark: str, folder: Path) -> None:
    """FOLDER/costs.html: accuracy of several models against FLOPs, seconds and memory of a score."""
    rule = results[0].published.rule
    points = {
        "TFLOP a score": [None if r.cost.flops is None else r.cost.flops / 1e12 for r in results],
        "seconds a score": [r.cost.seconds for r in results],
        "peak memory, GB": [r.cost.peak_memory_bytes / 1e9 for r in results],
    }
    names = [r.model for r in results]
    accuracies = [r.published.accuracy for r in results]
    plots = [
        Plot(
            svg=figures.themed_svg(
                figures.accuracy_against_cost(names, accuracies, costs, unit=unit),
                label=f"accuracy of {len(names)} models against {unit}",
            ),
            caption=f"Accuracy on {benchmark} against {unit}; bars are 95 % intervals over prompts.",
        )
        for unit, costs in points.items()
        if any(cost is not None for cost in costs)
    ]
    rows = [
        [
            r.model,
            *r.published.accuracy.percents(),
            "-" if r.cost.flops is None else f"{r.cost.flops / 1e12:.4g}",
            f"{r.cost.seconds:.4g}",
            f"{r.cost.peak_memory_bytes / 1e9:.2f}",
        ]
        for r in results
    ]
    headers = ["model", f"{rule} %", "95 % interval", "TFLOP", "seconds", "GB"]
    caption = "One score of one picture, encoding included; memory is that of the process while it scored."
    blocks: list[Block] = [Plots(plots=plots), Table(headers=headers, rows=rows, caption=caption)]
    report = Report(
        title=f"What accuracy costs on {benchmark}",
        summary=f"{len(results)} models on {len(results[0].comparisons):,} comparisons, rule {rule}.",
        sections=[Section(title="Accuracy against cost", blocks=blocks)],
    )
    write_html(report, folder / "costs.html")


def _write(
    folder: Path,
    *,
    title: str,
    summary: str,
    facts: Sequence[Fact],
    table: Table,
    curve: Sequence[tuple[float, Interval]],
    bayes: float | None,
    bins: Reliability,
) -> None:
    plots = []
    if len(curve) > 1:
        levels = figures.AccuracyCurve(
            label="single noise levels",
            noise_levels=[level for level, _ in curve],
            accuracy=[accuracy for _, accuracy in curve],
        )
        drawn = figures.accuracy_by_noise_level([levels], bayes_accuracy=bayes)
        svg = figures.themed_svg(drawn, label="accuracy against noise level")
        plots.append(Plot(svg=svg, caption="Accuracy at single noise levels, with 95 % intervals."))
    drawn = figures.reliability_diagram([reliability_curve("by default", bins)])
    svg = figures.themed_svg(drawn, label="reliability diagram")
    error = 100 * bins.expected_calibration_error
    caption = (
        f"How often the favoured side won, by stated probability. Expected calibration error {error:.1f} %."
    )
    plots.append(Plot(svg=svg, caption=caption))
    scale = f"P(a preferred) = Phi(score difference / {bins.scale:.3g})."
    blocks: list[Block] = [table, Plots(plots=plots), Paragraph(text=scale)]
    report = Report(
        title=title, summary=summary, facts=facts, sections=[Section(title="Accuracy", blocks=blocks)]
    )
    write_html(report, folder / "results.html")


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True
