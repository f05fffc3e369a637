"""Rows of a prompt with pictures: checked, scored or compared. The same for a few pictures on the command
line, for a file of them, and for a worker among many."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dina_lrm.errors import InvalidInputError
from dina_lrm.scaling.settings import COMPARE, SCORE, Scoring, Task

if TYPE_CHECKING:
    from PIL.Image import Image

    from dina_lrm.models.reward_model import RewardModel

__all__ = ["Row", "is_text", "parse_row", "results_of_rows"]

Result = dict[str, Any]
"""A value for each result column of the task, and `error`: None, or why there are no values."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as read. `error` says why it can have no result; then prompt and pictures may be missing."""

    index: int
    prompt: str | None = None
    pictures: tuple[str | bytes | None, ...] = ()
    """In the order of the task's columns: a path or URL, or the content of a file."""
    error: str | None = None


def parse_row(index: int, record: Any, task: Task = SCORE) -> Row:
    """A row from its columns; a picture is a path, bytes, or the struct of both that Hugging Face datasets
    write.

    >>> parse_row(3, {"prompt": "a red circle", "image": {"bytes": None, "path": "a.png"}})
    Row(index=3, prompt='a red circle', pictures=('a.png',), error=None)
    >>> parse_row(4, {"prompt": "a red circle"}).error
    'image is missing'
    """
    if not isinstance(record, dict):
        wanted = " and ".join(task.columns)
        return Row(index=index, error=f"a row is an object with {wanted}; got {type(record).__name__}")
    cells = [record.get(name) for name in task.columns]
    cells = [cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell for cell in cells]
    error = None
    for name, cell in zip(task.columns, cells, strict=True):
        if cell is None:
            error = error or f"{name} is missing"
        elif not isinstance(cell, str if name == "prompt" else (str, bytes)):
            error = error or f"{name} has type {type(cell).__name__}"
        elif isinstance(cell, str) and not is_text(cell):
            error = error or f"{name} is not text: it holds half of a surrogate pair"
    prompt, *pictures = (
        cell if isinstance(cell, bytes) or (isinstance(cell, str) and is_text(cell)) else None
        for cell in cells
    )
    return Row(
        index=index,
        prompt=prompt if isinstance(prompt, str) else None,
        pictures=tuple(pictures),
        error=error,
    )


def is_text(value: str) -> bool:
    """Whether a string can be encoded: half of a surrogate pair, say of a cut-off emoji, cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def results_of_rows(
    model: "RewardModel",
    rows: Sequence[Row],
    scoring: Scoring,
    open_file: Callable[[str], Path | bytes],
    task: Task = SCORE,
) -> list[Result]:
    """One result a row, in order. All rows are in memory at once.

    A row that the model refuses is found by trying one at a time.

    Args:
        open_file: a picture's file, or its bytes, from what a row calls it; InvalidInputError where there is
            none. Whatever else it raises ends the run: it is no fault of the row.
    """
    from dina_lrm.data.pairs import load_image

    results: list[Result] = []
    good: list[tuple[Result, str, list[Image]]] = []
    for row in rows:
        result: Result = dict.fromkeys(task.results) | {"error": row.error}
        results.append(result)
        if row.error is not None:
            continue
        try:
            if not row.prompt or not row.prompt.strip():
                raise InvalidInputError("the prompt is empty")
            named = [
                picture for picture in row.pictures if picture is not None
            ]  # none is missing where there is no error
            sources = [open_file(one) if isinstance(one, str) else one for one in named]
            good.append((result, row.prompt, [load_image(source) for source in sources]))
        except InvalidInputError as error:
            result["error"] = str(error)

    def fill(batch: Sequence[tuple[Result, str, "list[Image]"]]) -> None:
        prompts = [prompt for _, prompt, images in batch for _ in images]
        values = _ask(model, prompts, [image for _, _, images in batch for image in images], scoring, task)
        for (result, _, _), found in zip(batch, values, strict=True):
            if all(value is None or math.isfinite(value) for value in found):
                result.update(zip(task.results, found, strict=True))
            else:
                result["error"] = f"the {task.name} is not finite: {found[0]}"

    if good:
        try:
            fill(good)
        except InvalidInputError:
            for item in good:
                try:
                    fill([item])
                except InvalidInputError as error:
                    item[0]["error"] = str(error)
    return results


def _ask(
    model: "RewardModel", prompts: list[str], images: "list[Image]", scoring: Scoring, task: Task
) -> list[tuple[float | None, ...]]:
    """The values of the result columns, row by row."""
    levels = scoring.levels(model.config.noise_levels)
    output = model.score(
        prompts,
        images,
        noise_levels=levels,
        seed=scoring.seed,
        num_draws=scoring.num_draws,
        target_error=scoring.target_error,
        max_draws=scoring.max_draws,
    )
    scores = [float(score) for score in output.scores]
    if task == COMPARE:
        from dina_lrm.models.scoring import preference_probability

        read_at = levels if isinstance(levels, list) else [levels]
        pairs = zip(scores[::2], scores[1::2], strict=True)
        return [(preference_probability(a - b, read_at, model.config),) for a, b in pairs]
    errors = output.standard_errors
    return list(zip(scores, [None] * len(scores) if errors is None else map(float, errors), strict=True))
