"""A rolling window over the engine: as one picture ends, the next one joins.

Pictures are streams on one generator, so all that are live share network calls, whatever rows they
are of, and the engine is as full at the end of a row of many pictures as at its beginning.
Pictures of one shape go together as far as a bounded look ahead allows, because only those share
calls; whoever has been passed over for long enough is next, whatever its shape.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from safelight import provenance
from safelight.batch.rows import told
from safelight.errors import SafelightError
from safelight.generate import Cancel, Event, Generator, Progress
from safelight.generate.generator import micro_batch
from safelight.request import GenerateRequest, ImageResult, Outcome

log = logging.getLogger(__name__)

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
    """One picture."""

    task: Task
    index: int
    request: GenerateRequest
    """The picture's own."""
    told: Mapping[str, Any]
    share: int
    """Pictures of its size that share a call."""
    key: tuple[Any, ...] = field(init=False)
    started: float = 0.0

    def __post_init__(self) -> None:
        r = self.request
        # Adapters named in the prompt are known to nobody yet: such a picture begins alone.
        own = id(self) if "<lora:" in r.prompt else None
        self.key = (r.width, r.height, r.loras, r.embeddings, own)


@dataclass(eq=False)
class _Group:
    """Pictures that began together: one call of the generator."""

    units: list[_Unit]
    events: Iterator[Event]
    ending: set[int] = field(default_factory=set)
    """Those whose last step is done: they are told about next."""
    ended: set[int] = field(default_factory=set)
    begun: bool = False
    told: int = 0
    """Steps that are made and not told yet."""

    @property
    def left(self) -> int:
        """Pictures that are not finished."""
        return len(self.units) - len(self.ended)


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
        self._running: deque[_Group] = deque()
        self._bad: set[int] = set()
        self._passed = 0

    def make(self, tasks: Iterable[Task], cancel: Cancel | None = None) -> Iterator[Made]:
        """Pictures as they are finished. Cancelled, it ends within a step; what was not finished
        is not told."""
        cancel = cancel or Cancel()
        source, more = iter(tasks), True
        try:
            while True:
                while more and len(self._pool) < LOOK_AHEAD and not cancel.is_set:
                    task = next(source, None)
                    more = task is not None
                    if task is not None:
                        yield from self._expect(task)
                if cancel.is_set:
                    self._pool.clear()
                quiet = next((g for g in self._running if g.told or g.ending), None)
                if quiet is not None:  # has something to tell without another step
                    yield from self._turn(quiet)
                    continue
                yield from self._admit(cancel)
                if self._running:
                    yield from self._turn(self._running[0])
                elif not self._pool and (cancel.is_set or not more):
                    return
        finally:
            for group in self._running:
                group.events.close()  # type: ignore[attr-defined]  # it is a generator
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
        share = micro_batch(model, [resolved])
        self._pool.extend(
            _Unit(task, index, resolved.picture(index), record, share)
            for index in range(resolved.count)
            if index not in task.have
        )

    # -- joining -----------------------------------------------------------------------------

    def _admit(self, cancel: Cancel) -> Iterator[Made]:
        """Begin what there is room for. All that has ended has been told by now, so that those
        that ended together are followed by others together."""
        joining: list[_Unit] = []
        while self._pool and (unit := self._next(joining)) is not None:
            if unit.task.row not in self._bad:
                joining.append(unit)
        joining.sort(key=lambda unit: str(unit.key))
        for _, alike in itertools.groupby(joining, lambda unit: unit.key):
            units = list(alike)
            for start in range(0, len(units), units[0].share):
                yield from self._begin(units[start : start + units[0].share], cancel)

    def _next(self, joining: list[_Unit]) -> _Unit | None:
        """The picture that joins now; None where there is no room."""
        live = [*(unit for group in self._running for unit in group.units), *joining]
        count = sum(group.left for group in self._running) + len(joining)
        place = 0
        if live and self._passed < _PATIENCE:
            key = live[-1].key
            place = next((k for k, unit in enumerate(self._pool) if unit.key == key), 0)
        unit = self._pool[place]
        room = self.live or min([unit.share, *(other.share for other in live)])
        if count >= room and count:
            return None
        self._passed = self._passed + 1 if place else 0
        del self._pool[place]
        return unit

    def _begin(self, units: list[_Unit], cancel: Cancel) -> Iterator[Made]:
        for unit in units:
            unit.started = time.time()
        try:
            asked = [unit.request for unit in units]
            events = self.generator.stream(request=asked, cancel=cancel)
        except Exception as error:  # the model cannot do it: one row's fault, nobody else's
            if len(units) > 1:
                for unit in units:
                    if unit.task.row not in self._bad:
                        yield from self._begin([unit], cancel)
                return
            (unit,) = units
            self._bad.add(unit.task.row)
            problem = told(error)
            yield Made(unit.task.row, None, error=problem, message=str(error), request=unit.told)
            return
        self._running.appendleft(_Group(units, events))  # it joins before the next step is made

    # -- working -----------------------------------------------------------------------------

    def _turn(self, group: _Group) -> Iterator[Made]:
        """Let a group tell one thing, and put it behind the others."""
        self._running.remove(group)
        engine, group.begun = self.generator.engine, True
        steps = engine.ticks
        try:
            event = next(group.events, None)
        except Exception as error:
            log.exception("a group of pictures failed")
            for index, unit in enumerate(group.units):
                if index not in group.ended:
                    yield self._failed(unit, error)
            return
        if engine.ticks > steps:  # a step of everybody's: each live picture has one thing to tell
            for each in (group, *(other for other in self._running if other.begun)):
                each.told = each.left - len(each.ending)
        if isinstance(event, Progress):
            group.told = max(0, group.told - 1)
            if event.step == event.total:
                group.ending.add(event.picture)
        elif isinstance(event, ImageResult):
            group.ended.add(event.index)
            group.ending.discard(event.index)
            group.told = min(group.told, group.left)  # it may have failed before its last step
            if event.outcome is not Outcome.cancelled:
                yield self._made(group.units[event.index], event)
        if event is not None:
            self._running.append(group)

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
