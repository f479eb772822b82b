"""The same rows on many machines, by Ray Data. Needs the extra ``ray``.

Rows go out in blocks, each with its pictures' bytes, so that the machines need to share no folder;
finished pictures come back as files' bytes, and the one process that was started keeps them, with
the same manifest as without Ray. A worker that dies is started anew and its block is made again:
a picture is its seed's, so it is the same picture, and it is kept under the same name.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import pickle
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from safelight.batch.rows import weight
from safelight.batch.window import Made, Saving, Task, Window
from safelight.errors import (
    InvalidRequest,
    MissingExtra,
    ModelNotFound,
    SafelightError,
    WeightsError,
)
from safelight.generate import Cancel, Generator, load

log = logging.getLogger(__name__)

BLOCK = 64
"""Most pictures that a worker is given at a time, and that its death costs."""
_CHUNK_ROWS, _CHUNK_BYTES = 20_000, 256 * 2**20
"""Most that is sent out before the next rows are read."""
_POLL = 0.2  # seconds between looks at the cancel token


class OnRay:
    """Makes rows on a Ray cluster.

    Args:
        machine: options of :func:`safelight.generate.load`, on every worker.
        workers: how many load the model.
        cpus: of each.
        address: of a running cluster; None starts one here, and stops it again.
        steady: make torch deterministic on a GPU.
    """

    def __init__(
        self,
        machine: Mapping[str, Any] | None = None,
        saving: Saving | None = None,
        *,
        live: int | None = None,
        workers: int = 1,
        cpus: int = 1,
        address: str | None = None,
        steady: bool = False,
        loader: Callable[..., Generator] | None = None,
    ) -> None:
        try:
            import ray
            import ray.data
        except ImportError:
            raise MissingExtra("--engine ray", "ray") from None
        self._ray, self._owned = ray, False
        self._machine = dict(machine or {})
        self._workers, self._cpus, self._address = workers, cpus, address
        self._work = {"saving": saving, "live": live, "steady": steady, "loader": loader or load}

    def make(self, model: str, tasks: Iterable[Task], cancel: Cancel) -> Iterator[Made]:
        """See :class:`safelight.batch.runner.Maker`. Returns when the first picture is there, or
        when it is known that the model cannot be loaded."""
        self._connect()
        made = self._all(model, iter(tasks), cancel)
        first = next(made, None)
        return iter(()) if first is None else itertools.chain([first], made)

    def close(self) -> None:
        """Stop the cluster, if it was started here."""
        if self._owned:
            self._ray.shutdown()
            self._owned = False

    def _connect(self) -> None:
        ray = self._ray
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # the workers are what it is for
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        try:
            if self._address is not None:
                ray.init(address=self._address, **quiet)
            else:
                cpus = max(self._workers * self._cpus, os.cpu_count() or 1)
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise SafelightError(f"no Ray at {self._address or 'this machine'}: {error}") from error
        self._owned = True

    def _all(self, model: str, tasks: Iterator[Task], cancel: Cancel) -> Iterator[Made]:
        while not cancel.is_set:
            blocks = list(_blocks(itertools.islice(_light(tasks), _CHUNK_ROWS), self._workers))
            if not blocks:
                return
            yield from self._chunk(model, blocks, cancel)

    def _chunk(self, model: str, blocks: list[list[Task]], cancel: Cancel) -> Iterator[Made]:
        """Blocks out, pictures in. Ray is waited for on another thread, so that cancelling does
        not wait for a block."""
        heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def listen() -> None:
            try:
                for row in self._dataset(model, blocks).iter_rows():
                    heard.put(row["made"])
                heard.put(None)
            except BaseException as error:
                heard.put(error)

        threading.Thread(target=listen, name="safelight-ray", daemon=True).start()
        while not cancel.is_set:
            try:
                told = heard.get(timeout=_POLL)
            except queue.Empty:
                continue
            if told is None:
                return
            if isinstance(told, BaseException):
                raise SafelightError(f"Ray gave up: {told}") from told
            yield _told(told)

    def _dataset(self, model: str, blocks: list[list[Task]]) -> Any:
        data = self._ray.data
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        for name in ("ray.data", "ray.data._internal"):
            logging.getLogger(name).setLevel(logging.ERROR)
        packed = [{"tasks": pickle.dumps(block)} for block in blocks]
        cuda = str(self._machine.get("device") or "").startswith("cuda")
        return data.from_items(packed, override_num_blocks=len(packed)).map_batches(
            Worker,
            fn_constructor_kwargs={"model": model, "machine": self._machine, **self._work},
            batch_size=1,
            compute=data.ActorPoolStrategy(size=self._workers),
            num_cpus=self._cpus,
            num_gpus=1 if cuda else 0,
        )


class Worker:
    """One of the processes that make pictures."""

    def __init__(
        self,
        model: str,
        machine: Mapping[str, Any],
        saving: Saving | None,
        live: int | None,
        steady: bool,
        loader: Callable[..., Generator],
    ) -> None:
        self._window: Window | None = None
        self._error: bytes = b""
        try:
            self._window = Window(loader(model, **machine), saving, live=live)
        except SafelightError as error:  # told, because raised it would be tried again for ever
            of_the_model = isinstance(error, ModelNotFound | WeightsError | InvalidRequest)
            kind = ModelNotFound if of_the_model else SafelightError
            self._error = pickle.dumps(kind(str(error)))
        if steady:
            import torch

            if torch.cuda.is_available():  # the process is this worker's
                torch.use_deterministic_algorithms(True, warn_only=True)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        """Blocks of tasks to pictures, both pickled."""
        if self._window is None:
            return {"made": [self._error]}
        tasks = [task for block in batch["tasks"] for task in pickle.loads(block)]
        return {"made": [pickle.dumps(_encoded(made)) for made in self._window.make(tasks)]}


def _encoded(made: Made) -> Made:
    return dataclasses.replace(made, data=made.data()) if callable(made.data) else made


def _told(data: bytes) -> Made:
    """What a worker tells; it is one of ours, so its pickles are."""
    made = pickle.loads(data)
    if isinstance(made, SafelightError):
        raise made
    return made


def _light(tasks: Iterator[Task]) -> Iterator[Task]:
    """Tasks until their pictures weigh too much."""
    total = 0
    for task in tasks:
        yield task
        total += weight(task.request)
        if total > _CHUNK_BYTES:
            return


def _blocks(tasks: Iterable[Task], workers: int) -> Iterator[list[Task]]:
    """Tasks in blocks of pictures, small enough that every worker has some to do.

    A row of many pictures is cut into several tasks, each of which has the others' already.
    """
    all_tasks = list(tasks)
    total = sum(task.request.count - len(task.have) for task in all_tasks)
    size = max(1, min(BLOCK, -(-total // (4 * workers))))
    block: list[Task] = []
    room = size
    for task in all_tasks:
        left = [k for k in range(task.request.count) if k not in task.have]
        while left:
            part, left = left[:room], left[room:]
            have = frozenset(range(task.request.count)) - set(part)
            block.append(dataclasses.replace(task, have=have))
            room -= len(part)
            if not room:
                yield block
                block, room = [], size
    if block:
        yield block
