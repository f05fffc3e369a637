"""How often the monitor of an alignment run is wrong, and how late it is right: simulated runs.

    python benchmarks/overoptimisation.py --results benchmarks/results

Every run has `evaluations` of `prompts` held-out prompts. The scores of a prompt at two evaluations differ by
the change of the mean and by noise of its own: Gaussian, or skewed (most prompts do not change, a few change
a lot), with standard deviation 1 in units of which all changes are given. The rule is asked after every
evaluation, as a run asks it; a run counts once, at its first alarm. "each at 95 %" is the rule without its
correction: every test at 2.5 % on its own, gold against its best evaluation alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from record import write_results

from dina_lrm.alignment.gold import Evaluation, overoptimisation, paired_gain

Curve = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Options:
    results: Path | None = None
    """Folder of the table; by default it is only printed."""
    runs: int = 1000
    evaluations: int = 16
    prompts: tuple[int, ...] = (64, 200)


def gold_curves(evaluations: int) -> dict[str, tuple[Curve, int | None]]:
    """Mean gold at each evaluation, in standard deviations of a prompt's noise, and after which evaluation an
    alarm is right; the proxy gains 0.5 at each."""
    turn = evaluations // 2
    return {
        "constant": (lambda k: 0.0 * k, None),
        "rising": (lambda k: 0.1 * k, None),
        "rising, then level": (lambda k: 0.1 * np.minimum(k, turn), turn),
        "rising, then falling slowly": (
            lambda k: 0.1 * np.minimum(k, turn) - 0.1 * np.maximum(k - turn, 0),
            turn,
        ),
        "rising, then falling": (lambda k: 0.1 * np.minimum(k, turn) - 0.3 * np.maximum(k - turn, 0), turn),
        "falling from the start": (lambda k: -0.1 * k, 0),
    }


def up_and_down(turn: int, fall: float) -> Curve:
    return lambda k: 0.1 * np.minimum(k, turn) - fall * np.maximum(k - turn, 0)


def noise(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Mean 0, variance 1."""
    if kind == "Gaussian":
        return rng.normal(size=shape)
    jumps = (rng.random(shape) < 0.1) * rng.exponential(size=shape)
    return (jumps - 0.1) / np.sqrt(0.19)


def simulated(
    rng: np.random.Generator, gold: Curve, kind: str, evaluations: int, prompts: int
) -> list[Evaluation]:
    """One run; each evaluation's noise is its own, so that differences have variance 1."""
    steps = np.arange(evaluations)
    level = rng.normal(size=(2, prompts))
    changes = noise(rng, kind, (2, evaluations, prompts)) / np.sqrt(2)
    proxy = level[0] + 0.5 * steps[:, None] + changes[0]
    golds = level[1] + gold(steps)[:, None] + changes[1]
    return [
        Evaluation(step=k, seconds=0.0, proxy=tuple(proxy[k]), gold={"gold": tuple(golds[k])})
        for k in range(evaluations)
    ]


def uncorrected(history: list[Evaluation]) -> bool:
    """Gold against its best evaluation so far, at 95 %."""
    means = [evaluation.mean_gold or 0.0 for evaluation in history]
    best = int(np.argmax(means))
    now, then = history[-1].main_gold, history[best].main_gold
    assert now is not None
    assert then is not None
    return best < len(history) - 1 and paired_gain(now, then)[2] < 0


def first_alarm(history: list[Evaluation], alarmed: Callable[[list[Evaluation]], bool]) -> int | None:
    return next((k for k in range(1, len(history)) if alarmed(history[: k + 1])), None)


def main(options: Options) -> None:
    rows: list[dict[str, Any]] = []
    for prompts in options.prompts:
        for kind in ("Gaussian", "skewed"):
            for name, (curve, right_from) in gold_curves(options.evaluations).items():
                rng = np.random.default_rng([prompts, len(rows)])
                certain: list[int | None] = []
                naive: list[int | None] = []
                for _ in range(options.runs):
                    history = simulated(rng, curve, kind, options.evaluations, prompts)
                    certain.append(
                        first_alarm(
                            history,
                            lambda seen: overoptimisation(seen, planned=options.evaluations) is not None,
                        )
                    )
                    naive.append(first_alarm(history, uncorrected))
                rows.append(
                    {"prompts": prompts, "noise": kind, "gold": name, "right_from": right_from}
                    | {"alarms": summary(certain, right_from), "each_at_95": summary(naive, right_from)}
                )
                print(rows[-1], flush=True)
    about = {"runs": options.runs, "evaluations": options.evaluations}
    text = "\n".join(table(about, rows)) + "\n"
    print(text)
    if options.results is not None:
        write_results(options.results, "overoptimisation", {**about, "rows": rows}, text, seeds=[0])


def summary(alarms: list[int | None], right_from: int | None) -> dict[str, Any]:
    """Shares of runs with a false alarm and with one that is right, and how many evaluations that took."""
    false = [at for at in alarms if at is not None and (right_from is None or at <= right_from)]
    right = [
        at - right_from for at in alarms if at is not None and right_from is not None and at > right_from
    ]
    return {
        "false": len(false) / len(alarms),
        "seen": len(right) / len(alarms),
        "delay": float(np.median(right)) if right else None,
    }


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{about['runs']} simulated runs a row, {about['evaluations']} evaluations each.",
        "",
        "| prompts | noise | gold | false alarms | seen | delay, evaluations "
        "| each at 95 %: false alarms | delay |",
        "|--:|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ours, naive = row["alarms"], row["each_at_95"]
        seen = "" if row["right_from"] is None else f"{ours['seen']:.1%}"
        delays = ["" if one["delay"] is None else f"{one['delay']:g}" for one in (ours, naive)]
        lines.append(
            f"| {row['prompts']} | {row['noise']} | {row['gold']} | {ours['false']:.1%} | {seen} "
            f"| {delays[0]} | {naive['false']:.1%} | {delays[1]} |"
        )
    return lines


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
