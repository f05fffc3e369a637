"""Draws the picture at the top of the README from stored results and from the bundled models.

    python benchmarks/results_figure.py [--results benchmarks/results/shapes_reward.json] [--output
    docs/assets/results.png]

The results are those of `dina-lrm evaluate --benchmark shapes` (its results.json). The pictures are generated
and ranked on the spot, for captions that are fixed here, with one seed and no choosing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import tyro
from matplotlib.figure import Figure
from scipy import stats

from dina_lrm.cli.demo import SAMPLERS
from dina_lrm.evaluation.metrics import Interval
from dina_lrm.reporting import figures

CAPTIONS = (
    "a red circle on a gray background",
    "a blue square to the left of a yellow triangle on a white background",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    results: Path = Path("benchmarks/results/shapes_reward.json")
    """results.json of an evaluation."""
    output: Path = Path("docs/assets/results.png")
    """PNG."""
    seed: int = 0
    """Of the pictures."""


def main(options: Options) -> None:
    results = json.loads(options.results.read_text())
    with figures.figure_style():
        figure = Figure(figsize=(11, 7.4), layout="constrained")
        halves: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        top, bottom = halves
        draw_rankings(top, options.seed)
        left, right = bottom.subplots(1, 2)
    draw_accuracy(left, results)
    draw_reliability(right, results)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figures.save_png(figure, options.output)
    print(options.output)


def draw_rankings(figure: Any, seed: int) -> None:
    """One row of pictures a caption, best first."""
    import dina_lrm
    from dina_lrm.shapes.judge import judge
    from dina_lrm.shapes.pipeline import generate, load_pipeline

    pipeline = load_pipeline()
    model = dina_lrm.RewardModel.from_pretrained("bundled", pipeline=pipeline)
    grid = figure.subplots(len(CAPTIONS), len(SAMPLERS))
    for row, caption in zip(grid, CAPTIONS, strict=True):
        pictures = [
            generate(
                pipeline, [caption], [seed + number], num_inference_steps=steps, guidance_scale=guidance
            )[0]
            for number, (steps, guidance) in enumerate(SAMPLERS)
        ]
        for place, (axes, ranked) in enumerate(zip(row, model.rank(caption, pictures), strict=True)):
            picture = pictures[ranked.index]
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
            utility = judge(picture, caption).utility
            axes.text(
                0.5,
                -0.06,
                f"{ranked.score:+.2f}",
                transform=axes.transAxes,
                ha="center",
                va="top",
                weight="bold",
            )
            axes.text(
                0.5, -0.22, f"judge {utility:.2f}", transform=axes.transAxes, ha="center", va="top",
                color=figures.MUTED, size=9,
            )  # fmt: skip
            if place == 0:
                title = axes.text(
                    0.0, 1.05, f"“{caption}”, the reward's order", transform=axes.transAxes, size=11
                )
                title.set_in_layout(False)  # it runs over the next pictures' columns


def draw_accuracy(axes: Any, results: dict[str, Any]) -> None:
    several = [item for item in results["ensembles"] if item["setting"]["combine"] == "tokens"]
    curve = figures.AccuracyCurve(
        label="bundled reward",
        noise_levels=[item["setting"]["noise_levels"][0] for item in results["sweep"]],
        accuracy=[Interval(**item["accuracy"]) for item in results["sweep"]],
        ensemble=Interval(**several[0]["accuracy"]) if several else None,
    )
    bayes = results["bayes"]
    figures.accuracy_by_noise_level([curve], bayes_accuracy=bayes and bayes["accuracy"]["value"], axes=axes)
    axes.set_title(f"accuracy on {results['num_pairs']:,} unseen pairs", loc="left", size=11)


def draw_reliability(axes: Any, results: dict[str, Any]) -> None:
    bins = results["default"]["reliability"]
    observed: list[Interval] = []
    for share, count in zip(bins["bin_accuracy"], bins["bin_count"], strict=True):
        interval = stats.binomtest(round(share * count), count).proportion_ci(method="wilson")
        observed.append(Interval(value=share, low=min(interval.low, share), high=max(interval.high, share)))
    curve = figures.ReliabilityCurve(
        label=f"σ = {results['default']['setting']['label']}",
        stated=bins["bin_probability"],
        observed=observed,
        counts=bins["bin_count"],
    )
    figures.reliability_diagram([curve], axes=axes)
    axes.set_title("stated probabilities against votes", loc="left", size=11)


if __name__ == "__main__":
    mpl.use("agg")
    main(tyro.cli(Options))
