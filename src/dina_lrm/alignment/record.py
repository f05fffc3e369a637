"""What an alignment run leaves behind."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dina_lrm.alignment.gold import Evaluation
from dina_lrm.files import naming

__all__ = ["Measures", "RunResult", "append_line", "diversity", "lines_until"]

Measures = dict[str, float]
"""Figures of an update, by name."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended. The policy holds the average weights."""

    steps: int
    seconds: float
    stopped_by: str
    """"steps" or "overoptimisation"."""
    evaluations: tuple[Evaluation, ...]
    history: tuple[Measures, ...]


def append_line(file: Path, record: Mapping[str, Any]) -> None:
    """One line of JSON more."""
    with naming(file), file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def lines_until(file: Path, step: int) -> list[dict[str, Any]]:
    """Records up to an update; a last line that was cut off while it was written is none."""
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    records = [json.loads(line) for line in whole.splitlines()]
    return [record for record in records if record["step"] <= step]


def diversity(latents: Tensor) -> float:
    """Root mean square difference of samples (prompt, sample, ...) of one prompt, mean over prompts."""
    flat = latents.float().flatten(2)
    count = flat.shape[1]
    distances = [
        (flat[:, i] - flat[:, j]).square().mean(dim=1).sqrt()
        for i in range(count)
        for j in range(i + 1, count)
    ]
    return float(torch.stack(distances).mean())
