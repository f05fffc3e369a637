"""A model on a public benchmark in its original layout: accuracy by the benchmark's own rule, and what it
cost."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dina_lrm.data.latents import mix_seeds
from dina_lrm.data.pairs import ImageSource, Reject, load_image, write_rejects
from dina_lrm.data.sources import Comparison
from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.cost import MeasuredCost, counted_flops, peak_memory_bytes, reset_peak_memory
from dina_lrm.evaluation.metrics import Interval, Reliability, agreement, reliability
from dina_lrm.evaluation.noise_sweep import Setting
from dina_lrm.evaluation.paired import PairedDifference, paired_difference
from dina_lrm.evaluation.rules import (
    RULES,
    RuleAccuracy,
    accuracy_by_rule,
    credits,
    kendall_by_prompt,
    spearman_by_prompt,
)
from dina_lrm.files import write_whole, written_aside
from dina_lrm.models.reward_model import RewardModel

__all__ = [
    "PublicResult",
    "ScoreFunction",
    "SettingAccuracy",
    "as_json",
    "evaluate_comparisons",
    "reward_scores",
]

ScoreFunction = Callable[[list[str], list[Image.Image]], Mapping[str, Tensor]]
"""Scores of pictures for prompts, pair by pair: (batch,) or (draw, batch) by the name of what was computed.
The first is what the benchmark's figure is of; a model with one way of scoring gives one."""


def reward_scores(model: RewardModel, settings: Sequence[Setting], *, seed: int = 0) -> ScoreFunction:
    """Scores of a reward in several ways, by the label of each.

    Args:
        settings: the first is the benchmark's; averages of scores reuse single levels that are there too.
        seed: of the noise, the same for all pictures.
    """

    def draws(setting: Setting, prompts: list[str], images: list[Image.Image]) -> Tensor:
        return torch.stack(
            [
                model.score(
                    prompts,
                    images,
                    list(setting.noise_levels),
                    seed=seed if draw == 0 else mix_seeds(seed, 9, draw),
                    ensemble=setting.combine,
                ).scores
                for draw in range(setting.num_draws)
            ]
        )

    def score(prompts: list[str], images: list[Image.Image]) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for setting in settings:
            parts = [f"{level:g}" for level in setting.noise_levels]
            if (
                setting.combine == "scores"
                and setting.num_draws == 1
                and all(part in found for part in parts)
            ):
                found[setting.label] = torch.stack([found[part] for part in parts]).mean(dim=0)
            elif setting.label not in found:
                found[setting.label] = draws(setting, prompts, images)
        return found

    return score


@dataclass(frozen=True, kw_only=True)
class SettingAccuracy:
    """One way of scoring the same comparisons."""

    label: str
    accuracy: RuleAccuracy
    """By the rule that was asked for."""
    by_pair: RuleAccuracy
    """Strict, over pairs."""
    reliability: Reliability
    """On strict pairs, against the share of votes where votes are known."""
    draw_agreement: float | None
    """Probability that two noise draws prefer the same side; None for one draw."""
    draw_spread: float | None
    """Standard deviation of the margin over draws, as a fraction of that over pairs; None for one draw."""


@dataclass(frozen=True, kw_only=True)
class PublicResult:
    """Accuracies of one model on one set of comparisons, and every score behind them."""

    model: str
    seed: int
    published: RuleAccuracy
    """By the rule that was asked for: the benchmark's own unless told otherwise."""
    by_pair: RuleAccuracy
    """Strict, over pairs."""
    by_prompt: RuleAccuracy
    """Strict, mean over prompts."""
    kendall: Interval
    """Tau-b between scores and the raters' order, mean over prompts with ranked lists; NaN without any."""
    spearman: Interval
    """Rank correlation of the same, over prompts of which every two pictures were compared."""
    settings: tuple[SettingAccuracy, ...]
    """Every way of scoring; the first is the one above."""
    cost: MeasuredCost
    num_rows: int
    """Comparisons and rejects: all that the source gave."""
    rejects: tuple[Reject, ...]
    comparisons: tuple[Comparison, ...]
    scores: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    """Of the chosen and the rejected side, (draw, comparison) each, by setting."""

    @property
    def score_chosen(self) -> NDArray[np.float64]:
        """Of the first setting, averaged over draws."""
        return next(iter(self.scores.values()))[0].mean(axis=0)

    @property
    def score_rejected(self) -> NDArray[np.float64]:
        return next(iter(self.scores.values()))[1].mean(axis=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the single scores."""
        accuracies = {name: as_json(getattr(self, name)) for name in ("published", "by_pair", "by_prompt")}
        return {
            "model": self.model,
            "seed": self.seed,
            "rule_source": RULES[self.published.rule].source,
            **accuracies,
            "kendall": _finite(asdict(self.kendall)),
            "spearman": _finite(asdict(self.spearman)),
            "settings": [
                {
                    "label": one.label,
                    "accuracy": as_json(one.accuracy),
                    "by_pair": as_json(one.by_pair),
                    "reliability": asdict(one.reliability),
                    "draw_agreement": one.draw_agreement,
                    "draw_spread": one.draw_spread,
                }
                for one in self.settings
            ],
            "cost": asdict(self.cost),
            "num_rows": self.num_rows,
            "num_comparisons": len(self.comparisons),
            "num_rejects": len(self.rejects),
        }

    def to_markdown(self) -> str:
        """A table: one row a way of scoring."""
        rule = self.published.rule
        lines = [
            f"**{self.model}**: {len(self.comparisons):,} comparisons of {self.published.num_prompts:,} "
            f"prompts, {len(self.rejects):,} of {self.num_rows:,} rows rejected.",
            "",
            f"| scores | {rule} % | 95 % interval | strict, by pair % | 95 % interval | ECE % "
            "| draws agree % |",
            "|---|--:|---|--:|---|--:|--:|",
        ]
        for one in self.settings:
            cells = [one.label, *_percent(one.accuracy.accuracy), *_percent(one.by_pair.accuracy)]
            cells.append(f"{100 * one.reliability.expected_calibration_error:.1f}")
            cells.append("" if one.draw_agreement is None else f"{100 * one.draw_agreement:.1f}")
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", f"Rule {rule}: {RULES[rule].source}. Intervals resample prompts."]
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path) -> Path:
        """Write results.json, results.md, scores.parquet (a row a comparison) and, where there are any,
        rejects.jsonl."""
        import pyarrow
        import pyarrow.parquet as parquet

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        columns: dict[str, Any] = {
            "prompt": [item.pair.prompt for item in self.comparisons],
            "chosen": [_name(item.pair.chosen) for item in self.comparisons],
            "rejected": [_name(item.pair.rejected) for item in self.comparisons],
            "tie": [item.tie for item in self.comparisons],
            "target": [0.5 if item.tie else item.pair.target for item in self.comparisons],
            "row": [item.row for item in self.comparisons],
            "file": [item.file for item in self.comparisons],
            "score_chosen": self.score_chosen,
            "score_rejected": self.score_rejected,
        }
        for label, sides in self.scores.items():
            for side, values in zip(("chosen", "rejected"), sides, strict=True):
                for draw, of_draw in enumerate(values):
                    columns[f"{label}: {side}" + (f" #{draw}" if len(values) > 1 else "")] = of_draw
        with written_aside(folder / "scores.parquet") as aside:
            parquet.write_table(pyarrow.table(columns), aside)
        if self.rejects:
            write_rejects(self.rejects, folder / "rejects.jsonl")
        write_whole(folder / "results.md", self.to_markdown().encode())
        write_whole(
            folder / "results.json", (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode()
        )
        return folder

    def against(self, folder: str | Path) -> PairedDifference:
        """This model minus the one whose result was saved in `folder`, under this result's rule.

        Raises:
            InvalidInputError: there is no such result, or it holds other comparisons.
        """
        import pyarrow.parquet as parquet

        file = Path(folder) / "scores.parquet"
        if not file.is_file():
            raise InvalidInputError(f"no result to compare with: {file} is missing")
        rows = parquet.read_table(file).to_pylist()
        names = {"prompt", "chosen", "rejected", "tie", "row", "file", "score_chosen", "score_rejected"}
        if rows and not names <= set(rows[0]):
            raise InvalidInputError(
                f"{file} is not the result of a public benchmark: its columns are {list(rows[0])}"
            )

        def key(row: dict[str, Any]) -> tuple[Any, ...]:
            return row["file"], row["row"], row["chosen"], row["rejected"]

        theirs = {key(row): row["score_chosen"] - row["score_rejected"] for row in rows}
        ours = [
            key(
                {
                    "file": c.file,
                    "row": c.row,
                    "chosen": _name(c.pair.chosen),
                    "rejected": _name(c.pair.rejected),
                }
            )
            for c in self.comparisons
        ]
        if set(ours) != set(theirs):
            common = len(set(ours) & set(theirs))
            raise InvalidInputError(
                f"{file} holds other comparisons: {common} in common, {len(ours)} here, {len(theirs)} there"
            )
        rule, ties = RULES[self.published.rule], np.array([c.tie for c in self.comparisons])
        margins = self.score_chosen - self.score_rejected, np.array([theirs[one] for one in ours])
        own, other = (credits(rule, margin, ties, threshold=self.published.threshold) for margin in margins)
        prompts = np.array([c.pair.prompt for c in self.comparisons])
        return paired_difference(own, other, prompts, seed=self.seed)


def evaluate_comparisons(
    score: ScoreFunction,
    stream: Iterable[Comparison | Reject],
    *,
    rule: str,
    model: str = "",
    calibration_scale: float | None = None,
    threshold: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> PublicResult:
    """Score both sides of every comparison, each picture of a prompt once.

    Args:
        score: `reward_scores` of a reward, or any other model.
        stream: from `read_source`.
        rule: one of `RULES`.
        model: its name in the result.
        calibration_scale: the model's own for the first setting, to be tested; None, and for all other
            settings: fitted to these pairs.
        threshold: largest |margin| that the rule takes for a tie of scores.
        seed: of the bootstrap.
        batch_size: pictures per call; no effect on the result.
        on_progress: called with (pictures done, pictures in all).

    A comparison whose picture cannot be read is a reject with its reason; nothing is dropped unseen.
    """
    if rule not in RULES:
        raise InvalidInputError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    comparisons: list[Comparison] = []
    rejects: list[Reject] = []
    for item in stream:
        (comparisons if isinstance(item, Comparison) else rejects).append(item)  # type: ignore[arg-type]
    num_rows = len(comparisons) + len(rejects)
    wanted: dict[tuple[str, ImageSource], None] = {}
    for item in comparisons:
        wanted |= dict.fromkeys((item.pair.prompt, side) for side in (item.pair.chosen, item.pair.rejected))
    scores, unreadable, cost = _score_pictures(score, list(wanted), batch_size, on_progress)
    scored = []
    for item in comparisons:
        sides = [(item.pair.prompt, side) for side in (item.pair.chosen, item.pair.rejected)]
        broken = next((unreadable[side] for side in sides if side in unreadable), None)
        if broken is None:
            scored.append(item)
        else:
            rejects.append(Reject(row=item.row, reason=broken, prompt=item.pair.prompt, file=item.file))
    if not scored:
        raise InvalidInputError(f"none of {num_rows} rows can be evaluated, first: {rejects[0].reason}")
    both = {
        label: (
            np.stack([found[item.pair.prompt, item.pair.chosen] for item in scored], axis=1),
            np.stack([found[item.pair.prompt, item.pair.rejected] for item in scored], axis=1),
        )
        for label, found in scores.items()
    }
    ties = np.array([item.tie for item in scored])
    target = np.array([0.5 if item.tie else item.pair.target for item in scored])
    prompts = np.array([item.pair.prompt for item in scored])

    def accuracy(name: str, margin: NDArray[np.float64], limit: float) -> RuleAccuracy:
        return accuracy_by_rule(name, margin, ties, prompts, threshold=limit, seed=seed)

    def measured(label: str, scale: float | None) -> SettingAccuracy:
        margins = both[label][0] - both[label][1]
        margin, several = margins.mean(axis=0), len(margins) > 1
        strict = ~ties if (~ties).any() else np.ones_like(ties)
        spread = margins.std(axis=0, ddof=1).mean() / max(margin.std(), 1e-12) if several else None
        return SettingAccuracy(
            label=label,
            accuracy=accuracy(rule, margin, threshold),
            by_pair=accuracy("strict", margin, 0.0),
            reliability=reliability(margin[strict], target[strict], scale=scale),
            draw_agreement=agreement(margins) if several else None,
            draw_spread=None if spread is None else float(spread),
        )

    default = next(iter(both))
    settings = tuple(measured(label, calibration_scale if label == default else None) for label in both)
    margin = (both[default][0] - both[default][1]).mean(axis=0)
    pictures = [(_name(item.pair.chosen), _name(item.pair.rejected)) for item in scored]
    sides = both[default][0].mean(axis=0), both[default][1].mean(axis=0)
    return PublicResult(
        model=model,
        seed=seed,
        published=settings[0].accuracy,
        by_pair=settings[0].by_pair,
        by_prompt=accuracy("strict-by-prompt", margin, 0.0),
        kendall=kendall_by_prompt(margin, ties, prompts, seed=seed),
        spearman=spearman_by_prompt(pictures, sides, ties, prompts, seed=seed),
        settings=settings,
        cost=cost,
        num_rows=num_rows,
        rejects=tuple(rejects),
        comparisons=tuple(scored),
        scores=both,
    )


_Key = tuple[str, ImageSource]


def _score_pictures(
    score: ScoreFunction,
    keys: Sequence[_Key],
    batch_size: int,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, dict[_Key, NDArray[np.float64]]], dict[_Key, str], MeasuredCost]:
    """Scores (draw,) of every readable picture by setting, why others are not readable, and what it took."""
    scores: dict[str, dict[_Key, NDArray[np.float64]]] = {}
    unreadable: dict[_Key, str] = {}
    seconds, scored, flops = 0.0, 0, None
    reset_peak_memory()
    for start in range(0, len(keys), batch_size):
        readable, pictures = [], []
        for key in keys[start : start + batch_size]:
            try:
                pictures.append(load_image(key[1]))
                readable.append(key)
            except InvalidInputError as error:
                unreadable[key] = str(error)
        if readable:
            prompts = [prompt for prompt, _ in readable]
            if scored == 0:  # also loads what is loaded at first use, so that it is not timed below
                flops = counted_flops(lambda: score(prompts[:1], pictures[:1]))  # noqa: B023  # called at once
            before = time.perf_counter()
            found = score(prompts, pictures)
            seconds += time.perf_counter() - before
            scored += len(readable)
            for label, values in found.items():
                rows = values.to(torch.float64).cpu().reshape(-1, len(readable)).T.numpy()
                if not np.isfinite(rows).all():
                    raise InvalidInputError(
                        f"a score of {label} is not finite, of prompt {prompts[0]!r} or beside"
                    )
                scores.setdefault(label, {}).update(zip(readable, rows, strict=True))
        if on_progress is not None:
            on_progress(min(start + batch_size, len(keys)), len(keys))
    cost = MeasuredCost(
        flops=flops,
        seconds=seconds / max(scored, 1),
        peak_memory_bytes=peak_memory_bytes(),
        batch_size=batch_size,
    )
    return scores, unreadable, cost


def as_json(result: RuleAccuracy | PairedDifference) -> dict[str, Any]:
    """Plain JSON types: one prompt has no interval, and NaN is no JSON."""
    record = asdict(result)
    for name, value in record.items():
        if isinstance(value, dict):  # an Interval
            record[name] = _finite(value)
    return record


def _percent(interval: Interval) -> tuple[str, str]:
    if not np.isfinite(interval.value):
        return "", ""
    return f"{100 * interval.value:.1f}", f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def _finite(interval: dict[str, float]) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in interval.items()}


def _name(image: ImageSource) -> str:
    if isinstance(image, Path):
        return str(image)
    return f"{len(image)} bytes" if isinstance(image, bytes) else "picture"
