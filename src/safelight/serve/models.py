"""The models of a server: loaded at the start or when they are first asked for, unloaded where
memory is short, the one that has been idle for longest first."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from safelight.errors import InvalidRequest, ModelNotFound
from safelight.fields import shown
from safelight.generate import Generator
from safelight.serve import logs, memory
from safelight.serve.turns import Turns
from safelight.serve.worker import Watch, Worker

log = logging.getLogger(__name__)


class Models:
    """Workers by model name. Safe from any thread.

    Args:
        names: what is served; the first answers where a request names none.
        load: makes a generator of a name; called on the model's own thread.
        bound: bytes that the process may hold before idle models are unloaded; None: no bound.
        used: how many it holds.
        worker: further arguments of :class:`Worker`.
    """

    def __init__(
        self,
        names: Sequence[str],
        load: Callable[[str], Generator],
        *,
        watch: Watch | None = None,
        bound: float | None = None,
        used: Callable[[], int] = lambda: memory.device_bytes() or memory.resident_bytes(),
        **worker: Any,
    ) -> None:
        self.names, self.bound, self._used = tuple(names), bound, used
        self._load, self._watch, self._options = load, watch, worker
        self._turns = Turns()
        self._lock = threading.Lock()
        self._loading = {name: threading.Lock() for name in names}
        self._workers: dict[str, Worker] = {}
        self._pinned = dict.fromkeys(names, 0)
        self._sizes: dict[str, int] = {}
        self._closed = False

    def name(self, model: str | None) -> str:
        """Which served model is meant: its name, its folder's name, or nothing for the first.

        Raises:
            ModelNotFound: none of them; the message lists them.
            InvalidRequest: it is no name at all.
        """
        if model is None or model == "":
            return self.names[0]
        if not isinstance(model, str):
            raise InvalidRequest("model", f"must be a name, not {shown(model)}.")
        wanted = model.strip().rstrip("/").lower()
        for name in self.names:
            plain = name.rstrip("/").lower()
            if wanted in (plain, plain.rsplit("/", 1)[-1]):
                return name
        raise ModelNotFound(f"no model {shown(model)} here; there are {', '.join(self.names)}")

    def loaded(self) -> dict[str, Worker]:
        """Those in memory."""
        with self._lock:
            return dict(self._workers)

    @property
    def seen(self) -> set[str]:
        """Those that have been loaded once."""
        return set(self._sizes)

    @contextmanager
    def using(self, model: str | None) -> Iterator[Worker]:
        """A model's worker, loaded if need be, and not unloaded before the block ends."""
        name = self.name(model)
        with self._lock:
            self._pinned[name] += 1
        try:
            with self._loading[name]:
                worker = self.loaded().get(name) or self._loaded(name)
            yield worker
        finally:
            with self._lock:
                self._pinned[name] -= 1

    def get(self, model: str | None) -> Worker:
        """The same, to look at."""
        with self.using(model) as worker:
            return worker

    def unload(self, name: str) -> bool:
        """Let go of a model, where nothing waits for it or runs; says whether it did."""
        with self._lock:
            worker = self._workers.get(name)
            if worker is None or self._pinned[name] or not worker.idle:
                return False
            del self._workers[name]
        worker.close()
        del worker
        memory.give_back()
        logs.event(log, "unloaded", model=name, bytes=self._used())
        return True

    def make_room(self, needed: int = 0) -> None:
        """Unload idle models, least recently used first, until ``needed`` bytes fit."""
        if self.bound is None:
            return
        idle = sorted(self.loaded().items(), key=lambda item: item[1].used)
        for name, _ in idle:
            if self._used() + needed <= self.bound:
                return
            self.unload(name)

    def close(self, drain: float) -> None:
        """Take no more of anything, and let all that was accepted end within ``drain`` seconds."""
        self._closed = True
        workers = list(self.loaded().values())
        for worker in workers:
            worker.refuse()
        end = time.monotonic() + drain
        for worker in workers:
            worker.close(drain=max(0.0, end - time.monotonic()))

    def _loaded(self, name: str) -> Worker:
        self.make_room(self._sizes.get(name, 0))
        began, before = time.monotonic(), self._used()
        worker = Worker(
            functools.partial(self._load, name),
            name=name,
            turns=self._turns,
            watch=self._watch,
            **self._options,
        )
        self._sizes[name] = max(0, self._used() - before)
        with self._lock:
            self._workers[name] = worker
        if self._closed:
            worker.refuse()
        seconds = round(time.monotonic() - began, 3)
        logs.event(log, "loaded", model=name, seconds=seconds, bytes=self._sizes[name])
        self.make_room()
        return worker
