"""What Prometheus is told."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from dina_lrm.serving.batching import BatchStats

__all__ = ["Metrics", "joined"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one app, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # one more series a counter, which says when it was made
        self.registry = CollectorRegistry()
        one = {"registry": self.registry, "namespace": "dina_lrm"}
        self.requests = Counter("requests", "Answered requests", ["route", "status"], **one)
        self.rejected = Counter("rejected", "Requests that were not scored, by reason", ["reason"], **one)
        self.scores = Counter("scores", "Rows scored", ["model"], **one)
        self.callers = Counter("caller_rows", "Rows scored, by the name of the token", ["caller"], **one)
        self.batch_rows = Histogram(
            "batch_rows", "Rows in a pass of the model", ["model", "stage"], buckets=_ROWS, **one
        )
        self.stages = Histogram(
            "stage_seconds",
            "Time of a row in a pass: waiting for it, encoding, forward",
            ["model", "stage"],
            buckets=_SECONDS,
            **one,
        )
        self.duration = Histogram(
            "request_seconds", "From the first byte to the answer", ["route"], buckets=_SECONDS, **one
        )
        self.inflight = Gauge("inflight_requests", "Requests that are being received or answered", **one)
        self._queued = Gauge("queued_rows", "Rows taken and not answered yet", ["model"], **one)
        self._work = Gauge("queued_tokens", "Work taken and not done yet", ["model"], **one)
        self._bytes = Gauge("inflight_bytes", "Bytes of requests that are under way", **one)
        self._model = Gauge(
            "model_info", "The model served, as labels", ["model", "base", "digest", "version"], **one
        )
        ProcessCollector(registry=self.registry)  # memory, processor time, open files

    def describe(
        self,
        model: str,
        *,
        base: str,
        digest: str,
        version: str,
        queued: Callable[[], int],
        work: Callable[[], float],
    ) -> None:
        """Tell which model there is, and how to ask for what it has to do."""
        self._model.labels(model, base, digest, version).set(1)
        self._queued.labels(model).set_function(queued)
        self._work.labels(model).set_function(work)

    def watch_bytes(self, inflight: Callable[[], int]) -> None:
        self._bytes.set_function(inflight)

    def batch(self, model: str, stats: BatchStats) -> None:
        """Count a pass of the model."""
        self.batch_rows.labels(model, stats.stage).observe(stats.units)
        for wait in stats.waits:
            self.stages.labels(model, "wait").observe(wait)
            self.stages.labels(model, stats.stage).observe(stats.seconds)

    def text(self) -> bytes:
        """The exposition, in Prometheus' text format."""
        return generate_latest(self.registry)


def joined(texts: Mapping[str, bytes]) -> bytes:
    """One exposition of those of several replicas, each sample with its replica's name as a label."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))

    class _Collected:
        def collect(self) -> Iterable[Metric]:
            return families.values()

    registry = CollectorRegistry()
    registry.register(_Collected())  # type: ignore[arg-type]
    return generate_latest(registry)
