"""Runs of small files on a toy model, and ways to end them early."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from micro_models import toy_model
from safelight.batch import ledger, runner
from safelight.batch.ledger import Record
from safelight.generate import Cancel, Generator

ROWS = [
    *({"prompt": f"a red cube, {k}", "steps": 2 + k % 3} for k in range(3)),
    {"prompt": "a blue sphere", "count": 3, "steps": 2, "seed": 40},
    {"prompt": "a cone", "steps": "many"},
    {"prompt": "a small cone", "width": 16, "height": 16, "steps": 1},
    {"prompt": "a red cube", "steps": 4},
]


def generator() -> Generator:
    return Generator(toy_model())


def write(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    return path


def options(file: Path, folder: Path, **changes: Any) -> runner.Options:
    fields = {"deterministic": True, "safety": "off", **changes.pop("fields", {})}
    changes.setdefault("seed", 1)
    changes.setdefault("page", False)
    return runner.Options(file, folder, fields, **changes)


def run(
    file: Path,
    folder: Path,
    heard: Callable[[Record], None] | None = None,
    cancel: Cancel | None = None,
    loader: Callable[..., Generator] | None = None,
    live: int | None = None,
    **changes: Any,
) -> runner.Summary:
    """The whole story, as the command tells it."""
    made = runner.Run(options(file, folder, **changes))
    maker = runner.Local(loader=loader or (lambda *_, **__: generator()), live=live)
    return made.finish(maker, cancel, heard)


def manifest(folder: Path) -> list[Record]:
    """Rows, without what a clock says."""
    return [{**row, "seconds": 0} for row in ledger.records(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file that a run leaves, but for the lock and the manifest."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.startswith(".batch") and path.name != ledger.MANIFEST
    }


class Killed(BaseException):
    """The process is gone: nothing cleans up after it."""


@contextmanager
def dying(at: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Die at the so-many-th time that something is made durable, as a machine does that loses its
    power: of what was written since the last sync of that file, half is lost.

    Yields:
        a list whose only number counts these times.
    """
    count, durable = [0], dict[int, int]()
    fsync, replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        count[0] += 1
        info = os.fstat(handle)
        if count[0] == at:
            if os.path.isfile(f"/proc/self/fd/{handle}"):
                safe = min(durable.get(info.st_ino, 0), info.st_size)
                os.ftruncate(handle, safe + (info.st_size - safe) // 2)
            raise Killed
        durable[info.st_ino] = info.st_size

    def move(old: Any, new: Any) -> None:
        count[0] += 1
        if count[0] == at:
            raise Killed
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        patch.setattr(os, "replace", move)
        yield count
    del fsync


@contextmanager
def full(at: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk that is full from the so-many-th sync on."""
    count = [0]

    def sync(handle: int) -> None:
        count[0] += 1
        if count[0] >= at and os.path.isfile(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        yield
