"""The engine: live pictures, and one UNet call a tick for all of one shape.

The only loop that denoises. Every live picture is a solver generator that has asked a question;
a tick groups the questions by shape, answers each group with one network call, combines each
picture's branches, and sends every solver its answer. Different prompts, seeds, step counts,
guidance scales and solvers share calls; a new picture joins at the next tick.

The engine has no thread of its own: whoever waits for a picture makes the ticks, for everyone's
pictures. A second thread that computes costs more than the hop: PyTorch's OpenMP keeps a team of
workers for each, and once teams outnumber the cores they sleep between operations instead of
spinning, which doubled the time of a small network's step.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.conditioning import Conditioning
from safelight.diffusion import guidance
from safelight.diffusion.solvers import Ask, Solver
from safelight.errors import Cancelled, SafelightError
from safelight.runtime import Prepared, Row, Saving
from safelight.runtime.caching import Memory, Use

if TYPE_CHECKING:
    from safelight.model import Model

log = logging.getLogger(__name__)

_PATIENCE = 0.02  # seconds between looks at whether the thread that made the ticks has left


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
    """Guidance rescale, towards the spread of ``unguided``."""
    unguided: guidance.Program | None = None
    """What ``program`` would be at a guidance scale of 1; None: branch 1 alone."""
    on_step: Callable[[Progress], None] | None = None
    """Called after every step, on whatever thread made it; must be quick."""
    alone: bool = False
    """Never share a network call with another picture (deterministic mode)."""
    model: Model | None = None
    """Whose UNet answers; None for the engine's. One with adapters has a UNet of its own."""
    unwanted: Callable[[], bool] | None = None
    """Asked before every tick, whoever makes it: whether to cancel."""
    saving: Saving | None = None
    """What its network calls leave out, by what they remember; None: nothing."""

    _ask: Ask | None = field(default=None, init=False)
    _cancelled: bool = field(default=False, init=False)
    _latents: Tensor | None = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)
    _done: threading.Event = field(default_factory=threading.Event, init=False)
    _engine: Engine | None = field(default=None, init=False)
    _memories: dict[int, Memory] = field(default_factory=dict, init=False)

    def cancel(self) -> None:
        """Stop before the next network call. Safe from any thread, any number of times."""
        self._cancelled = True

    @property
    def done(self) -> bool:
        """Finished, cancelled or failed."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Work on it, or wait for the thread that does, until done; says whether it is.

        Args:
            timeout: seconds after which no further tick is begun.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not self.done:
            left = _PATIENCE if end is None else min(_PATIENCE, end - time.monotonic())
            if left <= 0:
                return False
            if self._engine is None or not self._engine.advance():
                self._done.wait(left)
        return True

    def result(self) -> Tensor:
        """The final latents ``(1, C, h, w)``.

        Raises:
            Cancelled: :meth:`cancel` came first.
            NonFinite: the network's answer was not a number.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        assert self._latents is not None
        return self._latents

    def _end(self, *, latents: Tensor | None = None, error: BaseException | None = None) -> None:
        self._latents, self._error = latents, error
        self._memories.clear()
        self.solver.close()
        self._done.set()


@dataclass(frozen=True)
class _Mix:
    """What a picture asks about at a step, and how its answers add up."""

    branches: tuple[int, ...]
    guided: list[float]
    unguided: list[float]
    """For the rescale; the same where there is none."""

    @classmethod
    def of(cls, picture: Picture, ask: Ask) -> _Mix:
        step = guidance.Step(ask.index, ask.total, ask.timestep, ask.sigma)
        guided = dict(picture.program(step))
        if not picture.rescale:
            return cls(tuple(guided), [*guided.values()], [*guided.values()])
        unguided = dict((picture.unguided or guidance.plain())(step))
        # Weights that cancel leave branches out, of either.
        branches = tuple({**guided, **unguided})
        weights = ([side.get(b, 0.0) for b in branches] for side in (guided, unguided))
        return cls(branches, *weights)


@dataclass(eq=False)
class _Row:
    """One branch of one picture in a network call."""

    picture: Picture
    ask: Ask
    conditioning: Conditioning
    use: Use | None = None


class Engine:
    """Owns the model's UNet while pictures are live. Safe to call from many threads.

    Args:
        model: shared, never changed.
        max_rows: most branches in one network call.
    """

    def __init__(self, model: Model, *, max_rows: int = 32) -> None:
        self.model, self.max_rows = model, max_rows
        self.max_cells: int | None = None
        """Most latent cells in one network call, where the device has been measured; one branch
        goes in any case."""
        self._lock, self._baton = threading.Lock(), threading.Lock()
        self._waiting: list[Picture] = []
        self._live: list[Picture] = []
        """Whose, together with the ticks, the baton's holder is."""
        self.ticks, self.calls, self.work, self.rows = 0, 0, 0, 0
        """Ticks, network calls, latent cells times branches and branches in them, so far."""
        self.seconds = 0.0
        """How long the last tick took."""
        self.on_tick: Callable[[float, int, int, int], object] | None = None
        """Told after every tick: its seconds, pictures, rows and network calls."""
        self._ended = self._looked = 0.0

    def submit(self, pictures: Sequence[Picture]) -> None:
        """Add pictures; they join at the next tick, which whoever waits for one makes."""
        for picture in pictures:
            picture._engine = self
        with self._lock:
            self._waiting.extend(pictures)

    def run(self, pictures: Sequence[Picture]) -> None:
        """Submit and work until all are done. An interrupt cancels them, and is raised again."""
        self.submit(pictures)
        try:
            for picture in pictures:
                picture.wait()
        except BaseException:
            self.abandon(pictures)
            raise

    def advance(self) -> bool:
        """Make one tick, on this thread, for all live pictures.

        Returns:
            False where there was nothing to do, or another thread is at it.
        """
        if not self._baton.acquire(blocking=False):
            return False
        try:
            live = self._joined()
            if live:
                began, rows, calls = time.perf_counter(), self.rows, self.calls
                self._tick(live)
                self._ended = time.perf_counter()
                self.seconds = self._ended - began
                if self.on_tick is not None:
                    self.on_tick(self.seconds, len(live), self.rows - rows, self.calls - calls)
            return bool(live)
        except Exception as error:
            log.exception("the engine stopped")
            for picture in self._live:
                if not picture.done:
                    picture._end(error=error)
            return True
        finally:
            self._live = [p for p in self._live if not p.done]
            self._baton.release()

    def interleave(self) -> bool:
        """Between pieces of other work on this thread (decoding): make a tick once that work, with
        a next piece like the last, would go on for longer than a tick takes. So it delays a step
        by one step's time at most, or by one piece where a piece is longer.

        Returns:
            whether a tick was made.
        """
        now = time.perf_counter()
        piece, self._looked = now - max(self._looked, self._ended), now
        if now - self._ended + piece <= self.seconds:
            return False
        return self.advance()

    def abandon(self, pictures: Sequence[Picture]) -> None:
        """Cancel, and forget at once unless a thread is at work, which then does it."""
        for picture in pictures:
            picture.cancel()
        if self._baton.acquire(blocking=False):
            try:
                self._joined()
            finally:
                self._live = [p for p in self._live if not p.done]
                self._baton.release()

    # -- with the baton ------------------------------------------------------------------------

    def _joined(self) -> list[Picture]:
        """The live pictures that have asked something, with those that have just arrived."""
        with self._lock:
            self._live += self._waiting
            self._waiting = []
        for picture in self._live:
            if picture.unwanted is not None and not picture.done and picture.unwanted():
                picture._cancelled = True
            if picture._cancelled and not picture.done:
                picture._end(error=Cancelled("cancelled"))
            elif picture._ask is None and not picture.done:
                self._begin(picture)
        return [p for p in self._live if not p.done]

    def _begin(self, picture: Picture) -> None:
        with _solving(picture):
            picture._ask = next(picture.solver)

    @torch.inference_mode()
    def _tick(self, live: list[Picture]) -> None:
        """Answer every live picture's question once."""
        groups: defaultdict[object, list[_Row]] = defaultdict(list)
        mixes: dict[int, _Mix] = {}
        for picture in live:
            ask = picture._ask
            assert ask is not None
            mix = mixes[id(picture)] = _Mix.of(picture, ask)
            uses: Sequence[Use | None] = [None] * len(mix.branches)
            if picture.saving is not None:
                uses = picture.saving.uses(picture._memories, mix.branches, ask.index, ask.total)
            for branch, use in zip(mix.branches, uses, strict=True):
                conditioning = picture.branches[branch]
                shape = (tuple(ask.x.shape), conditioning.shape, id(self._runtime(picture)))
                kind = None if use is None else use.kind
                key = (shape, kind, id(picture) if picture.alone else None)
                groups[key].append(_Row(picture, ask, conditioning, use))
        answers: defaultdict[int, list[Tensor]] = defaultdict(list)
        for rows in groups.values():
            size = self._size(rows[0])
            for start in range(0, len(rows), size):
                self._ask(rows[start : start + size], answers)
        self.ticks += 1  # before answers: the last one wakes whoever waits, and may ask
        for picture in live:
            if not picture.done:
                self._answer(picture, answers[id(picture)], mixes[id(picture)])

    def _size(self, row: _Row) -> int:
        if self.max_cells is None:
            return self.max_rows
        cells = row.ask.x.shape[-1] * row.ask.x.shape[-2]
        return max(1, min(self.max_rows, self.max_cells // cells))

    def _ask(self, rows: list[_Row], answers: defaultdict[int, list[Tensor]]) -> None:
        """One network call. Where it fails, one a picture: one's failure is not the others'."""
        owners = {id(row.picture): row.picture for row in rows}
        try:
            predictions = self._call(rows)
        except Exception as error:
            # With too little memory every picture starts again with less, see safelight.generate.
            if len(owners) == 1 or isinstance(error, MemoryError | torch.OutOfMemoryError):
                for picture in owners.values():
                    if not picture.done:
                        picture._end(error=error)
                return
            log.warning("a call of %d pictures failed; each alone", len(owners), exc_info=True)
        else:
            for row, prediction in zip(rows, predictions.split(1), strict=True):
                answers[id(row.picture)].append(prediction)
            return
        for name in owners:
            self._ask([row for row in rows if id(row.picture) == name], answers)

    def _call(self, rows: list[_Row]) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(rows)
        self.work += sum(row.ask.x.shape[-1] * row.ask.x.shape[-2] for row in rows)
        asked = [Row(row.ask.x, row.ask.timestep, row.conditioning, row.use) for row in rows]
        return self._runtime(rows[0].picture).predict(asked)

    def _runtime(self, picture: Picture) -> Prepared:
        return (picture.model or self.model).runtime

    def _answer(self, picture: Picture, predictions: list[Tensor], mix: _Mix) -> None:
        ask = picture._ask
        assert ask is not None
        with _solving(picture):
            guided = guidance.combine(predictions, mix.guided)
            if mix.unguided != mix.guided:
                plain = guidance.combine(predictions, mix.unguided)
                guided = guidance.rescaled(guided, plain, picture.rescale)
            if not bool(torch.isfinite(guided).all()):
                raise NonFinite(f"the network answered NaN at step {ask.index + 1} of {ask.total}")
            if picture.on_step is not None:
                picture.on_step(
                    Progress(ask.index, ask.total, ask.sigma, lambda: ask.denoised(guided))
                )
            picture._ask = picture.solver.send(guided)


@contextlib.contextmanager
def _solving(picture: Picture) -> Iterator[None]:
    """The solver's end, or its failure, is the picture's."""
    try:
        yield
    except StopIteration as stop:
        picture._end(latents=stop.value)
    except Exception as error:
        picture._end(error=error)
    except BaseException:  # an interrupt: this solver cannot go on, everything else can
        picture._end(error=Cancelled("interrupted"))
        raise
