"""What the API process counts, in Prometheus's form. No label names a tenant."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from holdtrue.service import clock
from holdtrue.service.quotas import ACTIVE
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import Job

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The counters of one application, in a registry of its own."""

    def __init__(self, db: Database) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "holdtrue_requests", "Requests answered.", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "holdtrue_request_seconds",
            "Time to the last byte.",
            ["method", "route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("holdtrue_requests_in_flight", "Requests being answered.", registry=self.registry)
        self.registry.register(_Jobs(db))

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        method = method if method in ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS") else "other"
        self.requests.labels(method, route, str(status)).inc()
        self.seconds.labels(method, route).observe(seconds)

    def text(self) -> bytes:
        """Return the page that Prometheus reads."""
        return generate_latest(self.registry)


class _Jobs(Collector):
    """Jobs that have not ended, by status, and how long the oldest queued one has waited; read when asked for."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def describe(self) -> Iterator[Metric]:
        return iter(())  # asked when it is registered: nothing is read then

    def collect(self) -> Iterator[Metric]:
        with self._db.read() as session:
            query = select(Job.status, func.count(), func.min(Job.created_at))
            rows = session.execute(query.where(Job.status.in_(ACTIVE)).group_by(Job.status)).all()
        counts = {status: (count, oldest) for status, count, oldest in rows}
        jobs = GaugeMetricFamily("holdtrue_jobs", "Jobs that have not ended.", labels=["status"])
        for status in ACTIVE:
            jobs.add_metric([status], counts.get(status, (0, 0))[0])
        yield jobs
        waited = GaugeMetricFamily("holdtrue_queue_age_seconds", "How long ago the oldest queued job was created.")
        waited.add_metric([], max(0, clock.now() - counts["queued"][1]) if "queued" in counts else 0)
        yield waited
