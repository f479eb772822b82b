"""A server's models and jobs, and what a request goes through before it waits."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from safelight.generate import Generator, load
from safelight.names import DEFAULT_MODEL
from safelight.request import GenerateRequest, ImageResult
from safelight.serve import tuning
from safelight.serve.admission import Limits, visit, within
from safelight.serve.jobs import Draining, Job
from safelight.serve.keys import Asker, Keys
from safelight.serve.metrics import Metrics
from safelight.serve.models import Models
from safelight.serve.store import Store
from safelight.serve.worker import Worker

_GIB = 2**30


class Settings(Limits):
    """How a server is set up. Every field is an option of ``safelight serve``."""

    models: tuple[str, ...] = (DEFAULT_MODEL,)
    """The first answers where a request names none."""
    device: str | None = None
    dtype: str | None = None
    plan: str | None = None
    """As for :meth:`safelight.model.Model.load`."""
    safety_checker: str | None = None
    lora_dir: tuple[str, ...] = ()
    embedding_dir: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    """Who may ask; empty: everybody who reaches the port."""
    keys: str | None = None
    """A TOML file of keys with priorities and quotas; see :mod:`~safelight.serve.keys`."""
    load: Literal["lazy", "start"] = "lazy"
    """``lazy``: the first model at the start, others when they are asked for."""
    memory: float | None = Field(default=None, gt=0)
    """GiB that the process may hold before idle models are unloaded."""
    measure: bool = True
    """Choose the size of network calls by measuring the device, once a machine and model."""
    fast: int | None = Field(default=None, ge=0, le=3)
    """The preset of requests that name none (:mod:`safelight.fast`); a request's 0 is none."""
    live: int | None = Field(default=None, ge=1, le=1024)
    """Most pictures of a model that share its networks at a time; None: as measured, 8 at least."""
    patience: float = Field(default=60.0, gt=0)
    """Seconds of waiting after which a job is overtaken by nothing that came later."""
    queue_seconds: float = Field(default=600.0, gt=0)
    """Work that may wait, in expected seconds of the device; beyond it requests are refused."""
    max_body: int = Field(default=64 * 2**20, ge=1024)
    """Bytes of a request."""
    body_seconds: float = Field(default=60.0, gt=0)
    """How long a client may take to send one."""
    keep_seconds: float = Field(default=3600.0, ge=0)
    """How long a finished job is remembered."""
    keep_jobs: int = Field(default=1000, ge=1)
    keep_bytes: int = Field(default=256 * 2**20, ge=0)
    """What pictures of finished jobs may take in memory; those on disk are there all the same."""
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
        self.keys = Keys.of(settings.keys, settings.api_keys)
        self.metrics = Metrics()
        self._loader = loader or load
        self.models = Models(
            settings.models,
            self._load,
            watch=self.metrics,
            bound=None if settings.memory is None else settings.memory * _GIB,
            live=settings.live,
            limit=settings.queue_seconds,
            patience=settings.patience,
        )
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self.draining = False
        self.store = None if settings.data_dir is None else Store(Path(settings.data_dir))

    @property
    def default(self) -> str:
        """The model of a request that names none."""
        return self.settings.models[0]

    def loaded(self) -> dict[str, Worker]:
        """The models that are ready."""
        return self.models.loaded()

    def name(self, model: str | None) -> str:
        """As :meth:`Models.name`."""
        return self.models.name(model)

    def worker(self, model: str | None) -> Worker:
        """A model's worker; loads the model where that has not been done."""
        return self.models.get(model)

    def start(self) -> None:
        """Load what is to be there from the start."""
        for name in self._first:
            self.worker(name)

    @property
    def ready(self) -> bool:
        """Whether requests are taken, and the models of the start have been loaded. One that was
        unloaded for memory's sake was."""
        return not self.draining and self.models.seen >= set(self._first)

    @property
    def _first(self) -> tuple[str, ...]:
        return self.settings.models if self.settings.load == "start" else (self.default,)

    @property
    def healthy(self) -> bool:
        """Whether every model's thread lives."""
        return all(worker.alive for worker in self.loaded().values())

    def _load(self, name: str) -> Generator:
        s = self.settings
        given = {
            "device": s.device,
            "dtype": s.dtype,
            "plan": s.plan,
            "safety_checker": s.safety_checker,
            "lora_dir": list(s.lora_dir) or None,
            "embedding_dir": list(s.embedding_dir) or None,
        }
        options = {key: value for key, value in given.items() if value is not None}
        generator = self._loader(name, **options)
        if s.measure:
            tuning.tune(generator, name)
        return generator

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
        restored: bool = False,
    ) -> Job:
        """Check requests against the limits and the model, and queue them as one job.

        May load the model, which takes a while: not for an event loop's thread.

        Args:
            timeout: seconds after which nobody wants it any more, where it still waits.
            format: of the pictures' files.
            on_accept: called before the job is queued; may change it, or refuse it by raising.
            restored: it was accepted before a restart: the queue's limit does not hold for it.

        Raises:
            InvalidRequest, ModelNotFound, Forbidden: before anything is queued.
            Busy, Draining: it cannot be taken now.
        """
        if self.draining:
            raise Draining("the server is shutting down.")
        name, asked, asker = self.name(model), visit(), visit().asker
        if asker is not None:
            asker.may_use(name)
        if self.settings.fast is not None and not restored:
            named = {"fast": self.settings.fast}
            requests = [r if r.fast is not None else r.replace(**named) for r in requests]
        for request in requests:
            within(self.settings, request)
        with self.models.using(name) as worker:
            resolved = [request.resolved(worker.generator.model.spec) for request in requests]
            for request in resolved:
                within(self.settings, request)
            # What the model cannot do is known before it waits.
            worker.generator.stream(request=list(resolved))
            deadline = None if timeout is None else time.monotonic() + timeout
            job = Job(name, resolved, priority=priority, deadline=deadline, format=format)
            job.cost, job.origin = worker.cost(resolved), asked.id
            if asker is not None:
                job.standing, job.asker = asker.rule.priority, asker.name
            self._accept(job, worker, on_accept, restored)
        return job

    def _accept(
        self,
        job: Job,
        worker: Worker,
        on_accept: Callable[[Job], None] | None,
        restored: bool,
    ) -> None:
        asker = visit().asker
        if asker is not None:
            asker.charge(job.cost, self._waiting(asker.name))
            job.listen(functools.partial(_refund, asker))
        try:
            if on_accept is not None:
                on_accept(job)  # may give it the id it had before a restart
            self._remember(job)
            worker.submit(job, limited=not restored)
        except Exception:
            self.forget(job.id)
            if asker is not None:
                asker.refund(job.cost)
            raise

    def _waiting(self, asker: str) -> int:
        return sum(not job.status.final for job in self.jobs() if job.asker == asker)

    def job(self, name: str) -> Job | None:
        """A job that is still remembered."""
        with self._lock:
            return self._jobs.get(name)

    def jobs(self) -> list[Job]:
        """All that are remembered, oldest first; with keys, those of whoever asks."""
        asker = visit().asker
        with self._lock:
            jobs = list(self._jobs.values())
        return [job for job in jobs if asker is None or job.asker == asker.name]

    def position(self, job: Job) -> int | None:
        """Jobs before it."""
        worker = self.loaded().get(job.model)
        return None if worker is None else worker.position(job)

    def eta(self, job: Job) -> float | None:
        """Seconds until it is likely to be done."""
        worker = self.loaded().get(job.model)
        return None if worker is None else worker.eta(job)

    def forget(self, name: str) -> None:
        """Drop a job and its pictures."""
        with self._lock:
            self._jobs.pop(name, None)

    def _remember(self, job: Job) -> None:
        """Take a job in; old ones go, and the oldest where there are too many or too large."""
        old = time.time() - self.settings.keep_seconds
        with self._lock:
            self._jobs[job.id] = job
            done = [each for each in self._jobs.values() if each.status.final]
            many = len(self._jobs) - self.settings.keep_jobs
            size = sum(map(_bytes, done)) - self.settings.keep_bytes
            for place, each in enumerate(done):
                if (each.completed or 0) < old or place < many or size > 0:
                    size -= _bytes(each)
                    del self._jobs[each.id]

    def close(self) -> None:
        """Finish what was accepted, as long as the settings allow, and stop."""
        self.draining = True
        self.models.close(self.settings.drain_seconds)
        if self.store is not None:
            self.store.close()


def _refund(asker: Asker, job: Job) -> None:
    """What was charged for, and not done."""
    if job.status.final:
        asker.refund(job.cost * (1 - (job.progress.done if job.progress else 0.0)))


def _bytes(job: Job) -> int:
    """What a job's pictures take in memory."""
    return sum(_pixels(result) * 3 for result in job.results)


def _pixels(result: ImageResult) -> int:
    return 0 if result.image is None else result.image.width * result.image.height
