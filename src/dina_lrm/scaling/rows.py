"""One row of a dataset: read, checked, scored. The same whether one process does it or many."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dina_lrm.models.reward_model import RewardModel

__all__ = ["Row", "Scoring", "parse_row", "score_batch", "score_rows"]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a picture is scored; see `RewardModel.score`."""

    noise_levels: tuple[float, ...]
    """In [0, 1]; several are one ensemble."""
    num_draws: int = 1
    target_error: float | None = None
    max_draws: int = 64
    seed: int = 0
    """Of every picture's noise: a score does not depend on what is scored beside it."""
    batch_size: int = 16
    """Pictures in memory at once."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as read. `error` says why it cannot be scored; then `prompt` and `image` may be missing."""

    index: int
    prompt: str | None = None
    image: str | bytes | None = None
    error: str | None = None


def parse_row(index: int, record: Any) -> Row:
    """A row from its columns; `image` is a path, bytes, or the struct of both that Hugging Face datasets
    write.

    >>> parse_row(3, {"prompt": "a red circle", "image": {"bytes": None, "path": "a.png"}})
    Row(index=3, prompt='a red circle', image='a.png', error=None)
    >>> parse_row(4, {"prompt": "a red circle"}).error
    'image is missing'
    """
    if not isinstance(record, dict):
        return Row(
            index=index, error=f"a row is an object with prompt and image; got {type(record).__name__}"
        )
    prompt, image = record.get("prompt"), record.get("image")
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    error = None
    for name, value, kinds in (("prompt", prompt, str), ("image", image, (str, bytes))):
        if value is None:
            error = error or f"{name} is missing"
        elif not isinstance(value, kinds):
            error = error or f"{name} has type {type(value).__name__}"
        elif isinstance(value, str) and not _is_text(value):
            error = error or f"{name} is not text: it holds half of a surrogate pair"
    return Row(
        index=index,
        prompt=prompt if isinstance(prompt, str) and _is_text(prompt) else None,
        image=image if isinstance(image, bytes) or (isinstance(image, str) and _is_text(image)) else None,
        error=error,
    )


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def score_batch(
    model: "RewardModel", prompts: list[str], images: list[Any], scoring: Scoring
) -> tuple[list[float], list[float | None]]:
    """Scores, and standard errors where more than one draw was asked for."""
    levels = scoring.noise_levels
    output = model.score(
        prompts,
        images,
        noise_levels=levels[0] if len(levels) == 1 else list(levels),
        seed=scoring.seed,
        num_draws=scoring.num_draws,
        target_error=scoring.target_error,
        max_draws=scoring.max_draws,
    )
    scores = [float(score) for score in output.scores]
    if output.standard_errors is None:
        return scores, [None] * len(scores)
    return scores, [float(error) for error in output.standard_errors]


def score_rows(
    model: "RewardModel", rows: Sequence[Row], scoring: Scoring, open_file: Callable[[str], Path | bytes]
) -> list[dict[str, Any]]:
    """One record a row, in order, with row, prompt, image (where it is a path), score, standard_error, error.

    A row that the model refuses is found by scoring one at a time.

    Args:
        open_file: a picture's file, or its bytes, from what a row calls it; ValueError where there is none.
    """
    from dina_lrm.data.pairs import load_image

    records: list[dict[str, Any]] = []
    good: list[tuple[dict[str, Any], Any]] = []
    for row in rows:
        record: dict[str, Any] = {
            "row": row.index,
            "prompt": row.prompt,
            "image": row.image if isinstance(row.image, str) else None,
            "score": None,
            "standard_error": None,
            "error": row.error,
        }
        records.append(record)
        if row.error is None:
            try:
                if not row.prompt or not row.prompt.strip():
                    raise ValueError("the prompt is empty")
                assert row.image is not None
                source = open_file(row.image) if isinstance(row.image, str) else row.image
                good.append((record, load_image(source)))
            except ValueError as error:
                record["error"] = str(error)

    def fill(batch: list[tuple[dict[str, Any], Any]]) -> None:
        prompts, images = [record["prompt"] for record, _ in batch], [image for _, image in batch]
        scores, errors = score_batch(model, prompts, images, scoring)
        for (record, _), score, error in zip(batch, scores, errors, strict=True):
            if math.isfinite(score):
                record["score"], record["standard_error"] = score, error
            else:
                record["error"] = f"the score is not finite: {score}"

    if good:
        try:
            fill(good)
        except ValueError:
            for item in good:
                try:
                    fill([item])
                except ValueError as error:
                    item[0]["error"] = str(error)
    return records
