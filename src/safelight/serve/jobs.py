"""A job: requests that somebody waits for, and what has become of them."""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from safelight.errors import SafelightError
from safelight.generate import Cancel, Event, Preview, Progress
from safelight.request import GenerateRequest, ImageResult, Outcome

log = logging.getLogger(__name__)

_FAILED = (Outcome.error, Outcome.out_of_memory, Outcome.nan)
_NUMBERS = itertools.count()


class Status(StrEnum):
    """Where a job is. The last three are final."""

    queued = "queued"
    generating = "generating"
    completed = "completed"
    failed = "failed"
    cancelled = "cancelled"

    @property
    def final(self) -> bool:
        return self in (Status.completed, Status.failed, Status.cancelled)


@dataclass(eq=False)
class Job:
    """One or several requests to one model, made as one.

    Args:
        requests: resolved.
        cost: seconds of the device it is expected to take.
        priority: higher goes first; equal ones in order of arrival.
        standing: of whoever asks; goes before priority.
        asker: the name of their key; empty where there are none.
        deadline: by :func:`time.monotonic`, after which nobody wants it.
    """

    model: str
    requests: Sequence[GenerateRequest]
    cost: float = 0.0
    priority: int = 0
    deadline: float | None = None
    standing: int = 0
    asker: str = ""
    origin: str = ""
    """Id of the HTTP request that it came with, for logs."""
    format: str = "PNG"
    """Of the pictures' files."""
    id: str = field(default_factory=lambda: f"job-{secrets.token_hex(12)}")
    created: float = field(default_factory=time.time)

    keep: Callable[[Job, Status], None] | None = None
    """Stores the job when it ends, before anybody is told; what it raises is the job's end."""

    status: Status = field(default=Status.queued, init=False)
    started: float | None = field(default=None, init=False)
    completed: float | None = field(default=None, init=False)
    progress: Progress | None = field(default=None, init=False)
    preview: Preview | None = field(default=None, init=False)
    previewed: float | None = field(default=None, init=False)
    """When there was first something to see."""
    results: list[ImageResult] = field(default_factory=list, init=False)
    error: Exception | None = field(default=None, init=False)
    cancel_token: Cancel = field(default_factory=Cancel, init=False)
    number: int = field(default_factory=lambda: next(_NUMBERS), init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _listeners: list[Callable[[Job], None]] = field(default_factory=list, init=False)

    @property
    def count(self) -> int:
        """Pictures asked for."""
        return sum(request.count for request in self.requests)

    @property
    def pictures(self) -> list[ImageResult]:
        """What is finished, in the order that was asked for."""
        return sorted(self.results, key=lambda result: result.index)

    @property
    def late(self) -> bool:
        """Whether its deadline has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def cancel(self) -> None:
        """Stop within one step. Safe from any thread; nothing once it is final."""
        self.cancel_token.set()

    def listen(self, listener: Callable[[Job], None]) -> Callable[[], None]:
        """Have ``listener`` called, on the worker's thread, after every change; it must be quick.

        Returns:
            what ends that.
        """
        with self._lock:
            self._listeners.append(listener)

        def stop() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return stop

    # -- told by the worker ------------------------------------------------------------------

    def begin(self) -> None:
        self.status, self.started = Status.generating, time.time()
        self._tell()

    def hear(self, event: Event) -> None:
        """Take in what the running call says."""
        if isinstance(event, Progress):
            self.progress = event
        elif isinstance(event, Preview):
            self.preview, self.previewed = event, self.previewed or time.time()
        else:
            self.results.append(event)
        self._tell()

    def end(self, error: Exception | None = None) -> None:
        """Final, one way or the other."""
        self.error, self.completed = error or self._failure(), time.time()
        error, status = self.error, Status.completed
        if error is not None:
            status = Status.failed
        elif self.cancel_token.is_set and len(self._good()) < self.count:
            status = Status.cancelled
        if self.keep is not None:
            try:
                self.keep(self, status)
            except Exception as failure:
                if not isinstance(failure, SafelightError):
                    log.exception("job %s could not be kept", self.id)
                self.error, status = self.error or failure, Status.failed
        self.status = status
        self._tell()

    def _failure(self) -> SafelightError | None:
        """Why there is no picture at all, where that is a failure."""
        if not self.results or any(each.outcome not in _FAILED for each in self.results):
            return None
        first = self.pictures[0]
        return SafelightError(f"{first.outcome}: {first.message}")

    def _good(self) -> list[ImageResult]:
        return [result for result in self.results if str(result.outcome) != "cancelled"]

    def _tell(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener(self)
            except Exception:  # a client's loop that has closed, say: no business of the worker's
                log.debug("a listener of job %s failed", self.id, exc_info=True)


class Busy(SafelightError):
    """The queue is full.

    Args:
        retry_after: seconds until there is likely to be room.
        reason: why not now.
    """

    def __init__(self, retry_after: float, reason: str = "the queue is full") -> None:
        self.retry_after = math.ceil(max(1.0, retry_after))
        super().__init__(f"{reason}; try again in {self.retry_after} s.")


class Draining(SafelightError):
    """The server is shutting down."""


class Late(SafelightError):
    """The deadline passed before work began."""


def described(job: Job, *, position: int | None, eta: float | None) -> Mapping[str, Any]:
    """What every dialect may tell of a job, as JSON."""
    progress = job.progress
    return {
        "id": job.id,
        "model": job.model,
        "status": str(job.status),
        "created": round(job.created, 3),
        "started": None if job.started is None else round(job.started, 3),
        "completed": None if job.completed is None else round(job.completed, 3),
        "count": job.count,
        "finished": len(job.results),
        "queue_position": position,
        "progress": 1.0 if job.status is Status.completed else (progress.done if progress else 0.0),
        "step": progress.step if progress else 0,
        "steps": progress.total if progress else None,
        "eta_seconds": None if eta is None else round(eta, 2),
    }
