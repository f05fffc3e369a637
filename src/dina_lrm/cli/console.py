"""What the commands share in talking to people and programs: results on stdout, everything else on stderr."""

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from dina_lrm.errors import ScoringError

if TYPE_CHECKING:
    from rich.console import Console

    from dina_lrm.runs.progress import StepMetrics


WIDE = 10_000
"""Columns of a table that is not read on a terminal."""


class UsageError(Exception):
    """The command cannot be carried out as it was written."""


def stdout() -> "Console":
    """For results. Made at each call, because a test or a pipe may have replaced sys.stdout."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False)


def stderr() -> "Console":
    """For logs, progress and errors."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def report_error(message: str) -> None:
    from rich.markup import escape

    stderr().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def log(message: str) -> None:
    from rich.markup import escape

    stderr().print(escape(message), soft_wrap=True)


def log_validation(metrics: "StepMetrics") -> None:
    """A line for each validation where no progress bar is drawn, so that a log file shows that something
    happens."""
    if metrics.validation and not sys.stderr.isatty():
        log(f"  step {metrics.step}: {max(metrics.validation.values()):.1%} of validation pairs right")


def print_json(record: dict[str, Any]) -> None:
    """One JSON object on one line of stdout. NaN and infinity are not JSON and would be a fault of ours."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    # Bytes of a file's name that are not UTF-8 are halves of surrogate pairs here, which JSON can escape.
    print(line.encode("utf-8", "backslashreplace").decode(), flush=True)


def print_table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, text_columns: int = 1
) -> None:
    """A table on stdout: the first `text_columns` columns flush left, the figures after them flush right."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for index, header in enumerate(headers):
        is_text = index < text_columns
        table.add_column(
            header, justify="left" if is_text else "right", overflow="fold" if is_text else "ellipsis"
        )
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = stdout()
    if not console.is_terminal:  # a program reads it: no cell is folded, so that names stay whole
        console.width = WIDE
    console.print(table)


@contextmanager
def resumable(hint: str) -> Iterator[None]:
    """Work that goes on when it is started again: if it is interrupted, or fails for want of a disk or a
    network, the line on stderr is followed by the hint."""
    try:
        yield
    except (KeyboardInterrupt, OSError, ScoringError, MemoryError, ChildProcessError) as error:
        error.add_note(hint)
        raise


@cache
def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice off the terminal; warnings become one line on stderr."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():  # on a terminal nothing is set: "0" would forbid anyone to hide a bar
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_PROGRESS_BAR", "0")

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        from rich.markup import escape

        stderr().print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True)

    if "PYTEST_CURRENT_TEST" not in os.environ:  # pytest collects warnings itself, and makes them errors
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = show
