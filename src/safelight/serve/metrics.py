"""What the server counts, for Prometheus; and a line in the log for every job that has ended."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from safelight.serve import logs
from safelight.serve.jobs import Job
from safelight.serve.memory import device_bytes, resident_bytes
from safelight.serve.worker import Watch

if TYPE_CHECKING:
    from safelight.serve.worker import Worker

log = logging.getLogger(__name__)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)


class Metrics(Watch):
    """A registry of its own: several servers may live in one process. Safe from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self.requests = self._counter("requests", "HTTP requests.", "route", "status")
        self.seconds = self._histogram("request_seconds", "Time to answer.", "route")
        self.refused = self._counter("refused", "Requests refused.", "reason")
        self.queue = self._histogram("queue_seconds", "From acceptance to the first step.", "model")
        self.steps = self._histogram("step_seconds", "A step of all live pictures.", "model")
        self.first = self._histogram(
            "first_preview_seconds", "From acceptance to the first preview.", "model"
        )
        self.live = self._histogram(
            "step_pictures", "Pictures that share a step.", "model", of=_COUNTS
        )
        self.rows = self._histogram("call_rows", "Rows of a network call.", "model", of=_COUNTS)
        self.jobs = self._counter("jobs", "Jobs that ended.", "model", "status")
        self.lasted = self._histogram("job_seconds", "From acceptance to the end.", "model")
        self.pictures = self._counter("pictures", "Pictures that ended.", "model", "outcome")
        self._queued = self._gauge("queued_jobs", "Waiting.", "model")
        self._running = self._gauge("running_jobs", "Running.", "model")
        self._backlog = self._gauge("backlog_seconds", "Expected work.", "model")
        self._ticks = self._gauge("ticks", "Engine ticks.", "model")
        self._calls = self._gauge("calls", "Network calls.", "model")
        self._loaded = self._gauge("loaded", "Whether a model is loaded.", "model")
        self._resident = self._gauge("resident_bytes", "Main memory of this process.")
        self._device = self._gauge("device_bytes", "Memory of the accelerator in use.")

    # -- told by workers -----------------------------------------------------------------------

    def began(self, job: Job) -> None:
        self.queue.labels(job.model).observe((job.started or 0) - job.created)

    def stepped(self, model: str, seconds: float, pictures: int, rows: int, calls: int) -> None:
        self.steps.labels(model).observe(seconds)
        self.live.labels(model).observe(pictures)
        if calls:
            self.rows.labels(model).observe(rows / calls)

    def previewed(self, job: Job) -> None:
        self.first.labels(job.model).observe(time.time() - job.created)

    def ended(self, job: Job) -> None:
        self.jobs.labels(job.model, str(job.status)).inc()
        self.lasted.labels(job.model).observe((job.completed or time.time()) - job.created)
        for result in job.results:
            self.pictures.labels(job.model, str(result.outcome)).inc()
        logs.event(log, "job", **_told(job))

    # -- read ----------------------------------------------------------------------------------

    def text(self, loaded: Mapping[str, Worker]) -> bytes:
        """Everything as Prometheus reads it.

        Args:
            loaded: the models in memory now.
        """
        with self._lock:
            self._loaded.clear()
            for name, worker in loaded.items():
                queued, running = worker.depth
                self._queued.labels(name).set(queued)
                self._running.labels(name).set(running)
                self._backlog.labels(name).set(worker.backlog)
                self._ticks.labels(name).set(worker.generator.engine.ticks)
                self._calls.labels(name).set(worker.generator.engine.calls)
                self._loaded.labels(name).set(1)
            self._resident.set(resident_bytes())
            self._device.set(device_bytes())
            return generate_latest(self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"safelight_{name}", help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(f"safelight_{name}", help, labels, registry=self.registry)

    def _histogram(
        self, name: str, help: str, *labels: str, of: tuple[float, ...] = _SECONDS
    ) -> Histogram:
        return Histogram(f"safelight_{name}", help, labels, buckets=of, registry=self.registry)


def _told(job: Job) -> dict[str, Any]:
    """A job that has ended, for the log."""
    done, began = job.completed or 0.0, job.started or job.completed or 0.0
    return {
        "job": job.id,
        "request_id": job.origin or None,
        "key": job.asker or None,
        "model": job.model,
        "outcome": str(job.status),
        "pictures": {str(each.seed): str(each.outcome) for each in job.pictures},
        "steps": sum(request.steps or 0 for request in job.requests),
        "queue_seconds": round(began - job.created, 4),
        "seconds": round(done - began, 4),
    }
