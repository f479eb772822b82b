"""The engine: live pictures, and one UNet call a tick for all of one shape.

The only loop that denoises. Every live picture is a solver generator that has asked a question;
a tick groups the questions by shape, answers each group with one network call, combines each
picture's branches, and sends every solver its answer. Different prompts, seeds, step counts,
guidance scales and solvers share calls; a new picture joins at the next tick.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.conditioning import Conditioning
from safelight.diffusion import guidance
from safelight.diffusion.solvers import Ask, Solver
from safelight.errors import Cancelled, SafelightError
from safelight.runtime import Prepared, Row

if TYPE_CHECKING:
    from safelight.model import Model

log = logging.getLogger(__name__)


class NonFinite(SafelightError):
    """The network's answer holds NaN or infinity."""


@dataclass(frozen=True)
class Progress:
    """One answered question of one picture."""

    index: int
    total: int
    sigma: float
    denoised: Callable[[], Tensor]
    """The picture so far: x0 latents ``(1, C, h, w)``, computed when called."""


@dataclass(eq=False)
class Picture:
    """One picture to denoise: a solver for latents ``(1, C, h, w)`` and its guidance."""

    solver: Solver
    branches: Sequence[Conditioning]
    """By :mod:`safelight.diffusion.guidance`'s custom 0 is unconditional, 1 the prompt."""
    program: guidance.Program
    rescale: float = 0.0
    """Guidance rescale, towards the spread of branch 1."""
    on_step: Callable[[Progress], None] | None = None
    """Called on the engine's thread after every step; must be quick."""
    alone: bool = False
    """Never share a network call with another picture (deterministic mode)."""
    model: Model | None = None
    """Whose UNet answers; None for the engine's. One with adapters has a UNet of its own."""

    _ask: Ask | None = field(default=None, init=False)
    _cancelled: bool = field(default=False, init=False)
    _latents: Tensor | None = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)
    _done: threading.Event = field(default_factory=threading.Event, init=False)

    def cancel(self) -> None:
        """Stop before the next network call. Safe from any thread, any number of times."""
        self._cancelled = True

    @property
    def done(self) -> bool:
        """Finished, cancelled or failed."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until done or until ``timeout`` seconds have passed; says which."""
        return self._done.wait(timeout)

    def result(self) -> Tensor:
        """The final latents ``(1, C, h, w)``.

        Raises:
            Cancelled: :meth:`cancel` came first.
            NonFinite: the network's answer was not a number.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        assert self._latents is not None
        return self._latents

    def _end(self, *, latents: Tensor | None = None, error: BaseException | None = None) -> None:
        self._latents, self._error = latents, error
        self.solver.close()
        self._done.set()


@dataclass(eq=False)
class _Row:
    """One branch of one picture in a network call."""

    picture: Picture
    ask: Ask
    conditioning: Conditioning


class Engine:
    """Owns the model's UNet while pictures are live. Safe to call from many threads.

    Args:
        model: shared, never changed.
        max_rows: most branches in one network call.
    """

    def __init__(self, model: Model, *, max_rows: int = 32) -> None:
        self.model, self.max_rows = model, max_rows
        self._lock = threading.Lock()
        self._waiting: list[Picture] = []
        self._running = False
        self.ticks, self.calls = 0, 0
        """Ticks and network calls so far, for tests and metrics."""

    def submit(self, pictures: Sequence[Picture]) -> None:
        """Add pictures; they join at the next tick. Their handles tell the rest."""
        with self._lock:
            self._waiting.extend(pictures)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="safelight-engine", daemon=True).start()

    def run(self, pictures: Sequence[Picture]) -> None:
        """Submit and wait for all. An interrupt cancels them, waits, and is raised again."""
        self.submit(pictures)
        try:
            for picture in pictures:
                # A wait without a timeout would not let Ctrl-C through on every platform.
                while not picture.wait(0.1):
                    pass
        except BaseException:
            for picture in pictures:
                picture.cancel()
            for picture in pictures:
                picture.wait()
            raise

    # -- the engine's thread -----------------------------------------------------------------

    def _run(self) -> None:
        live: list[Picture] = []
        try:
            while True:
                with self._lock:
                    arrived, self._waiting = self._waiting, []
                    if not arrived and not live:
                        self._running = False
                        return
                for picture in arrived:
                    self._begin(picture)
                live = [p for p in live + arrived if not p.done]
                self._tick(live)
                live = [p for p in live if not p.done]
        except BaseException as error:
            log.exception("the engine stopped")
            with self._lock:
                self._running = False
                stranded, self._waiting = live + self._waiting, []
            for picture in stranded:
                if not picture.done:
                    picture._end(error=error)

    def _begin(self, picture: Picture) -> None:
        try:
            picture._ask = next(picture.solver)
        except StopIteration as stop:
            picture._end(latents=stop.value)
        except Exception as error:
            picture._end(error=error)

    @torch.inference_mode()
    def _tick(self, live: list[Picture]) -> None:
        """Answer every live picture's question once."""
        groups: defaultdict[object, list[_Row]] = defaultdict(list)
        weights: dict[int, list[float]] = {}
        for picture in live:
            if picture._cancelled:
                picture._end(error=Cancelled("cancelled"))
                continue
            ask = picture._ask
            assert ask is not None
            step = guidance.Step(ask.index, ask.total, ask.timestep, ask.sigma)
            chosen = picture.program(step)
            weights[id(picture)] = [w for _, w in chosen]
            for branch, _ in chosen:
                conditioning = picture.branches[branch]
                shape = (tuple(ask.x.shape), conditioning.shape, id(self._runtime(picture)))
                key = (shape, id(picture)) if picture.alone else shape
                groups[key].append(_Row(picture, ask, conditioning))
        answers: defaultdict[int, list[Tensor]] = defaultdict(list)
        for rows in groups.values():
            for start in range(0, len(rows), self.max_rows):
                part = rows[start : start + self.max_rows]
                try:
                    predictions = self._call(part)
                except Exception as error:
                    for row in part:
                        if not row.picture.done:
                            row.picture._end(error=error)
                    continue
                for row, prediction in zip(part, predictions.split(1), strict=True):
                    answers[id(row.picture)].append(prediction)
        self.ticks += 1  # before answers: the last one wakes whoever waits, and may ask
        for picture in live:
            if not picture.done:
                self._answer(picture, answers[id(picture)], weights[id(picture)])

    def _call(self, rows: list[_Row]) -> Tensor:
        self.calls += 1
        asked = [Row(row.ask.x, row.ask.timestep, row.conditioning) for row in rows]
        return self._runtime(rows[0].picture).predict(asked)

    def _runtime(self, picture: Picture) -> Prepared:
        return (picture.model or self.model).runtime

    def _answer(self, picture: Picture, predictions: list[Tensor], weights: list[float]) -> None:
        ask = picture._ask
        assert ask is not None
        try:
            guided = guidance.combine(predictions, weights)
            if picture.rescale and len(predictions) > 1:
                guided = guidance.rescaled(guided, predictions[-1], picture.rescale)
            if not bool(torch.isfinite(guided).all()):
                raise NonFinite(f"the network answered NaN at step {ask.index + 1} of {ask.total}")
            if picture.on_step is not None:
                picture.on_step(
                    Progress(ask.index, ask.total, ask.sigma, lambda: ask.denoised(guided))
                )
            picture._ask = picture.solver.send(guided)
        except StopIteration as stop:
            picture._end(latents=stop.value)
        except Exception as error:
            picture._end(error=error)


def wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> bool:
    """Poll ``condition``; says whether it came true in time. For doors and tests."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return condition()
