"""The thread that owns a model's networks.

Every running request is a stream of :meth:`Generator.stream <safelight.generate.Generator.stream>`.
They take turns on this one thread: the first that has nothing to tell makes a tick, which answers
*all* live pictures, so requests of different prompts, steps, solvers and guidance share network
calls, and one that comes in joins at the next tick. Decoding goes on in pieces between ticks:
what is live waits for a step's time at most (:meth:`Engine.interleave
<safelight.engine.Engine.interleave>`). Models of one server go round (:mod:`.turns`).

Nothing that a job does ends this thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from safelight.errors import SafelightError
from safelight.generate import Event, Generator, Preview
from safelight.request import GenerateRequest, ImageResult
from safelight.serve.jobs import Busy, Draining, Job, Late
from safelight.serve.line import Line
from safelight.serve.turns import Turns

log = logging.getLogger(__name__)
T = TypeVar("T")

_KEPT = 0.98  # of what has been learnt before, at every step


@dataclass
class Meter:
    """Seconds of the device that a unit of work takes, learnt from what has run.

    A unit is one branch of one picture for one network call, a latent cell. Decoding counts too.
    """

    per_unit: float
    _units: float = 0.0
    _seconds: float = 0.0

    def learn(self, units: float, seconds: float) -> None:
        """Take in what ``units`` took; newer counts more."""
        self._seconds = _KEPT * self._seconds + seconds
        self._units = _KEPT * self._units + units
        if self._units > 0 and self._seconds > 0:
            self.per_unit = self._seconds / self._units


class Watch:
    """Who is told what a worker does, on its thread; must be quick. This one listens to nothing."""

    def began(self, job: Job) -> None:
        """Its wait has ended."""

    def stepped(self, model: str, seconds: float, pictures: int, rows: int, calls: int) -> None:
        """A tick: what it took, for how many pictures, in how many network calls."""

    def previewed(self, job: Job) -> None:
        """There is something to see for the first time."""

    def ended(self, job: Job) -> None:
        """It is final."""


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
        live: most pictures that share the networks; others wait. None: as many as fill a call of
            the size that the device does best, and 8 at least.
        limit: seconds of work that may wait.
        patience: seconds after which a job that waits is overtaken by nothing that came later.
        turns: shared by the models of one device.
        watch: who is told.
        name: of the model, for whoever is told.
    """

    generator: Generator

    def __init__(
        self,
        generator: Generator | Callable[[], Generator],
        *,
        live: int | None = 8,
        limit: float = 600.0,
        patience: float = 60.0,
        turns: Turns | None = None,
        watch: Watch | None = None,
        name: str = "",
    ) -> None:
        self._room, self.limit, self.name = live, limit, name
        self.meter, self.watch = Meter(2e-6), watch or Watch()
        self.used = time.monotonic()
        """When it last had something to do."""
        self._turns = turns or Turns()
        self._condition = threading.Condition()
        self._line: Line[Job] = Line(patience)
        self._running: deque[_Running] = deque()
        self._ending = 0
        self._owed = 0.0
        self._draining = self._stopped = False
        self._failure: Exception | None = None
        self._ready = threading.Event()
        # Pictures are encoded and stored beside the networks' thread, not on it.
        self._keeper = ThreadPoolExecutor(1, "safelight-keeper")
        self._thread = threading.Thread(
            target=self._work, args=(generator,), name="safelight-worker", daemon=True
        )
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._keeper.shutdown()
            raise self._failure

    # -- any thread ----------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """Most pictures that share the networks."""
        spec, measured = self.generator.model.spec, self.generator.batch_cells or 0
        return self._room or max(8, measured * spec.vae.factor**2 // spec.native_size**2)

    @property
    def alive(self) -> bool:
        """Whether its thread runs, as it should until it is closed."""
        return self._thread.is_alive() or self._stopped

    @property
    def idle(self) -> bool:
        """Nothing waits, runs, or is being stored."""
        with self._condition:
            return not self._line and not self._running and not self._ending

    def cost(self, requests: list[GenerateRequest]) -> float:
        """Seconds that requests are expected to take alone."""
        factor = self.generator.model.spec.vae.factor
        return self.meter.per_unit * sum(units(request, factor) for request in requests)

    @property
    def backlog(self) -> float:
        """Seconds of work that waits or runs."""
        with self._condition:
            order = self._line.order(time.monotonic())
            waiting = sum(job.cost for job in order if not job.cancel_token.is_set)
            running = sum(
                each.job.cost * (1 - (each.job.progress.done if each.job.progress else 0.0))
                for each in self._running
            )
        return waiting + running

    @property
    def depth(self) -> tuple[int, int]:
        """Jobs that wait, and jobs that run."""
        with self._condition:
            return len(self._line), len(self._running)

    def submit(self, job: Job, *, limited: bool = True) -> None:
        """Queue a job.

        Args:
            limited: whether the limit holds for it.

        Raises:
            Busy: more work waits than the limit, or than its deadline leaves time for; an empty
                worker takes any job.
            Draining: it is shutting down.
        """
        job.cost = job.cost or self.cost(list(job.requests))
        waiting, now = self.backlog, time.monotonic()
        room = self.limit if job.deadline is None else min(self.limit, job.deadline - now)
        with self._condition:
            if self._draining:
                raise Draining("the server is shutting down.")
            if limited and waiting and waiting + job.cost > room and not job.late:
                raise Busy(waiting + job.cost - room)
            self.used = now
            self._line.push(
                job,
                now=now,
                count=job.count,
                cost=job.cost,
                rank=(job.standing, job.priority),
                asker=job.asker,
            )
            self._condition.notify()

    def position(self, job: Job) -> int | None:
        """Jobs before it in the queue; None where it does not wait."""
        with self._condition:
            order = self._line.order(time.monotonic())
        return order.index(job) if job in order else None

    def eta(self, job: Job) -> float | None:
        """Seconds until it is likely to be done; None where it is."""
        if job.status.final:
            return None
        if job.progress is not None:
            return job.progress.eta
        with self._condition:
            order = self._line.order(time.monotonic())
            place = order.index(job) if job in order else 0
            ahead = sum(each.cost for each in order[:place])
            ahead += sum(each.job.progress.eta for each in self._running if each.job.progress)
        return ahead + job.cost

    def refuse(self) -> None:
        """Take no more."""
        with self._condition:
            self._draining = True
            self._condition.notify()

    def close(self, *, drain: float = 0.0) -> None:
        """Take no more; finish what was accepted within ``drain`` seconds, then cancel. A job that
        is kept on disk stays there as it was: it runs when the server starts again."""
        self.refuse()
        end = time.monotonic() + drain
        while any(self.depth) and time.monotonic() < end:
            time.sleep(0.02)
        with self._condition:
            self._stopped = True
            left = [*self._line.order(time.monotonic()), *(each.job for each in self._running)]
            for job in left:
                if not job.cancel_token.is_set:
                    job.keep = None
                    job.cancel()
            self._condition.notify()
        self._thread.join(30)
        self._keeper.shutdown()

    # -- the worker's thread -------------------------------------------------------------------

    def _work(self, generator: Generator | Callable[[], Generator]) -> None:
        try:
            made = generator if isinstance(generator, Generator) else generator()
            made.breathe, made.engine.on_tick = self._breathe, self._ticked
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
                while not self._line and not self._running:
                    if self._stopped:
                        return
                    self._condition.wait()
                waiting = self._admitted()
            try:
                for job in waiting:
                    self._begin(job)
                if self._running:
                    with self._turns.turn():
                        self._round()
            except Exception as error:  # a fault of this file's: it must not end the thread
                self._recover([*waiting, *(each.job for each in self._running)], error)

    def _recover(self, jobs: list[Job], error: Exception) -> None:
        log.exception("the worker failed; so do %d jobs", len(jobs))
        with self._condition:
            self._running.clear()
        for job in jobs:
            if not job.status.final:
                job.keep = None  # whatever it was: what is on disk runs again after a restart
                job.end(error)

    def _admitted(self) -> list[Job]:
        """Those whose turn it is, as far as there is room; and those that nobody wants any more,
        wherever they stand. Called with the lock."""
        gone = self._line.drop(lambda job: job.cancel_token.is_set or job.late)
        live = sum(running.job.count for running in self._running)
        return gone + self._line.take(live, self.live, time.monotonic())

    def _begin(self, job: Job) -> None:
        if job.cancel_token.is_set or job.late:
            late = Late("its deadline passed in the queue.")
            self._end(job, None if job.cancel_token.is_set else late)
            return
        job.begin()
        self.watch.began(job)
        try:
            events = self.generator.stream(request=list(job.requests), cancel=job.cancel_token)
        except Exception as error:
            self._fail(job, error)
            return
        with self._condition:
            self._running.append(_Running(job, iter(events)))

    def _round(self) -> None:
        """Let the running ones tell one thing each, until one of them has computed."""
        for _ in range(len(self._running)):
            before = self.generator.engine.work
            event = self._turn(self._running[0])
            if isinstance(event, ImageResult):
                self._computed(self.generator.engine.advance)
            if self.generator.engine.work > before:
                return

    def _turn(self, running: _Running) -> Event | None:
        """Let the first in the row tell one thing, and put it behind the others."""
        job, event = running.job, None
        try:
            event = self._computed(lambda: next(running.events, None))
        except Exception as error:
            self._fail(job, error)
        else:
            if event is None:
                self._end(job)
            else:
                first = job.preview is None and isinstance(event, Preview)
                job.hear(event)
                if first:
                    self.watch.previewed(job)
        with self._condition:
            self._running.popleft()
            if event is not None:
                self._running.append(running)
            self.used = time.monotonic()
        return event

    def _computed(self, action: Callable[[], T]) -> T:
        """What ``action`` gives; what it took is learnt from."""
        engine, began = self.generator.engine, time.perf_counter()
        before = engine.work
        try:
            return action()
        finally:
            self._owed += time.perf_counter() - began
            if engine.work > before:
                self.meter.learn(engine.work - before, self._owed)
                self._owed = 0.0

    def _breathe(self) -> None:
        """Between pieces of a decoding: other models' turn, then this one's other pictures."""
        self._turns.pass_on()
        self.generator.engine.interleave()

    def _ticked(self, seconds: float, pictures: int, rows: int, calls: int) -> None:
        self.watch.stepped(self.name, seconds, pictures, rows, calls)

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, SafelightError):
            log.exception("job %s failed", job.id)
        self._end(job, error)

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """Final: beside this thread where it has to be stored first."""
        if job.keep is None:
            self._final(job, error)
            return
        with self._condition:
            self._ending += 1
        self._keeper.submit(self._stored, job, error)

    def _stored(self, job: Job, error: Exception | None) -> None:
        try:
            self._final(job, error)
        finally:
            with self._condition:
                self._ending -= 1

    def _final(self, job: Job, error: Exception | None) -> None:
        job.end(error)
        self.watch.ended(job)
