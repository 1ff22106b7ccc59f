"""Prometheus metrics of jobs. A scrape reads memory alone, never the database."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.batch.records import Status
from server.metrics import PREFIX


class BatchMetrics(Collector):
    def __init__(self, registry: CollectorRegistry) -> None:
        self._by_status: Mapping[str, int] = {}
        self._lines = Counter(
            PREFIX + "batch_lines_total", "Lines ended, by outcome", ("outcome",), registry=registry
        )
        for outcome in ("done", "failed"):
            self._lines.labels(outcome)
        self.recovered = Counter(
            PREFIX + "batch_recovered_lines_total",
            "Lines that an earlier process left running",
            registry=registry,
        )
        registry.register(self)

    def line_ended(self, ok: bool) -> None:
        self._lines.labels("done" if ok else "failed").inc()

    def set_jobs(self, by_status: Mapping[str, int]) -> None:
        self._by_status = by_status

    def collect(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily(PREFIX + "batch_jobs", "Jobs, by state", labels=["status"])
        for status in Status:
            jobs.add_metric([status], self._by_status.get(status, 0))
        yield jobs
