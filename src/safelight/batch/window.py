"""A rolling window over the engine: as one picture ends, the next one joins.

Every picture is a stream of its own on one generator, so all that are live share network calls,
whatever rows they are of, and the engine is as full at the end of a long row as at its beginning.
Pictures of one shape go together as far as a bounded look ahead allows, because only those share
calls; whoever has been passed over for long enough is next, whatever its shape.
"""

from __future__ import annotations

import functools
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from safelight import provenance
from safelight.batch.rows import told
from safelight.errors import SafelightError
from safelight.generate import Cancel, Event, Generator
from safelight.generate.generator import micro_batch
from safelight.request import GenerateRequest, ImageResult, Outcome

LOOK_AHEAD = 64
"""Pictures that are known beyond those that are live."""
_PATIENCE = LOOK_AHEAD // 2
"""How often a picture is passed over for others of the live shape."""


@dataclass(frozen=True)
class Task:
    """A row to make.

    Args:
        have: the pictures of it that are made already.
    """

    row: int
    request: GenerateRequest
    have: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Made:
    """A picture, or why there is none.

    Args:
        index: its place in the row; None where the row itself failed.
        data: the file's bytes, or what makes them (not on the engine's thread).
        request: the row's, resolved, as canonical JSON.
        model: the digest of the weights.
        error: as the manifest has it.
        started, ended: seconds of the clock, when it joined and left.
    """

    row: int
    index: int | None
    outcome: str = Outcome.error
    seed: int | None = None
    data: bytes | Callable[[], bytes] | None = None
    message: str = ""
    notices: tuple[str, ...] = ()
    nsfw: bool | None = None
    request: Mapping[str, Any] | None = None
    model: str | None = None
    error: Mapping[str, str] | None = None
    started: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True)
class Saving:
    """How pictures become files."""

    format: str = "PNG"
    metadata: bool = True


@dataclass(eq=False)
class _Unit:
    task: Task
    index: int
    request: GenerateRequest
    """The picture's own."""
    told: Mapping[str, Any]
    most: int
    """Pictures of its size that share a call."""
    key: tuple[Any, ...] = field(init=False)
    events: Iterator[Event] | None = None
    started: float = 0.0

    def __post_init__(self) -> None:
        r = self.request
        self.key = (r.width, r.height, r.loras, r.embeddings)


class Window:
    """Makes rows on one generator.

    Args:
        live: most pictures that share the networks; None chooses by their size.
    """

    def __init__(
        self, generator: Generator, saving: Saving | None = None, *, live: int | None = None
    ) -> None:
        self.generator, self.saving, self.live = generator, saving or Saving(), live
        self._pool: deque[_Unit] = deque()
        self._running: deque[_Unit] = deque()
        self._bad: set[int] = set()
        self._passed = 0

    def make(self, tasks: Iterable[Task], cancel: Cancel | None = None) -> Iterator[Made]:
        """Pictures as they are finished. Cancelled, it ends within a step; what was not finished
        is not told."""
        cancel = cancel or Cancel()
        source = iter(tasks)
        try:
            more = True
            while True:
                while more and len(self._pool) < LOOK_AHEAD and not cancel.is_set:
                    task = next(source, None)
                    more = task is not None
                    if task is not None:
                        yield from self._expect(task)
                if cancel.is_set:
                    self._pool.clear()
                while self._pool and (unit := self._next()) is not None:
                    yield from self._begin(unit, cancel)
                if self._running:
                    yield from self._turn()
                elif not self._pool and (cancel.is_set or not more):
                    return
        finally:
            for unit in self._running:
                close = getattr(unit.events, "close", None)
                if close is not None:
                    close()
            self._running.clear()
            self._pool.clear()

    def _expect(self, task: Task) -> Iterator[Made]:
        """Put a row's pictures into the pool."""
        model = self.generator.model
        try:
            resolved = task.request.resolved(model.spec)
        except SafelightError as error:
            yield Made(task.row, None, error=told(error), message=str(error))
            return
        record = json.loads(self.generator.adapters.public(resolved).canonical())
        most = self.live or micro_batch(model, [resolved])
        self._pool.extend(
            _Unit(task, index, resolved.picture(index), record, most)
            for index in range(resolved.count)
            if index not in task.have
        )

    def _next(self) -> _Unit | None:
        """The picture that joins now; None where there is no room."""
        if not self._running:
            self._passed = 0
            return self._pool.popleft()
        place = 0
        if self._passed < _PATIENCE:
            key = self._running[-1].key
            place = next((k for k, unit in enumerate(self._pool) if unit.key == key), 0)
        unit = self._pool[place]
        room = min(unit.most, *(other.most for other in self._running))
        if len(self._running) >= room:
            return None
        self._passed = self._passed + 1 if place else 0
        del self._pool[place]
        return unit

    def _begin(self, unit: _Unit, cancel: Cancel) -> Iterator[Made]:
        row = unit.task.row
        if row in self._bad:
            return
        unit.started = time.time()
        try:
            unit.events = self.generator.stream(request=unit.request, cancel=cancel)
        except Exception as error:  # the model cannot do it: the row's fault, nobody else's
            self._bad.add(row)
            yield Made(row, None, error=told(error), message=str(error), request=unit.told)
            return
        self._running.append(unit)

    def _turn(self) -> Iterator[Made]:
        """Let the first in the row tell one thing, and put it behind the others."""
        unit = self._running.popleft()
        assert unit.events is not None
        try:
            event = next(unit.events, None)
        except Exception as error:
            yield self._failed(unit, error)
            return
        if isinstance(event, ImageResult):
            if event.outcome is not Outcome.cancelled:
                yield self._made(unit, event)
            self.generator.engine.advance()  # the others wait for one decoding at most
        elif event is not None:
            self._running.append(unit)

    def _failed(self, unit: _Unit, error: Exception) -> Made:
        return Made(
            unit.task.row,
            unit.index,
            seed=unit.request.seed,
            message=f"{type(error).__name__}: {error}",
            request=unit.told,
            error=told(error),
            started=unit.started,
            ended=time.time(),
        )

    def _made(self, unit: _Unit, result: ImageResult) -> Made:
        data = None
        if result.image is not None:
            data = functools.partial(
                provenance.encode, result, self.saving.format, metadata=self.saving.metadata
            )
        return Made(
            unit.task.row,
            unit.index,
            str(result.outcome),
            result.seed,
            data,
            result.message,
            result.notices,
            result.nsfw,
            unit.told,
            self.generator.model.digest,
            started=unit.started,
            ended=time.time(),
        )
