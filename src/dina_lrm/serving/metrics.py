"""What Prometheus is told."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dina_lrm.serving.batching import BatchStats

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one app, in a registry of their own.

    Args:
        queued: rows that wait, asked for at every scrape.
    """

    def __init__(self, queued: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        one = {"registry": self.registry, "namespace": "dina_lrm"}
        self.requests = Counter("requests", "Answered requests", ["route", "status"], **one)
        self.rejected = Counter("rejected", "Requests that were not scored, by reason", ["reason"], **one)
        self.scores = Counter("scores", "Rows scored", **one)
        self.batch_rows = Histogram("batch_rows", "Rows in a pass of the model", buckets=_ROWS, **one)
        self.stages = Histogram(
            "stage_seconds",
            "Time of a row: waiting for a pass, and of its pass encoding and forward",
            ["stage"],
            buckets=_SECONDS,
            **one,
        )
        self.duration = Histogram(
            "request_seconds", "From the first byte to the answer", ["route"], buckets=_SECONDS, **one
        )
        Gauge("queued_rows", "Rows that wait", **one).set_function(queued)

    def batch(self, stats: BatchStats) -> None:
        """Count a pass of the model."""
        self.batch_rows.observe(stats.rows)
        for wait in stats.waits:
            self.stages.labels("wait").observe(wait)

    def text(self) -> bytes:
        """The exposition, in Prometheus' text format."""
        return generate_latest(self.registry)
