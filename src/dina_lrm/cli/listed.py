"""Pictures that are named on the command line: read, scored, and told apart by the names that were typed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dina_lrm.cli.console import UsageError, log
from dina_lrm.errors import InvalidInputError
from dina_lrm.images import picture_file
from dina_lrm.runs.pace import WorkProgress
from dina_lrm.scaling.rows import Result, Row, results_of_rows

if TYPE_CHECKING:
    from dina_lrm import RewardModel
    from dina_lrm.models.options import ModelOptions
    from dina_lrm.scaling.settings import Scoring

SHOWN = 5
"""Reasons in one message."""


def find_pictures(names: Sequence[str], *, skip_bad: bool | None) -> tuple[list[str], list[str]]:
    """The files that look like pictures, before a model is loaded for them; what is wrong with the others.

    Args:
        skip_bad: None for a command that has no such option.

    Raises:
        UsageError: there are others, and they are not to be skipped, or there is nothing else.
    """
    good: list[str] = []
    bad: list[str] = []
    for name in names:
        try:
            _look(picture_file(name))
            good.append(name)
        except InvalidInputError as error:
            bad.append(str(error))
    refuse_bad(bad, len(names), skip_bad=skip_bad)
    return good, bad


def _look(file: Path) -> None:
    """InvalidInputError for a file that does not begin like a picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file):
            pass
    except UnidentifiedImageError as error:
        if file.stat().st_size == 0:
            raise InvalidInputError(f"empty file: {file}") from error
        raise InvalidInputError(f"no picture: {file}") from error
    except Image.DecompressionBombError as error:
        raise InvalidInputError(f"{file}: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"unreadable picture: {file} ({reason})") from error


def score_pictures(
    reward: "ModelOptions", prompt: str, names: Sequence[str], scoring: "Scoring", *, skip_bad: bool = False
) -> "tuple[RewardModel, list[tuple[str, Result]]]":
    """The model, and the pictures with their results, in the order given. Skipped ones are told on stderr.

    Raises:
        UsageError: a picture cannot be scored, and is not to be skipped; or none can.
    """
    files, bad = find_pictures(names, skip_bad=skip_bad)
    model = reward.load()
    scored: list[tuple[str, Result]] = []
    with WorkProgress({"pictures": len(files)}) as progress:
        for start in range(0, len(files), scoring.batch_size):
            batch = files[start : start + scoring.batch_size]
            rows = [Row(index=index, prompt=prompt, pictures=(file,)) for index, file in enumerate(batch)]
            results = results_of_rows(model, rows, scoring, lambda name: picture_file(name))
            for file, result in zip(batch, results, strict=True):
                reason = result["error"]
                if reason is None:
                    scored.append((file, result))
                else:
                    bad.append(reason if file in reason else f"{file}: {reason}")
            if not skip_bad:
                refuse_bad(bad, len(names), skip_bad=False)
            progress.tell("pictures", start + len(batch))
    refuse_bad(bad, len(names), skip_bad=skip_bad)
    for reason in bad:
        log(f"skipped: {reason}")
    return model, scored


def refuse_bad(bad: Sequence[str], total: int, *, skip_bad: bool | None) -> None:
    """UsageError for pictures that cannot be scored, unless these are to be skipped and others are left."""
    if not bad or (skip_bad and len(bad) < total):
        return
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    hint = " (--skip-bad leaves such pictures out)" if skip_bad is False and len(bad) < total else ""
    raise UsageError("; ".join(bad[:SHOWN]) + more + hint)
