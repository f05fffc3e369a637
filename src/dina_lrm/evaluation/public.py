"""A reward on a public benchmark in its original layout: accuracy by the benchmark's own rule."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dina_lrm.data.pairs import ImageSource, Reject, load_image, write_rejects
from dina_lrm.data.sources import Comparison
from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.metrics import Interval
from dina_lrm.evaluation.paired import PairedDifference, paired_difference
from dina_lrm.evaluation.rules import RULES, RuleAccuracy, accuracy_by_rule, credits, kendall_by_prompt
from dina_lrm.files import write_whole, written_aside
from dina_lrm.models.reward_model import RewardModel

__all__ = ["PublicResult", "as_json", "evaluate_comparisons"]


@dataclass(frozen=True, kw_only=True)
class PublicResult:
    """Accuracies of one model on one set of comparisons, and every score behind them."""

    noise_levels: tuple[float, ...]
    seed: int
    published: RuleAccuracy
    """By the rule that was asked for: the benchmark's own unless told otherwise."""
    by_pair: RuleAccuracy
    """Strict, over pairs."""
    by_prompt: RuleAccuracy
    """Strict, mean over prompts."""
    kendall: Interval
    """Tau-b between scores and the raters' order, mean over prompts with ranked lists; NaN without any."""
    num_rows: int
    """Comparisons and rejects: all that the source gave."""
    rejects: tuple[Reject, ...]
    comparisons: tuple[Comparison, ...]
    score_chosen: NDArray[np.float64]
    score_rejected: NDArray[np.float64]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the single scores."""
        accuracies = {name: as_json(getattr(self, name)) for name in ("published", "by_pair", "by_prompt")}
        return {
            "noise_levels": list(self.noise_levels),
            "seed": self.seed,
            "rule_source": RULES[self.published.rule].source,
            **accuracies,
            "kendall": _finite(asdict(self.kendall)),
            "num_rows": self.num_rows,
            "num_comparisons": len(self.comparisons),
            "num_rejects": len(self.rejects),
        }

    def save(self, folder: str | Path) -> Path:
        """Write results.json, scores.parquet (a row a comparison) and, where there are any, rejects.jsonl."""
        import pyarrow
        import pyarrow.parquet as parquet

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        columns = {
            "prompt": [item.pair.prompt for item in self.comparisons],
            "chosen": [_name(item.pair.chosen) for item in self.comparisons],
            "rejected": [_name(item.pair.rejected) for item in self.comparisons],
            "tie": [item.tie for item in self.comparisons],
            "row": [item.row for item in self.comparisons],
            "file": [item.file for item in self.comparisons],
            "score_chosen": self.score_chosen,
            "score_rejected": self.score_rejected,
        }
        with written_aside(folder / "scores.parquet") as aside:
            parquet.write_table(pyarrow.table(columns), aside)
        if self.rejects:
            write_rejects(self.rejects, folder / "rejects.jsonl")
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
    model: RewardModel,
    stream: Iterable[Comparison | Reject],
    *,
    rule: str,
    noise_levels: Sequence[float] | None = None,
    threshold: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> PublicResult:
    """Score both sides of every comparison, each picture of a prompt once.

    Args:
        stream: from `read_source`.
        rule: one of `RULES`.
        noise_levels: one level, or several for a token-level ensemble; None: the model's own.
        threshold: largest |margin| that the rule takes for a tie of scores.
        seed: of the noise, the same for all pictures.
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
    levels = tuple(model.config.noise_levels if noise_levels is None else noise_levels)
    wanted: dict[tuple[str, ImageSource], None] = {}
    for item in comparisons:
        wanted |= dict.fromkeys((item.pair.prompt, side) for side in (item.pair.chosen, item.pair.rejected))
    scores: dict[tuple[str, ImageSource], float] = {}
    unreadable: dict[tuple[str, ImageSource], str] = {}
    keys = list(wanted)
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
            found = model.score(prompts, pictures, noise_levels=list(levels), seed=seed).scores
            scores |= dict(zip(readable, found.to(torch.float64).tolist(), strict=True))
        if on_progress is not None:
            on_progress(min(start + batch_size, len(keys)), len(keys))
    scored = []
    for item in comparisons:
        sides = [(item.pair.prompt, side) for side in (item.pair.chosen, item.pair.rejected)]
        broken = next((unreadable[side] for side in sides if side in unreadable), None)
        if broken is None:
            scored.append(item)
        else:
            rejects.append(Reject(row=item.row, reason=broken, prompt=item.pair.prompt))
    if not scored:
        raise InvalidInputError(f"none of {num_rows} rows can be evaluated, first: {rejects[0].reason}")
    chosen = np.array([scores[item.pair.prompt, item.pair.chosen] for item in scored])
    rejected = np.array([scores[item.pair.prompt, item.pair.rejected] for item in scored])
    ties = np.array([item.tie for item in scored])
    prompts = np.array([item.pair.prompt for item in scored])

    def accuracy(name: str, limit: float) -> RuleAccuracy:
        return accuracy_by_rule(name, chosen - rejected, ties, prompts, threshold=limit, seed=seed)

    return PublicResult(
        noise_levels=levels,
        seed=seed,
        published=accuracy(rule, threshold),
        by_pair=accuracy("strict", 0.0),
        by_prompt=accuracy("strict-by-prompt", 0.0),
        kendall=kendall_by_prompt(chosen - rejected, ties, prompts, seed=seed),
        num_rows=num_rows,
        rejects=tuple(rejects),
        comparisons=tuple(scored),
        score_chosen=chosen,
        score_rejected=rejected,
    )


def as_json(result: RuleAccuracy | PairedDifference) -> dict[str, Any]:
    """Plain JSON types: one prompt has no interval, and NaN is no JSON."""
    record = asdict(result)
    for name, value in record.items():
        if isinstance(value, dict):  # an Interval
            record[name] = _finite(value)
    return record


def _finite(interval: dict[str, float]) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in interval.items()}


def _name(image: ImageSource) -> str:
    if isinstance(image, Path):
        return str(image)
    return f"{len(image)} bytes" if isinstance(image, bytes) else "picture"
