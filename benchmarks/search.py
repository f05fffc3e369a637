"""What search buys: gold score against passes of the denoiser, best of n and successive halving.

    python benchmarks/search.py --output RUNS --results benchmarks/results

Every caption is searched for with the bundled generator and reward, and the winner is judged by gold. Passes
count sampling and scoring (`SearchResult.evaluations`). Intervals resample captions. The question is at how
many passes halving reaches the gold of best of n; it is read off the line through best of n's points, and
halving n is compared with best of n and n / 2 caption by caption: the line is flat where n is large.
Captions of a part are saved as they are done, so a stopped command goes on.
"""

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from record import write_results

from dina_lrm.build.alignment import latent_reward
from dina_lrm.reporting import figures
from dina_lrm.sampling import search
from dina_lrm.sampling.policy import Policy
from dina_lrm.sampling.rollout import SamplerConfig
from dina_lrm.shapes.judge import judge
from dina_lrm.shapes.pipeline import load_pipeline
from dina_lrm.shapes.scenes import sample_caption

BEST_OF = (1, 2, 4, 8, 16)
HALVING = (4, 8, 16, 32)
DRAFTED = (4, 8, 16, 32)
GUIDED = (0.02, 0.05, 0.1)


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path
    results: Path | None = None
    """Folder of the table and the figure; by default OUTPUT."""
    captions: int = 120
    objects: tuple[int, ...] = ()
    """Numbers of objects that captions have, in turn; empty: as the grammar draws them."""
    num_steps: int = 10
    guidance_scale: float = 1.0
    processes: int = 2


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        parts = range(0, options.captions, 10)
        for line in pool.imap_unordered(partial(run, options), parts):
            print(line, flush=True)
    summarize(options)


def run(options: Options, start: int) -> str:
    """Ten captions, every method."""
    file = options.output / f"{start:04d}.json"
    if file.exists():
        return f"{file} (there already)"
    torch.set_num_threads(1)
    pipeline = load_pipeline()
    policy, model = Policy(pipeline), latent_reward("bundled", pipeline, share=False).model
    rng = np.random.default_rng(30_000 + start)
    sampler = SamplerConfig(num_steps=options.num_steps, guidance_scale=options.guidance_scale, batch_size=32)
    records = []
    for place in range(start, min(start + 10, options.captions)):
        wanted = options.objects[place % len(options.objects)] if options.objects else None
        caption = sample_caption(rng, num_objects=wanted).caption

        def gold(result: search.SearchResult, index: int = 0, caption: str = caption) -> float:
            return judge(policy.pictures(result.latents[index : index + 1])[0], caption).utility

        found: dict[str, tuple[float, float]] = {}
        every = search.best_of_n(policy, model, caption, samples=max(BEST_OF), seed=place, sampler=sampler)
        golds = [gold(every, index) for index in range(len(every.scores))]
        per_sample = every.evaluations / max(BEST_OF)
        for count in BEST_OF:  # the first `count` candidates are those of a smaller search
            best = min(at for at, candidate in enumerate(every.indices) if candidate < count)
            cost = count * per_sample if count > 1 else options.num_steps
            found[f"best of {count}"] = golds[best], cost
        if search.draft_steps(options.num_steps) < options.num_steps:
            for samples in DRAFTED:
                result = search.best_of_n(
                    policy,
                    model,
                    caption,
                    samples=samples,
                    draft=search.draft_steps(options.num_steps),
                    seed=place,
                    sampler=sampler,
                )
                found[f"draft, best of {samples}"] = gold(result), result.evaluations
        for samples in HALVING:
            result = search.successive_halving(
                policy,
                model,
                caption,
                samples=samples,
                seed=place,
                sampler=sampler,
            )
            found[f"halving {samples}"] = gold(result), result.evaluations
        for strength in GUIDED:
            result = search.guided(policy, model, caption, strength=strength, seed=place, sampler=sampler)
            found[f"guided {strength:g}"] = gold(result), result.evaluations
        records.append({"caption": caption, "found": found})
    file.write_text(json.dumps(records))
    return str(file)


def summarize(options: Options) -> None:
    records = [
        one for file in sorted(options.output.glob("[0-9]*.json")) for one in json.loads(file.read_text())
    ]
    names = list(records[0]["found"])
    golds = {name: np.array([one["found"][name][0] for one in records]) for name in names}
    costs = {name: float(np.mean([one["found"][name][1] for one in records])) for name in names}
    rng = np.random.default_rng(0)
    draws = rng.integers(len(records), size=(2000, len(records)))
    plain = [f"best of {count}" for count in BEST_OF]

    def passes_of_best_of_n(gold: float, means: Sequence[float]) -> float:
        """Passes at which best of n has this gold; NaN outside its points, where nothing can be read."""
        level = np.maximum.accumulate(means)
        if not level[0] < gold < level[-1]:
            return float("nan")
        return float(np.exp(np.interp(gold, level, [np.log(costs[name]) for name in plain])))

    rows = []
    for name in names:
        mean, low, high = _interval(golds[name], draws)
        row: dict[str, Any] = {"method": name, "gold": [mean, low, high], "passes": costs[name]}
        if not name.startswith("best of"):
            ratio = costs[name] / passes_of_best_of_n(mean, [float(golds[one].mean()) for one in plain])
            ratios = [
                costs[name]
                / passes_of_best_of_n(
                    float(golds[name][chosen].mean()), [float(golds[one][chosen].mean()) for one in plain]
                )
                for chosen in draws
            ]
            inside = np.isfinite(ratios)
            if np.isfinite(ratio) and inside.mean() >= 0.95:
                low, high = np.quantile(np.array(ratios)[inside], (0.025, 0.975))
                row["share_of_best_of_n"] = [ratio, float(low), float(high)]
        if name.startswith("halving"):  # against best of as many, and of half as many, caption by caption
            count = int(name.split()[1])
            others = [f"best of {one}" for one in (count, count // 2) if f"best of {one}" in costs]
            row["against"] = [
                {
                    "method": other,
                    "passes": costs[name] / costs[other],
                    "gold": list(_interval(golds[name] - golds[other], draws)),
                }
                for other in others
            ]
        rows.append(row)
    folder = options.results or options.output
    about = {
        "captions": len(records),
        "steps": options.num_steps,
        "guidance_scale": options.guidance_scale,
        "draft_steps": search.draft_steps(options.num_steps),
    }
    name = f"search_{options.num_steps}_steps"
    seeds = sorted({30_000 + start for start in range(0, options.captions, 10)})
    write_results(folder, name, {**about, "rows": rows}, table(about, rows), seeds=seeds)
    figures.save_png(curve(rows), folder / f"{name}.png")
    print(table(about, rows))


def _interval(values: np.ndarray, draws: np.ndarray) -> tuple[float, float, float]:
    means = values[draws].mean(axis=1)
    return float(values.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def table(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{about['captions']} captions, {about['steps']} steps, guidance {about['guidance_scale']:g}, "
        f"halving on a grid of {about['draft_steps']} steps; gold "
        "is the judge's utility of the winner, 95 % intervals over captions. A share is left out where "
        "the gold lies outside that of best of n.",
        "",
        "| method | passes of the denoiser | gold | passes, share of best of n at equal gold |",
        "|---|--:|--:|--:|",
    ]
    for row in rows:
        mean, low, high = row["gold"]
        share = row.get("share_of_best_of_n")
        cells = [row["method"], f"{row['passes']:.0f}", f"{mean:.3f} ({low:.3f} to {high:.3f})"]
        cells.append("" if share is None else f"{share[0]:.2f} ({share[1]:.2f} to {share[2]:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Caption by caption:", "", "| | passes, share | difference in gold |", "|---|--:|--:|"]
    for row in rows:
        for against in row.get("against", ()):
            mean, low, high = against["gold"]
            lines.append(
                f"| {row['method']} against {against['method']} | {against['passes']:.2f} | "
                f"{mean:+.4f} ({low:+.4f} to {high:+.4f}) |"
            )
    return "\n".join(lines) + "\n"


@figures.figure_style()
def curve(rows: Sequence[dict[str, Any]]) -> Any:
    """Gold against passes, a line a method."""
    axes = figures.new_figure((6.4, 4.2))
    groups = {
        "best of n": "best",
        "best of n on a coarse grid": "draft",
        "successive halving": "halving",
        "guided": "guided",
    }
    for number, (label, key) in enumerate(groups.items()):
        own = sorted((row for row in rows if row["method"].startswith(key)), key=lambda row: row["passes"])
        values = np.array([row["gold"] for row in own])
        spread = np.abs(values[:, 1:].T - values[:, 0])
        axes.errorbar(
            [row["passes"] for row in own],
            values[:, 0],
            spread,
            linestyle="none" if key == "guided" else "-",
            color=figures.SERIES[number],
            marker=figures.MARKERS[number],
            markersize=5,
            capsize=3,
            label=label,
        )
    axes.set_xscale("log")
    axes.set_xticks(sorted(row["passes"] for row in rows if row["method"].startswith("best")))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set_xlabel("passes of the denoiser, scoring included")
    axes.set_ylabel("gold score of the winner")
    axes.legend(loc="best")
    return figures.whole_figure(axes)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
