"""What the commands share in talking to people and programs: results on stdout, everything else on stderr."""

import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from dina_lrm.errors import ScoringError

if TYPE_CHECKING:
    from rich.console import Console

    from dina_lrm.runs.progress import StepMetrics


WIDE = 10_000
"""Columns of a table that is not read on a terminal."""

LONGEST_SECONDS, LEAST_SECONDS = 30.0, 2.0
"""Between two lines of progress: at most, and at least however quick the work."""


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


class WorkProgress:
    """Rate and time left of long work: a bar on a terminal, elsewhere a line at least every 20th of it or
    every half a minute, whichever comes first.

    Args:
        totals: how much there is to do of each kind, where it is known beforehand.
        draw: a bar on a terminal; without, lines there too, as beside a server's log.
    """

    def __init__(self, totals: Mapping[str, int | None] | None = None, *, draw: bool = True) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        self.totals = dict(totals or {})
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            console=stderr(),
            transient=True,
            disable=not (draw and sys.stderr.isatty()),
        )
        self.task: Any = None
        self.kind = ""
        self.started = self.told_at = time.perf_counter()
        self.told = 0

    def __enter__(self) -> "WorkProgress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def tell(self, kind: str, done: int, found: int = 0, *, total: int | None = None) -> None:
        """Tell that so much of one kind of work, such as "pairs", is done, `found` of it by an earlier run:
        the rate is this run's."""
        total = self.totals.get(kind) if total is None else total
        now = time.perf_counter()
        if kind != self.kind:
            if self.kind:  # the first kind is timed from the beginning
                self.started = self.told_at = now
            self.kind, self.told = kind, found
            self.task = self.bar.add_task(kind, total=total, pace="")
        rate = (done - found) / max(now - self.started, 1e-9)
        pace = f"{rate:.3g} a second"
        if total is not None and total > done and rate > 0:  # a total may count a row of several pairs as one
            pace += f", {duration((total - done) / rate)} left"
        self.bar.update(self.task, completed=done, total=total, pace=pace)
        if not self.bar.disable or done == self.told:
            return
        steps_on = total is not None and 20 * (done - self.told) >= total
        if now - self.told_at < (LEAST_SECONDS if steps_on else LONGEST_SECONDS):
            return
        self.told, self.told_at = done, now
        of = f" of {total:,}" if total is not None and total >= done else ""
        log(f"  {done:,}{of} {kind}, {pace}")


def duration(seconds: float) -> str:
    """Time for people.

    >>> duration(42.4), duration(250), duration(3 * 3600 + 300)
    ('42 s', '4 min', '3 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


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
