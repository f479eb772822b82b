"""Following what was asked for: submit, look, cancel; one job or the many of a grid. No gradio."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from safelight.errors import InvalidRequest, SafelightError
from safelight.serve.client import FINAL, Client, Full

FLIGHT = 16
"""Jobs of a grid that are with the server at a time."""


@dataclass(frozen=True)
class Shot:
    """One picture that was asked for, and what came of it.

    Args:
        cell: which of the requests it belongs to.
        data: the picture's file, with its settings; None where there is no picture.
        outcome: ``ok``, ``nsfw``, ``cancelled`` …
        nsfw: None where nobody looked.
    """

    cell: int
    index: int
    seed: int
    outcome: str
    data: bytes | None = None
    message: str = ""
    nsfw: bool | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """How far it all is.

    Args:
        status: ``queued``, ``generating``, ``completed``, ``cancelled`` or ``failed``.
        position: jobs before the first of ours that waits.
        progress: 0..1, over everything.
        step, steps: of the picture that was heard of last.
        eta: seconds.
        preview: the newest look at an unfinished picture, PNG.
        shots: what is finished, in the order asked for.
        total: pictures asked for.
        error: why it failed.
    """

    status: str = "queued"
    position: int | None = None
    progress: float = 0.0
    step: int = 0
    steps: int | None = None
    eta: float | None = None
    seconds: float = 0.0
    preview: bytes | None = None
    shots: tuple[Shot, ...] = ()
    total: int = 1
    error: str = ""

    @property
    def final(self) -> bool:
        return self.status in FINAL


class Stop:
    """Cancels a run from another thread."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Sleep, or wake when it is set; says whether it is."""
        return self._event.wait(seconds)

    @property
    def is_set(self) -> bool:
        return self._event.is_set()


def follow(
    client: Client, bodies: Sequence[Mapping[str, Any]], stop: Stop, *, every: float = 0.15
) -> Iterator[Seen]:
    """Make everything that was asked for, and tell how far it is.

    Leaving the iterator early cancels what is left. With one request its refusal is raised; in a
    grid a cell that is refused or fails is one shot with its reason.

    Args:
        stop: ends it within a step; what is finished is kept.
        every: seconds between looks.

    Raises:
        SafelightError: the only request was refused.
    """
    run = _Run(client, bodies)
    try:
        run.submit(stop)
        yield run.look()
        while not run.done:
            if stop.wait(every) and not run.stopped:
                run.cancel()
            if stop.is_set:
                time.sleep(every / 3)
            run.submit(stop)
            yield run.look()
    finally:
        run.cancel()


class _Run:
    def __init__(self, client: Client, bodies: Sequence[Mapping[str, Any]]) -> None:
        self._client, self._bodies = client, bodies
        self._waiting = list(range(len(bodies)))
        self._flying: dict[int, str] = {}
        self._told: dict[int, Mapping[str, Any]] = {}
        self._shots: dict[tuple[int, int], Shot] = {}
        self._previewed: dict[int, tuple[int, int]] = {}
        self._preview: bytes | None = None
        self._began, self._free, self.stopped = time.monotonic(), 0.0, False
        self._total = sum(int(body.get("count", 1)) for body in bodies)
        self._failure = ""

    @property
    def done(self) -> bool:
        return not self._flying and (self.stopped or not self._waiting)

    def submit(self, stop: Stop) -> None:
        """Hand over what there is room for."""
        while self._waiting and len(self._flying) < FLIGHT and not stop.is_set:
            if time.monotonic() < self._free:
                return
            cell = self._waiting[0]
            try:
                told = self._client.submit(self._bodies[cell])
            except Full as full:
                if len(self._bodies) == 1:
                    raise
                self._free = time.monotonic() + min(full.retry_after, 5.0)
                return
            except SafelightError as error:
                if len(self._bodies) == 1:
                    raise
                self._fail(cell, str(error), "refused")
            else:
                self._flying[cell] = str(told["id"])
                self._told[cell] = told
            self._waiting.pop(0)
        if stop.is_set:
            self.cancel()

    def cancel(self) -> None:
        self.stopped = True
        for name in self._flying.values():
            self._client.cancel(name)

    def look(self) -> Seen:
        """Ask about every job that is not done."""
        for cell, name in list(self._flying.items()):
            told = self._client.job(name)
            self._told[cell] = told
            self._take(cell, name, told)
            if told["status"] in FINAL:
                del self._flying[cell]
                if told["status"] == "failed":
                    self._fail(cell, str(told.get("error") or "it failed."), "error")
            else:
                self._look_closer(cell, name, told)
        return self._seen()

    def _take(self, cell: int, name: str, told: Mapping[str, Any]) -> None:
        for result in told.get("results") or []:
            key = (cell, int(result["index"]))
            if key not in self._shots:
                data = self._client.picture(name, key[1]) if result.get("url") else None
                self._shots[key] = Shot(
                    *key,
                    seed=int(result["seed"]),
                    outcome=str(result["outcome"]),
                    data=data,
                    message=str(result.get("message") or ""),
                    nsfw=result.get("nsfw"),
                    notices=tuple(result.get("notices") or ()),
                )

    def _look_closer(self, cell: int, name: str, told: Mapping[str, Any]) -> None:
        every = int(self._bodies[cell].get("preview_every") or 0)
        step = int(told.get("step") or 0)
        now = (int(told.get("finished") or 0), step // every if every else 0)
        if every and step >= every and self._previewed.get(cell) != now:
            self._preview = self._client.preview(name) or self._preview
            self._previewed[cell] = now

    def _fail(self, cell: int, message: str, outcome: str) -> None:
        self._failure = message
        seed = int(self._bodies[cell].get("seed") or 0)
        self._shots.setdefault((cell, 0), Shot(cell, 0, seed, outcome, message=message))

    def _seen(self) -> Seen:
        shots = tuple(self._shots[key] for key in sorted(self._shots))
        shares = [
            1.0 if cell in self._told and cell not in self._flying else self._share(cell)
            for cell in range(len(self._bodies))
        ]
        active = [self._told[cell] for cell in self._flying]
        running = [told for told in active if told["status"] == "generating"]
        lead = (running or active or [{}])[0]
        seconds, progress = time.monotonic() - self._began, sum(shares) / max(1, len(shares))
        eta = lead.get("eta_seconds")
        if len(self._bodies) > 1:
            eta = seconds / progress * (1 - progress) if progress > 0.02 else None
        seen = Seen(
            status="generating" if running or shots else "queued",
            position=None if running else lead.get("queue_position"),
            progress=progress,
            step=int(lead.get("step") or 0),
            steps=lead.get("steps"),
            eta=eta,
            seconds=seconds,
            preview=self._preview,
            shots=shots,
            total=self._total,
        )
        return self._ended(seen) if self.done else seen

    def _share(self, cell: int) -> float:
        return float(self._told.get(cell, {}).get("progress") or 0.0)

    def _ended(self, seen: Seen) -> Seen:
        good = any(shot.data is not None for shot in seen.shots)
        states = {str(told["status"]) for told in self._told.values()}
        status = "completed"
        if self.stopped and (states - {"completed"} or self._waiting):
            status = "cancelled"
        elif self._failure and not good:
            status = "failed"
        return replace(seen, status=status, preview=None, eta=None, error=self._failure)


def refusal(error: Exception) -> tuple[str, str]:
    """(field, message) of an error, for whoever shows it."""
    if isinstance(error, InvalidRequest):
        return error.field, f"{error.problem} {error.fix}".strip()
    return "", str(error) or type(error).__name__
