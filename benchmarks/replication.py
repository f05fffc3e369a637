"""The paper's claims beside what was found here: writes docs/replication.md from committed results.

    python benchmarks/replication.py

Nothing is measured here. Every number comes from a file of benchmarks/results, whose command is named on the
page, or from the paper (arXiv 2602.11146); verdicts follow one rule, which the page states.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import shown

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "replication.md"

SETS = {"shapes": "in distribution", "generators": "generators", "damage": "damage", "style": "style"}
UNSEEN = ("generators", "damage", "style")

PAPER_SETS = "HPDv2, HPDv3 (in distribution), GenAI-Bench"
PAPER_ROWS = {
    "calibrated": ("uniform σ, noise-calibrated variance", (82.13, 75.04, 68.43)),
    "constant variance": ("uniform σ, fixed variance", (78.72, 75.11, 68.01)),
    "sigma = 0": ("σ = 0 always, fixed variance", (59.20, 74.37, 67.55)),
    "frozen backbone": ("frozen backbone", (None, 73.52, 67.09)),
}
"""The paper's ablation, in % of pairs, by our name of the variant."""
PAPER_ENSEMBLE = (84.31, 74.86, 68.98)


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper that a difference between two rewards can bear out."""

    says: str
    """What the paper says, in our words."""
    paper: tuple[float | None, ...] | None
    """Its difference on HPDv2, HPDv3 and GenAI-Bench, in points; None: it gives no such figure."""
    contrasts: tuple[str, ...]
    """Rows of ablation.json that test it; the first decides."""
    settle: str
    """What would settle it at full size."""


def minus(a: Sequence[float | None], b: Sequence[float | None]) -> tuple[float | None, ...]:
    return tuple(None if x is None or y is None else round(x - y, 2) for x, y in zip(a, b, strict=True))


FULL = (
    "`dina-lrm train {recipe} --data.train HPDV3`, then `dina-lrm evaluate --benchmark` with hpdv2, hpdv3 "
    "and genai-bench"
)
CLAIMS = (
    Claim(
        "Noise-calibrated variance is better than one variance for all levels",
        minus(PAPER_ROWS["calibrated"][1], PAPER_ROWS["constant variance"][1]),
        ("calibrated over constant variance", "the same, three levels"),
        FULL.format(recipe="sd35m-12-layers") + ", again with `--loss.likelihood thurstone_constant`",
    ),
    Claim(
        "Training at all noise levels is better than training on clean latents",
        minus(PAPER_ROWS["calibrated"][1], PAPER_ROWS["sigma = 0"][1]),
        ("noise in training over sigma = 0",),
        "the same, with `--noise.distribution constant --noise.level 0`, scored at 0",
    ),
    Claim(
        "Training at all noise levels is better than training at one (six points on average)",
        None,
        ("uniform sigma over sigma = 0.4",),
        "the same, with `--noise.distribution constant --noise.level 0.4`",
    ),
    Claim(
        "An ensemble of the levels 0.2, 0.5, 0.7 is better than the level 0.4",
        minus(PAPER_ENSEMBLE, PAPER_ROWS["calibrated"][1]),
        ("three levels over one", "the same, trained on several levels"),
        "the same run, `evaluate --noise-levels 0.4 --ensembles 0.2+0.5+0.7`",
    ),
    Claim(
        "The gain of the ensemble needs the noise-calibrated variance",
        None,
        ("gain of three levels, calibrated over constant variance",),
        "both runs of the first row, scored both ways",
    ),
    Claim(
        "Accuracy is best for σ in 0.3 to 0.7, and falls at 0",
        None,
        ("level 0.4 over level 0",),
        "`evaluate --noise-levels 0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9`",
    ),
    Claim(
        "It falls at 0.8, too",
        None,
        ("level 0.4 over level 0.8",),
        "the same",
    ),
    Claim(
        "Adapting the backbone (LoRA) is better than a frozen one",
        minus(PAPER_ROWS["calibrated"][1], PAPER_ROWS["frozen backbone"][1]),
        ("LoRA over a frozen backbone",),
        FULL.format(recipe="sd35m-12-layers-frozen"),
    ),
)
OURS = ("Thurstone over Bradley-Terry", "fidelity over log-likelihood")
"""Contrasts of ours that the paper has no figure for."""


def main() -> None:
    PAGE.write_text(page())
    print(PAGE)


def page() -> str:
    """docs/replication.md, whole."""
    ablation = read("ablation")
    more = others(read("hackable_reward"), read("latent_against_pixels"), read("shapes_baselines"))
    return "\n".join([*opening(ablation), *claims(ablation), *shares(ablation), *shipped(), *more])


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def origin(result: Mapping[str, Any]) -> str:
    about = result["about"]
    return f"`{about['command']}`, commit {about['commit']}, {about['date']}, {about['hardware']}"


# --- the claims --------------------------------------------------------------------------------------------


def opening(ablation: Mapping[str, Any]) -> Iterator[str]:
    seeds, steps, batch = len(ablation["about"]["seeds"]), ablation["steps"], ablation["batch_size"]
    yield f"""# The paper's claims, one by one

[arXiv:2602.11146](https://arxiv.org/abs/2602.11146) trains a reward on human preferences for real pictures.
Here the same method is trained in a small world of coloured shapes: a generator that was trained for it,
pictures that it drew or that were rendered, and simulated raters whose distribution is known. That is not the
paper's experiment. It can show whether an effect follows from the method alone, on pictures like those of
training and on others; it cannot show what depends on real pictures, human raters or the size of the network.

The paper's test sets are {PAPER_SETS}. Ours, each of captions that no training pair has:

- **in distribution**: pictures of the generator that the training pictures are from;
- **generators**: a smaller generator that was trained apart, and a sampler that adds noise;
- **damage**: JPEG blocks, pixelation, stripes and a tint, none of which occurs in training;
- **style**: renders with hard edges, outlines and colours that training does not have.

{seeds} seeds of every variant, {ablation["train_pairs"]:,} training pairs, {steps} steps of {batch}, the
first {ablation["captions"]} captions of each set. What is counted is the expected agreement with fresh
raters, in % of what the best possible reward reaches (a point of it is about 0.85 points of accuracy).
Intervals are 95 %, and resample captions and seeds.

**Verdicts** follow one rule. A claim *holds* on a set if its difference has the paper's sign and stands at
5 % after Holm's correction for all {ablation["comparisons"]} differences of the table (in bold); it *fails*
there if the opposite stands; anything else *cannot be told here*. A difference of
{100 * ablation["smallest_detectable"]:.1f} points would be seen four times in five, taken alone: what is
smaller is not ruled out.
"""


def claims(ablation: Mapping[str, Any]) -> Iterator[str]:
    found = {(row["claim"], row["set"]): row for row in ablation["claims"]}
    yield "## What holds\n"
    yield f"| claim | the paper, points on {PAPER_SETS} | " + " | ".join(SETS.values()) + " | verdict |"
    yield "|---|---|" + "--:|" * len(SETS) + "---|"
    for claim in CLAIMS:
        for place, contrast in enumerate(claim.contrasts):
            rows = [found[contrast, part] for part in SETS]
            cells = [difference(row) for row in rows]
            says, paper = (claim.says, points(claim.paper)) if place == 0 else (f"*{contrast}*", "")
            yield f"| {says} | {paper} | " + " | ".join(cells) + f" | {verdict(rows)} |"
    for contrast in OURS:
        rows = [found[contrast, part] for part in SETS]
        cells = [difference(row) for row in rows]
        yield f"| *{contrast}* | no figure | " + " | ".join(cells) + f" | {verdict(rows)} |"
    yield f"\n{origin(ablation)}.\n"
    yield "## What would settle them\n"
    yield "At full size, on human votes; none of it has been run here.\n"
    yield "| claim | run |"
    yield "|---|---|"
    for claim in CLAIMS:
        yield f"| {claim.says} | {claim.settle} |"
    yield ""


def difference(row: Mapping[str, Any]) -> str:
    text = shown(row["difference"], "{:+.1f}")
    return f"**{text}**" if row["certain"] else text


def points(values: Sequence[float | None] | None) -> str:
    if values is None:
        return "no figure"
    return ", ".join("-" if value is None else f"{value:+.2f}" for value in values)


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where it holds and where it fails; rows are in the order of SETS."""
    named = list(zip(SETS.values(), rows, strict=True))
    holds = [name for name, row in named if row["certain"] and row["difference"]["value"] > 0]
    fails = [name for name, row in named if row["certain"] and row["difference"]["value"] < 0]
    parts = [
        "holds " + where(holds) if holds else "",
        "fails " + where(fails) if fails else "",
    ]
    return "; ".join(filter(None, parts)) or "cannot be told here"


def where(names: Sequence[str]) -> str:
    if len(names) == len(SETS):
        return "everywhere"
    return ", ".join(name if name.startswith("in ") else f"on {name}" for name in names)


# --- the tables --------------------------------------------------------------------------------------------


def shares(ablation: Mapping[str, Any]) -> Iterator[str]:
    found = {(row["set"], row["variant"], row["setting"]): row["share"] for row in ablation["rows"]}
    names = list(dict.fromkeys(row["variant"] for row in ablation["rows"]))
    yield "## Every variant on every set\n"
    yield (
        "In % of the possible. The paper's columns are its accuracies in %, scored as in the column "
        "(σ = 0 always: at 0).\n"
    )
    yield (
        "| trained | scored at | " + " | ".join(SETS.values()) + " | the paper: HPDv2 | HPDv3 | GenAI-Bench |"
    )
    yield "|---|--:|" + "--:|" * (len(SETS) + 3)
    for name in names:
        for label in ("0", "0.4", "0.7", "0.2+0.5+0.7"):
            cells = [shown(found[part, name, label], "{:.1f}") for part in SETS]
            yield f"| {name} | {label} | " + " | ".join([*cells, *paper_cells(name, label)]) + " |"
    yield "\nAll levels, ensembles of up to nine and repeated draws: `benchmarks/results/ablation.md`.\n"


def paper_cells(name: str, label: str) -> list[str]:
    values: Sequence[float | None] = (None, None, None)
    if name == "calibrated" and label == "0.2+0.5+0.7":
        values = PAPER_ENSEMBLE
    elif name in PAPER_ROWS and label == ("0" if name == "sigma = 0" else "0.4"):
        values = PAPER_ROWS[name][1]
    return ["" if value is None else f"{value:.2f}" for value in values]


def shipped() -> Iterator[str]:
    yield "## The bundled reward on the four sets\n"
    yield (RESULTS / "reward_sets.md").read_text().rstrip()
    yield ""


def others(
    hacked: Mapping[str, Any], pixels: Mapping[str, Any], baselines: Mapping[str, Any]
) -> Iterator[str]:
    """What the paper says beside its tables of accuracy."""
    yield "## Cost, rivals, and what long optimisation does\n"
    yield "| claim | the paper | here |"
    yield "|---|---|---|"
    runs = hacked["rows"]
    fallen = [row for row in runs if row["final_gain"] < 0.9 * row["best_gain"]]
    warned = [row for row in runs if row["fired_at"] is not None]
    yield (
        "| Optimised for long, the reward rises and the pictures do not | reported, no figure | gold ends "
        f"more than a tenth below its best gain in {len(fallen)} of {len(runs)} runs on a reward from few "
        f"pairs; the monitor warns in {len(warned)} (`benchmarks/results/hackable_reward.md`) |"
    )
    latent = next(row for row in pixels["rows"] if row["reward"] == "latent, 1 level")
    decoded = next(row for row in pixels["rows"] if row["reward"] == "pixels")
    flops = 100 * (1 - latent["reward_flops"] / decoded["reward_flops"])
    memory = 100 * (1 - latent["reward_bytes"] / decoded["reward_bytes"])
    yield (
        "| ReFL on it costs less than on a 7B vision-language reward | at 1024 pixels 71.1 % of the reward's "
        f"FLOPs saved, 51.4 % of peak memory | against a small network on decoded pictures {flops:.0f} % of "
        f"the reward's FLOPs saved, {memory:.0f} % of its memory "
        "(`benchmarks/results/latent_against_pixels.md`). No 7B reward and no full-size "
        "generator has been run here |"
    )
    share = {row["model"]: 100 * row["share_of_bayes"]["value"] for row in baselines["rows"]}
    yield (
        "| It is better than a step-level latent reward without calibrated noise (LRM) | 71.49 against 61.73 "
        f"on average | {share['dina']:.1f} against {share['step-level']:.1f} % of the possible, one seed "
        "(`benchmarks/results/shapes_baselines.md`): no difference can be told |"
    )
    yield (
        "| It comes near rewards of 7B parameters on human votes | 72.48 with three levels, 74.84 for HPSv3 "
        "| cannot be told in a world of shapes |"
    )
    yield ""


if __name__ == "__main__":
    main()
