"""The thread that owns a model's networks.

Every running request is a stream of :meth:`Generator.stream <safelight.generate.Generator.stream>`.
They take turns on this one thread: the first that has nothing to tell makes a tick, which answers
*all* live pictures, so requests of different prompts, steps, solvers and guidance share network
calls, and one that comes in joins at the next tick. After a picture is decoded a tick comes before
the next decoding: what is live waits for one decoding at most.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from safelight.errors import SafelightError
from safelight.generate import Event, Generator
from safelight.request import GenerateRequest, ImageResult
from safelight.serve.jobs import Busy, Draining, Job, Late

log = logging.getLogger(__name__)


@dataclass
class Meter:
    """Seconds of the device that a unit of work takes, learnt from what has run.

    A unit is one branch of one picture for one network call, a latent cell.
    """

    per_unit: float
    _weight: float = 0.0

    def learn(self, units: float, seconds: float) -> None:
        """Take in what ``units`` took; newer counts more."""
        if units <= 0 or seconds <= 0:
            return
        share = 1.0 if self._weight == 0 else 0.2
        self.per_unit += share * (seconds / units - self.per_unit)
        self._weight = 1.0


def units(request: GenerateRequest, factor: int) -> float:
    """Work in a resolved request."""
    cells = (request.width or 0) * (request.height or 0) / factor**2
    branches = 1 if (request.guidance_scale or 0) <= 1 else 2
    twice = 2 if request.sampler in ("heun",) else 1
    return request.count * (request.steps or 0) * branches * twice * cells


@dataclass(eq=False)
class _Running:
    job: Job
    events: Iterator[Event]


class Worker:
    """Runs jobs on one model.

    Args:
        generator: or what loads it, which is then called on the worker's own thread: another
            thread that has computed keeps its team of OpenMP workers, and slows this one's down.
        live: most pictures that share the networks; others wait.
        limit: seconds of work that may wait.
    """

    generator: Generator

    def __init__(
        self,
        generator: Generator | Callable[[], Generator],
        *,
        live: int = 8,
        limit: float = 600.0,
    ) -> None:
        self.live, self.limit = live, limit
        self.meter = Meter(2e-6)
        self._condition = threading.Condition()
        self._queue: list[tuple[int, int, Job]] = []
        self._running: deque[_Running] = deque()
        self._draining = self._stopped = False
        self._failure: Exception | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(generator,), name="safelight-worker", daemon=True
        )
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    # -- any thread ----------------------------------------------------------------------------

    def cost(self, requests: list[GenerateRequest]) -> float:
        """Seconds that requests are expected to take alone."""
        factor = self.generator.model.spec.vae.factor
        return self.meter.per_unit * sum(units(request, factor) for request in requests)

    @property
    def backlog(self) -> float:
        """Seconds of work that waits or runs."""
        with self._condition:
            waiting = sum(job.cost for _, _, job in self._queue if not job.cancel_token.is_set)
            running = sum(
                each.job.cost * (1 - (each.job.progress.done if each.job.progress else 0.0))
                for each in self._running
            )
        return waiting + running

    @property
    def depth(self) -> tuple[int, int]:
        """Jobs that wait, and jobs that run."""
        with self._condition:
            return len(self._queue), len(self._running)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            Busy: more work waits than the limit; an empty worker takes any job.
            Draining: it is shutting down.
        """
        job.cost = self.cost(list(job.requests))
        waiting = self.backlog
        with self._condition:
            if self._draining:
                raise Draining("the server is shutting down.")
            if waiting and waiting + job.cost > self.limit:
                raise Busy(waiting + job.cost - self.limit)
            heapq.heappush(self._queue, (-job.priority, job.number, job))
            self._condition.notify()

    def position(self, job: Job) -> int | None:
        """Jobs before it in the queue; None where it does not wait."""
        with self._condition:
            order = sorted(self._queue)
        for place, (_, _, each) in enumerate(order):
            if each is job:
                return place
        return None

    def eta(self, job: Job) -> float | None:
        """Seconds until it is likely to be done; None where it is."""
        if job.status.final:
            return None
        if job.progress is not None:
            return job.progress.eta
        place = self.position(job)
        with self._condition:
            ahead = sum(each.cost for _, _, each in sorted(self._queue)[: place or 0])
            ahead += sum(each.job.progress.eta for each in self._running if each.job.progress)
        return ahead + job.cost

    def close(self, *, drain: float = 0.0) -> None:
        """Take no more; finish what was accepted within ``drain`` seconds, then cancel."""
        with self._condition:
            self._draining = True
            self._condition.notify()
        end = time.monotonic() + drain
        while any(self.depth) and time.monotonic() < end:
            time.sleep(0.02)
        with self._condition:
            self._stopped = True
            for _, _, job in self._queue:
                job.cancel()
            for running in self._running:
                running.job.cancel()
            self._condition.notify()
        self._thread.join(30)

    # -- the worker's thread -------------------------------------------------------------------

    def _work(self, generator: Generator | Callable[[], Generator]) -> None:
        try:
            made = generator if isinstance(generator, Generator) else generator()
            self.generator = made
        except Exception as error:
            self._failure = error
            return
        finally:
            self._ready.set()
        self._run()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._queue and not self._running:
                    if self._stopped:
                        return
                    self._condition.wait()
                waiting = self._admitted()
            for job in waiting:
                self._begin(job)
            if self._running:
                self._turn(self._running[0])

    def _admitted(self) -> list[Job]:
        """Those whose turn it is, as far as there is room; and those that nobody wants any more,
        wherever they stand. Called with the lock."""
        gone = [item for item in self._queue if item[2].cancel_token.is_set or item[2].late]
        if gone:
            self._queue = [item for item in self._queue if item not in gone]
            heapq.heapify(self._queue)
        taken = [job for _, _, job in gone]
        live = sum(running.job.count for running in self._running)
        while self._queue and (live == 0 or live + self._queue[0][2].count <= self.live):
            job = heapq.heappop(self._queue)[2]
            taken.append(job)
            live += job.count
        return taken

    def _begin(self, job: Job) -> None:
        if job.cancel_token.is_set or job.late:
            job.end(None if job.cancel_token.is_set else Late("its deadline passed in the queue."))
            return
        job.begin()
        try:
            events = self.generator.stream(request=list(job.requests), cancel=job.cancel_token)
        except Exception as error:
            self._fail(job, error)
            return
        with self._condition:
            self._running.append(_Running(job, iter(events)))

    def _turn(self, running: _Running) -> None:
        """Let the first in the row tell one thing, and put it behind the others."""
        job, engine = running.job, self.generator.engine
        began, before = time.perf_counter(), engine.work
        try:
            event = next(running.events, None)
        except Exception as error:
            event = None
            self._fail(job, error)
        else:
            if event is None:
                job.end()
            else:
                job.hear(event)
        with self._condition:
            self._running.popleft()
            if event is not None:
                self._running.append(running)
        if isinstance(event, ImageResult):
            engine.advance()
        elif engine.work > before:
            self.meter.learn(engine.work - before, time.perf_counter() - began)

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, SafelightError):
            log.exception("job %s failed", job.id)
        job.end(error)
