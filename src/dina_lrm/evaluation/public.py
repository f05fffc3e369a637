"""A model on a public benchmark in its original layout: accuracy by the benchmark's own rule, and what it
cost."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.pairs import Reject, image_name, reasons, write_rejects
from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.cost import MeasuredCost
from dina_lrm.evaluation.metrics import Interval, Reliability, agreement, reliability
from dina_lrm.evaluation.paired import PairedDifference, paired_difference
from dina_lrm.evaluation.picture_scores import PartFile, PictureScores, ScoreFunction
from dina_lrm.evaluation.rules import (
    RULES,
    RuleAccuracy,
    accuracy_by_rule,
    credits,
    kendall_by_prompt,
    spearman_by_prompt,
)
from dina_lrm.files import atomic_path, atomic_write

__all__ = [
    "PublicResult",
    "ScoredComparison",
    "SettingAccuracy",
    "as_json",
    "evaluate_comparisons",
]


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredComparison:
    """A comparison without its pictures."""

    prompt: str
    chosen: str
    """The picture's name (`data.pairs.image_name`)."""
    rejected: str
    tie: bool
    """Nobody won."""
    target: float
    """Share of votes for `chosen`; 0.5 for a tie."""
    row: int
    """Position of the row in the file, from 0."""
    line: int | None
    """Where the row begins in the file, from 1; None where the form has no lines."""
    file: str

    def reject(self, reason: str) -> Reject:
        return Reject(row=self.row, line=self.line, reason=reason, prompt=self.prompt, file=self.file)


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
    """Rows of the source; a ranked list is one row and several comparisons."""
    rejects: tuple[Reject, ...]
    comparisons: tuple[ScoredComparison, ...]
    scores: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    """Scores of the chosen and the rejected side, (draw, comparison) each, by setting."""

    @property
    def num_items(self) -> int:
        """Comparisons that the source gave: scored or rejected. A row that cannot be read counts as one."""
        return len(self.comparisons) + len(self.rejects)

    def counts(self) -> str:
        """Say how many rows and comparisons there are."""
        rejected = f"{len(self.rejects):,} of {self.num_items:,} comparisons rejected"
        return f"{self.num_rows:,} rows, {rejected}"

    @property
    def score_chosen(self) -> NDArray[np.float64]:
        """Scores of the first setting, averaged over draws."""
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
                    "label": setting.label,
                    "accuracy": as_json(setting.accuracy),
                    "by_pair": as_json(setting.by_pair),
                    "reliability": asdict(setting.reliability),
                    "draw_agreement": setting.draw_agreement,
                    "draw_spread": setting.draw_spread,
                }
                for setting in self.settings
            ],
            "cost": asdict(self.cost),
            "num_rows": self.num_rows,
            "num_items": self.num_items,
            "num_comparisons": len(self.comparisons),
            "num_rejects": len(self.rejects),
        }

    def to_markdown(self) -> str:
        """A table: one row a way of scoring."""
        rule = self.published.rule
        lines = [
            f"**{self.model}**: {len(self.comparisons):,} comparisons of {self.published.num_prompts:,} "
            f"prompts; {self.counts()}.",
            "",
            f"| scores | {rule} % | 95 % interval | strict, by pair % | 95 % interval | ECE % "
            "| draws agree % |",
            "|---|--:|---|--:|---|--:|--:|",
        ]
        for one in self.settings:
            cells = [one.label, *one.accuracy.accuracy.percents(), *one.by_pair.accuracy.percents()]
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
            name.name: [getattr(item, name.name) for item in self.comparisons]
            for name in fields(ScoredComparison)
        }
        columns |= {
            "score_chosen": self.score_chosen,
            "score_rejected": self.score_rejected,
        }
        for label, sides in self.scores.items():
            for side, values in zip(("chosen", "rejected"), sides, strict=True):
                for draw, of_draw in enumerate(values):
                    columns[f"{label}: {side}" + (f" #{draw}" if len(values) > 1 else "")] = of_draw
        with atomic_path(folder / "scores.parquet") as aside:
            parquet.write_table(pyarrow.table(columns), aside)
        if self.rejects:
            write_rejects(self.rejects, folder / "rejects.jsonl")
        atomic_write(folder / "results.md", self.to_markdown().encode())
        atomic_write(
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
        names = ["file", "row", "chosen", "rejected", "score_chosen", "score_rejected"]
        stored = parquet.read_schema(file).names
        if not set(names) <= set(stored):
            raise InvalidInputError(
                f"{file} is not the result of a public benchmark: its columns are {stored}"
            )
        *keys, chosen, rejected = (
            column.to_pylist() for column in parquet.read_table(file, columns=names).select(names).columns
        )
        margins = np.array(chosen) - np.array(rejected)
        theirs = dict(zip(zip(*keys, strict=True), margins, strict=True))
        ours = [(c.file, c.row, c.chosen, c.rejected) for c in self.comparisons]
        if set(ours) != set(theirs):
            common = len(set(ours) & set(theirs))
            raise InvalidInputError(
                f"{file} holds other comparisons: {common} in common, {len(ours)} here, {len(theirs)} there"
            )
        rule, ties = RULES[self.published.rule], np.array([c.tie for c in self.comparisons])
        margins = self.score_chosen - self.score_rejected, np.array([theirs[label] for label in ours])
        own, other = (credits(rule, margin, ties, threshold=self.published.threshold) for margin in margins)
        prompts = _prompt_numbers(self.comparisons)
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
    part: PartFile | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PublicResult:
    """Score both sides of every comparison, each picture of a prompt once.

    The stream is read once, and of its pictures a batch is held at a time.

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
        part: where scores are kept as they come, so that a run that was stopped goes on; it stays when all is
            done, and is of no more use once the result is saved.
        on_progress: called with the number of comparisons and rejects read, and of those among them that need
            no scoring in this run.

    A comparison whose picture cannot be read is a reject with its reason; nothing is dropped unseen.

    Raises:
        InvalidInputError: unknown rule, no row that can be evaluated, a score that is not finite, or a part
            file of a run with other settings.
    """
    if rule not in RULES:
        raise InvalidInputError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    pictures = PictureScores(score, batch_size=batch_size, part=part)
    comparisons: list[ScoredComparison] = []
    sides: list[tuple[int, int]] = []
    rejects: list[Reject] = []
    num_rows = num_resumed = 0
    last = None
    for num_items, item in enumerate(stream, start=1):
        num_rows, last = num_rows + ((item.file, item.row) != last), (item.file, item.row)
        if isinstance(item, Reject):
            rejects.append(item)
            num_resumed += 1
        else:
            pair = item.pair
            chosen, rejected = image_name(pair.chosen), image_name(pair.rejected)
            sides.append(
                (
                    pictures.add(pair.prompt, chosen, pair.chosen),
                    pictures.add(pair.prompt, rejected, pair.rejected),
                )
            )
            comparisons.append(
                ScoredComparison(
                    prompt=pair.prompt,
                    chosen=chosen,
                    rejected=rejected,
                    tie=pair.tie,
                    target=pair.target,
                    row=item.row,
                    line=item.line,
                    file=item.file,
                )
            )
            num_resumed += max(sides[-1]) < pictures.num_resumed
        if on_progress is not None and num_items % batch_size == 0:
            on_progress(num_items, num_resumed)
    scores = pictures.scores()
    num_items = len(comparisons) + len(rejects)
    if on_progress is not None:
        on_progress(num_items, num_resumed)
    scored: list[int] = []
    for index, (item, two) in enumerate(zip(comparisons, sides, strict=True)):
        broken = next((pictures.unreadable[side] for side in two if side in pictures.unreadable), None)
        if broken is None:
            scored.append(index)
        else:
            rejects.append(item.reject(broken))
    if not scored:
        raise InvalidInputError(
            f"none of {num_items} comparisons of {num_rows} rows can be evaluated{reasons(rejects)}"
        )
    comparisons = [comparisons[index] for index in scored]
    shown = np.array(sides)[scored]
    both = {
        label: (found.take(shown[:, 0], axis=1), found.take(shown[:, 1], axis=1))
        for label, found in scores.items()
    }
    ties = np.array([item.tie for item in comparisons])
    target = np.array([item.target for item in comparisons])
    prompts = _prompt_numbers(comparisons)

    def accuracy(name: str, margin: NDArray[np.float64], limit: float) -> RuleAccuracy:
        return accuracy_by_rule(name, margin, ties, prompts, threshold=limit, seed=seed)

    def accuracy_of(label: str, scale: float | None) -> SettingAccuracy:
        margins = both[label][0] - both[label][1]
        margin, several = margins.mean(axis=0), len(margins) > 1
        strict = ~ties if (~ties).any() else np.ones_like(ties)
        spread = margins.std(axis=0, ddof=1).mean() / max(margin.std(), 1e-12) if several else None
        return SettingAccuracy(
            label=label,
            accuracy=accuracy(rule, margin, threshold),
            by_pair=accuracy("strict", margin, 0.0),
            reliability=reliability(margin[strict], target[strict], scale=scale, prompts=prompts[strict]),
            draw_agreement=agreement(margins) if several else None,
            draw_spread=None if spread is None else float(spread),
        )

    default = next(iter(both))
    settings = tuple(accuracy_of(label, calibration_scale if label == default else None) for label in both)
    of_sides = both[default][0].mean(axis=0), both[default][1].mean(axis=0)
    margin = (both[default][0] - both[default][1]).mean(axis=0)
    return PublicResult(
        model=model,
        seed=seed,
        published=settings[0].accuracy,
        by_pair=settings[0].by_pair,
        by_prompt=accuracy("strict-by-prompt", margin, 0.0),
        kendall=kendall_by_prompt(margin, ties, prompts, seed=seed),
        spearman=spearman_by_prompt(shown, of_sides, ties, prompts, seed=seed),
        settings=settings,
        cost=pictures.cost(),
        num_rows=num_rows,
        rejects=tuple(rejects),
        comparisons=tuple(comparisons),
        scores=both,
    )


def _prompt_numbers(comparisons: Sequence[ScoredComparison]) -> NDArray[np.int64]:
    """Prompts by their place in the alphabet: small, whatever the prompts' length, and of the order that the
    bootstrap takes them in."""
    places = {prompt: place for place, prompt in enumerate(sorted({item.prompt for item in comparisons}))}
    return np.array([places[item.prompt] for item in comparisons], dtype=np.int64)


def as_json(result: RuleAccuracy | PairedDifference) -> dict[str, Any]:
    """Plain JSON types: one prompt has no interval, and NaN is no JSON."""
    record = asdict(result)
    for name, value in record.items():
        if isinstance(value, dict):  # an Interval
            record[name] = _finite(value)
    return record


def _finite(interval: dict[str, float]) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in interval.items()}
