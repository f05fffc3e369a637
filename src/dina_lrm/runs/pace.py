"""How fast long work goes and how much time is left: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Pace", "WorkProgress", "duration"]


class Pace:
    """Rate of work, time left, and when a line about it is due: every 5 %, and every 30 seconds, but not
    twice in 2 seconds.

    Args:
        total: of the work, where it is known.
        found: done by an earlier run; it does not count into the rate.
        started: of the clock; None: now.
    """

    LONGEST_SECONDS, LEAST_SECONDS, FRACTION = 30.0, 2.0, 0.05

    def __init__(self, total: int | None, found: int = 0, started: float | None = None) -> None:
        self.total, self.found = total, found
        self.started = self._line_at = time.perf_counter() if started is None else started
        self._line_done = found

    def due(self, done: int) -> bool:
        """Whether to print a line now; the next one is due later."""
        now, more = time.perf_counter(), done - self._line_done
        enough = self.total is not None and more >= self.FRACTION * self.total
        if more == 0 or now - self._line_at < (self.LEAST_SECONDS if enough else self.LONGEST_SECONDS):
            return False
        self._line_done, self._line_at = done, now
        return True

    def rate(self, done: int) -> float:
        """Items a second in this run."""
        return (done - self.found) / max(time.perf_counter() - self.started, 1e-9)

    def left(self, done: int) -> str:
        """Time left at this rate, as in "4 min left"; empty where it is not known."""
        rate = self.rate(done)
        if self.total is None or done >= self.total or rate <= 0:  # rows may hold several pairs each
            return ""
        return f"{duration((self.total - done) / rate)} left"


class WorkProgress:
    """Rate and time left of long work: a bar on a terminal, elsewhere lines when `Pace` says so.

    Args:
        totals: how much there is to do of each kind, where it is known beforehand.
        console: of the bar; None is standard error.
        log: takes the lines; None prints them on the console.
        draw: a bar on a terminal; without, lines there too, as beside a server's log.
    """

    def __init__(
        self,
        totals: Mapping[str, int | None] | None = None,
        *,
        console: "Console | None" = None,
        log: Callable[[str], None] | None = None,
        draw: bool = True,
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        self.totals = dict(totals or {})
        self.console = console or Console(file=sys.stderr, highlight=False)
        self.log = log or self._print
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            console=self.console,
            transient=True,
            disable=not (draw and self.console.is_terminal),
        )
        self.task: Any = None
        self.kind = ""
        self.pace = Pace(None)

    def __enter__(self) -> "WorkProgress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def tell(self, kind: str, done: int, found: int = 0, *, total: int | None = None) -> None:
        """Tell that so much of one kind of work, such as "pairs", is done, `found` of it by an earlier run:
        the rate is this run's."""
        total = self.totals.get(kind) if total is None else total
        if kind != self.kind:
            # The first kind is timed from the beginning.
            self.pace = Pace(total, found, None if self.kind else self.pace.started)
            self.kind = kind
            self.task = self.bar.add_task(kind, total=total, pace="")
        self.pace.total = total
        pace = ", ".join(filter(None, [f"{self.pace.rate(done):.3g} a second", self.pace.left(done)]))
        self.bar.update(self.task, completed=done, total=total, pace=pace)
        if self.bar.disable and self.pace.due(done):
            of = f" of {total:,}" if total is not None and total >= done else ""
            self.log(f"  {done:,}{of} {kind}, {pace}")

    def _print(self, line: str) -> None:
        from rich.markup import escape

        self.console.print(escape(line), soft_wrap=True)


def duration(seconds: float) -> str:
    """Time for people.

    >>> duration(42.4), duration(250.0), duration(3 * 3600.0 + 300)
    ('42 s', '4 min', '3 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
