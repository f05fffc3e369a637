"""What the commands share in talking to people and programs: results on stdout, everything else on stderr."""

import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from dina_lrm.training.progress import StepMetrics


LOGGED_EVERY = 4096
"""Comparisons between two lines of progress where their total is not known."""


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
    print(json.dumps(record, ensure_ascii=False, allow_nan=False), flush=True)


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
    stdout().print(table)


def progress_bar(unit: str) -> "Progress":
    """A bar on stderr with rate and time left; nothing is drawn when stderr is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(compact=True),
        console=stderr(),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


class ComparisonProgress:
    """Rate and time left of going through a data set: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.bar = progress_bar("")
        self.task: Any = None
        self.kind = ""
        self.started, self.told = time.perf_counter(), 0

    def __enter__(self) -> "ComparisonProgress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def tell(self, kind: str, done: int, found: int) -> None:
        """Of `done` comparisons ("pairs"), or of another kind, `found` were there from an earlier run."""
        if kind != self.kind:
            self.kind, self.told = kind, 0
            self.task = self.bar.add_task(kind, total=self.total if kind == "pairs" else None)
        rate = (done - found) / max(time.perf_counter() - self.started, 1e-9)
        self.bar.update(self.task, completed=done, description=f"{kind}, {rate:.1f} a second")
        every = LOGGED_EVERY if self.total is None else max(1, self.total // 20)
        if not self.bar.disable or kind != "pairs" or done - self.told < every:
            return
        self.told = done
        of, left = "", ""
        if self.total is not None and done <= self.total:  # which counts a row of a list as one
            of = f" of {self.total:,}"
            left = f", {(self.total - done) / rate / 60:.0f} min left" if rate > 0 else ""
        log(f"  {done:,}{of} comparisons, {rate:.1f} a second{left}")


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
