"""All models of a server, their workers and jobs, and what a request may ask for."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from safelight.errors import InvalidRequest, ModelNotFound
from safelight.generate import Generator, load
from safelight.names import DEFAULT_MODEL
from safelight.request import GenerateRequest
from safelight.serve.jobs import Job
from safelight.serve.store import Store
from safelight.serve.worker import Worker
from safelight.spec import Record

log = logging.getLogger(__name__)


class Settings(Record):
    """How a server is set up. Every field is an option of ``safelight serve``."""

    models: tuple[str, ...] = (DEFAULT_MODEL,)
    """The first answers where a request names none."""
    device: str | None = None
    dtype: str | None = None
    safety_checker: str | None = None
    lora_dir: tuple[str, ...] = ()
    embedding_dir: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    """Who may ask; empty: everybody who reaches the port."""
    live: int = Field(default=8, ge=1, le=1024)
    """Most pictures of a model that share its networks at a time."""
    queue_seconds: float = Field(default=600.0, gt=0)
    """Work that may wait, in expected seconds of the device; beyond it requests are refused."""
    max_pixels: int = Field(default=2048 * 2048, ge=64)
    max_steps: int = Field(default=512, ge=1)
    max_count: int = Field(default=10, ge=1)
    max_prompt: int = Field(default=10_000, ge=1)
    """Characters."""
    max_body: int = Field(default=64 * 2**20, ge=1024)
    """Bytes of a request."""
    keep_seconds: float = Field(default=3600.0, ge=0)
    """How long a finished job is remembered."""
    keep_jobs: int = Field(default=1000, ge=1)
    data_dir: str | None = None
    """Where jobs of the native interface are kept; None: in memory alone."""
    drain_seconds: float = Field(default=60.0, ge=0)
    """How long accepted work may go on after the server was told to stop."""
    azureml: bool = False
    """Answer AzureML's ``/score``. Needs a safety checker, as the answer says who was flagged."""
    without_checker: bool = False
    """Let ``/score`` answer without one."""


class House:
    """Models by name, loaded when they are first asked for; jobs by id."""

    def __init__(
        self, settings: Settings, *, loader: Callable[..., Generator] | None = None
    ) -> None:
        self.settings = settings
        self._load = loader or load
        self._workers: dict[str, Worker] = {}
        self._locks = {name: threading.Lock() for name in settings.models}
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self.store = None if settings.data_dir is None else Store(Path(settings.data_dir))

    @property
    def default(self) -> str:
        """The model of a request that names none."""
        return self.settings.models[0]

    def loaded(self) -> dict[str, Worker]:
        """The models that are ready."""
        return dict(self._workers)

    def name(self, model: str | None) -> str:
        """Which served model is meant: its name, its folder's name, or nothing for the first.

        Raises:
            ModelNotFound: none of them; the message lists them.
        """
        if not model:
            return self.default
        wanted = model.strip().rstrip("/").lower()
        for name in self.settings.models:
            plain = name.rstrip("/").lower()
            if wanted in (plain, plain.rsplit("/", 1)[-1]):
                return name
        raise ModelNotFound(f"no model {model!r} here; there are {', '.join(self.settings.models)}")

    def worker(self, model: str | None) -> Worker:
        """A model's worker; loads the model where that has not been done."""
        name = self.name(model)
        with self._locks[name]:
            if name not in self._workers:
                began = time.monotonic()
                worker = Worker(
                    functools.partial(self._load, name, **self._options()),
                    live=self.settings.live,
                    limit=self.settings.queue_seconds,
                )
                self._workers[name] = worker
                log.info("loaded %s in %.1f s", name, time.monotonic() - began)
            return self._workers[name]

    def _options(self) -> dict[str, Any]:
        s = self.settings
        given = {
            "device": s.device,
            "dtype": s.dtype,
            "safety_checker": s.safety_checker,
            "lora_dir": list(s.lora_dir) or None,
            "embedding_dir": list(s.embedding_dir) or None,
        }
        return {name: value for name, value in given.items() if value is not None}

    # -- jobs ----------------------------------------------------------------------------------

    def submit(
        self,
        requests: Sequence[GenerateRequest],
        model: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        format: str = "PNG",
        on_accept: Callable[[Job], None] | None = None,
    ) -> Job:
        """Check requests against the limits and the model, and queue them as one job.

        May load the model, which takes a while: not for an event loop's thread.

        Args:
            timeout: seconds after which nobody wants it any more, where it still waits.
            format: of the pictures' files.
            on_accept: called before the job is queued; may change it, or refuse it by raising.

        Raises:
            InvalidRequest, ModelNotFound: before anything is queued.
            Busy, Draining: it cannot be taken now.
        """
        name = self.name(model)
        for request in requests:
            self._within_limits(request)
        worker = self.worker(name)
        resolved = [request.resolved(worker.generator.model.spec) for request in requests]
        for request in resolved:
            self._within_limits(request)
        # What the model cannot do is known before it waits.
        worker.generator.stream(request=list(resolved))
        deadline = None if timeout is None else time.monotonic() + timeout
        job = Job(name, resolved, priority=priority, deadline=deadline, format=format)
        if on_accept is not None:
            on_accept(job)  # may give it the id it had before a restart
        self._remember(job)
        try:
            worker.submit(job)
        except Exception:
            self.forget(job.id)
            raise
        return job

    def _within_limits(self, request: GenerateRequest) -> None:
        s = self.settings
        if len(request.prompt) > s.max_prompt or len(request.negative_prompt) > s.max_prompt:
            long = "prompt" if len(request.prompt) > s.max_prompt else "negative_prompt"
            raise InvalidRequest(long, f"is over {s.max_prompt:,} characters.")
        if (request.steps or 0) > s.max_steps:
            raise InvalidRequest("steps", f"{request.steps} is over this server's {s.max_steps}.")
        if request.count > s.max_count:
            raise InvalidRequest("count", f"{request.count} is over this server's {s.max_count}.")
        if (request.width or 0) * (request.height or 0) > s.max_pixels:
            problem = f"{request.width}x{request.height} is over this server's {s.max_pixels:,}"
            raise InvalidRequest("width", f"{problem} pixels.")

    def job(self, name: str) -> Job | None:
        """A job that is still remembered."""
        with self._lock:
            return self._jobs.get(name)

    def jobs(self) -> list[Job]:
        """All that are remembered, oldest first."""
        with self._lock:
            return list(self._jobs.values())

    def position(self, job: Job) -> int | None:
        """Jobs before it."""
        worker = self._workers.get(job.model)
        return None if worker is None else worker.position(job)

    def eta(self, job: Job) -> float | None:
        """Seconds until it is likely to be done."""
        worker = self._workers.get(job.model)
        return None if worker is None else worker.eta(job)

    def forget(self, name: str) -> None:
        """Drop a job and its pictures."""
        with self._lock:
            self._jobs.pop(name, None)

    def _remember(self, job: Job) -> None:
        with self._lock:
            self._jobs[job.id] = job
            done = [each for each in self._jobs.values() if each.status.final]
            old = time.time() - self.settings.keep_seconds
            many = len(self._jobs) - self.settings.keep_jobs
            for place, each in enumerate(done):
                if (each.completed or 0) < old or place < many:
                    del self._jobs[each.id]

    def close(self) -> None:
        """Finish what was accepted, as long as the settings allow, and stop."""
        for worker in self._workers.values():
            worker.close(drain=self.settings.drain_seconds)
        if self.store is not None:
            self.store.close()
