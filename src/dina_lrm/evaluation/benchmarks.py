"""One call from pairs to a result that can be printed, stored, plotted and recomputed.

`evaluate_latent_pairs` measures a reward at every noise level, as an ensemble, as a score average, and over
noise draws. For simulated raters it reports the share of what the best possible reward would reach.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dina_lrm.data.shards.read import PairSet
from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.metrics import Interval, Ties, cluster_bootstrap, pair_correctness
from dina_lrm.evaluation.noise_sweep import PairScores, Setting, SettingResult, noise_sweep
from dina_lrm.files import atomic_path, atomic_write
from dina_lrm.models.reward_model import RewardModel

__all__ = ["BayesReference", "EvaluationResult", "evaluate_latent_pairs"]

SWEEP_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PAPER_ENSEMBLE = (0.2, 0.5, 0.7)


@dataclass(frozen=True, kw_only=True, slots=True)
class BayesReference:
    """What the best possible reward reaches on these pairs, known for simulated raters only."""

    accuracy: Interval
    """Accuracy of the rule that prefers the truly likelier side, against the votes at hand."""
    expected_accuracy: Interval
    """Mean of max(p, 1 - p): the same rule against fresh votes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """Everything that was measured. JSON by `to_dict`, a table by `to_markdown`, files by `save`."""

    benchmark: str
    model: str | None
    """What the reward is called, or where its generator came from."""
    num_pairs: int
    num_prompts: int
    num_rater_ties: int
    """Pairs that no accuracy counts, since the raters were split evenly."""
    seed: int
    ties: Ties
    """What equal scores count as."""
    default: SettingResult
    """At the model's own default levels."""
    sweep: list[SettingResult]
    """One single level each, ascending: the curve over sigma."""
    ensembles: list[SettingResult]
    """Several levels: token-level ensembles, each followed by the average of its levels' scores."""
    draws: list[SettingResult]
    """The default over several noise draws; empty unless asked for."""
    bayes: BayesReference | None
    seconds: float
    scores: dict[str, PairScores] = field(repr=False)
    """Raw scores of every setting, by label; not part of `to_dict`."""
    pairs: PairSet = field(repr=False)
    """The pairs that were measured; not part of `to_dict`."""

    @property
    def settings(self) -> list[SettingResult]:
        """All that was measured, once each: the default first."""
        unique = {r.setting.label: r for r in [self.default, *self.sweep, *self.ensembles, *self.draws]}
        return list(unique.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; NaN, which JSON does not have, becomes None."""
        values = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("scores", "pairs")
        }
        return _plain(values)

    def to_markdown(self) -> str:
        """A table: one row a setting, with accuracy, its interval, share of the optimum, calibration."""
        lines = [f"**{self.benchmark}**: {self.num_pairs} pairs of {self.num_prompts} prompts."]
        if self.bayes is not None:
            lines.append(f"Bayes-optimal accuracy {100 * self.bayes.accuracy.value:.1f} %.")
        known = self.bayes is not None
        lines += [
            "",
            "| noise levels | passes | accuracy % | 95 % interval "
            + ("| % of Bayes | 95 % interval " if known else "")
            + "| ECE % | log-loss |",
            "|---|--:|--:|---|" + ("--:|---|" if known else "") + "--:|--:|",
        ]
        for result in self.settings:
            name = result.setting.label + (" (default)" if result is self.default else "")
            cells = [
                name,
                str(result.setting.passes),
                *result.accuracy.percents(),
                *(result.expected_bayes_share.percents() if result.expected_bayes_share else ()),
            ]
            cells += [
                f"{100 * result.reliability.expected_calibration_error:.1f}",
                f"{result.reliability.log_loss:.3f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines += [
            "",
            f"Intervals resample prompts. Equal scores count as {self.ties}. ECE and log-loss: by the "
            "model's own scale where it has one for the levels, else by one fitted to the other half of the "
            "prompts.",
        ]
        if known:
            lines.append("% of Bayes: expected agreement with fresh raters over that of the best reward.")
        if self.num_rater_ties:
            lines.append(f"{self.num_rater_ties} pairs on which raters tied are not counted.")
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path) -> Path:
        """Write results.json, results.md and scores.parquet (one row a pair, raw scores of every setting)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(
            folder / "results.json", (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode()
        )
        atomic_write(folder / "results.md", self.to_markdown().encode())
        self._write_scores(folder / "scores.parquet")
        return folder

    def _write_scores(self, path: Path) -> None:
        import pyarrow  # here, since reading a result needs neither
        import pyarrow.parquet as parquet

        columns: dict[str, Any] = {
            "prompt": [self.pairs.prompts[row] for row in self.pairs.prompt_index.tolist()],
            "target": self.pairs.target.numpy(),
        }
        if self.pairs.bayes is not None:
            columns["bayes"] = self.pairs.bayes.numpy()
        for label, scores in self.scores.items():
            columns[f"{label}: chosen"] = scores.chosen.mean(dim=0).numpy()
            columns[f"{label}: rejected"] = scores.rejected.mean(dim=0).numpy()
        with atomic_path(path) as partial:
            parquet.write_table(pyarrow.table(columns), partial)


def evaluate_latent_pairs(
    model: RewardModel,
    pairs: PairSet,
    *,
    noise_levels: Sequence[float] = SWEEP_LEVELS,
    ensembles: Sequence[Sequence[float]] = (PAPER_ENSEMBLE,),
    num_draws: int = 1,
    seed: int = 0,
    ties: Ties = "wrong",
    batch_size: int = 128,
    benchmark: str = "shapes",
    model_name: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Measure a reward on pairs.

    Args:
        noise_levels: single levels of the sweep; may be empty.
        ensembles: lists of levels, each measured joined as tokens and as an average of scores.
        num_draws: more than 1 also measures the default over that many noise draws: accuracy of the average,
            and how often two draws agree.
        seed: of the noise.
        ties: what equal scores count as.
        batch_size: images per call; no effect on the result.
        benchmark: what the pairs are called in the report.
        model_name: what the reward is called there; by default its generator.
        on_progress: called with (work done, work in all), in passes over images.
    """
    start = time.perf_counter()
    if len(pairs) == 0:
        raise InvalidInputError("there are no pairs to evaluate on")
    if num_draws < 1:
        raise InvalidInputError(f"num_draws = {num_draws}: must be at least 1")
    default = Setting(noise_levels=tuple(model.config.noise_levels))
    singles = [Setting(noise_levels=(float(level),)) for level in sorted(set(noise_levels))]
    several = [
        Setting(noise_levels=tuple(float(level) for level in levels), combine=combine)
        for levels in ensembles
        for combine in ("tokens", "scores")
    ]
    drawn = [dataclasses.replace(default, num_draws=num_draws)] if num_draws > 1 else []
    settings = list({setting.label: setting for setting in [default, *singles, *several, *drawn]}.values())
    results, scores = noise_sweep(
        model, pairs, settings, seed=seed, ties=ties, batch_size=batch_size, on_progress=on_progress
    )
    by_label = {result.setting.label: result for result in results}

    bayes = None
    if pairs.bayes is not None:
        p = pairs.bayes.double().numpy()
        prompts = pairs.prompt_index.numpy()
        bayes = BayesReference(
            accuracy=cluster_bootstrap(pair_correctness(p - 0.5, pairs.target.numpy(), ties="half"), prompts),
            expected_accuracy=cluster_bootstrap(np.maximum(p, 1 - p), prompts),
        )
    return EvaluationResult(
        benchmark=benchmark,
        model=model_name or model.config.backbone_id,
        num_pairs=len(pairs),
        num_prompts=pairs.num_prompts,
        num_rater_ties=int((pairs.target == 0.5).sum()),
        seed=seed,
        ties=ties,
        default=by_label[default.label],
        sweep=[by_label[setting.label] for setting in singles],
        ensembles=[by_label[setting.label] for setting in several],
        draws=[by_label[setting.label] for setting in drawn],
        bayes=bayes,
        seconds=time.perf_counter() - start,
        scores=scores,
        pairs=pairs,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Setting):
        return {"label": value.label, "passes": value.passes, **_plain(dataclasses.asdict(value))}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
