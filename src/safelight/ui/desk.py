"""What the page does, apart from how it looks: runs, their pictures, each visitor's history.

Everything that a visitor made lives in this process until they leave; nothing of it is anybody
else's business, and every picture's file carries its own settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from safelight import provenance
from safelight.errors import InvalidRequest, SafelightError
from safelight.serve.client import Client
from safelight.store import pictures
from safelight.ui import axes, form
from safelight.ui.run import Seen, Shot, Stop, follow
from safelight.ui.sheet import sheet

KEPT = 200
"""Pictures in a visitor's history."""


@dataclass(frozen=True)
class Kept:
    """A picture in the history.

    Args:
        path: its file, named after seed and prompt.
        record: its settings; empty for the sheet of a grid.
    """

    path: Path
    caption: str
    record: Mapping[str, Any] = field(default_factory=dict)
    parameters: str = ""


@dataclass(eq=False)
class Session:
    """One visitor."""

    folder: Path
    stop: Stop | None = None
    shown: list[Kept] = field(default_factory=list)
    """The last run's pictures."""
    history: list[Kept] = field(default_factory=list)
    """Newest first."""
    chosen: int = 0
    """Which of the shown ones was clicked on."""
    looked_up: int = 0
    """Which of the history was."""
    dropped: Kept | None = None
    """A picture that was dropped in to be read."""
    read: form.Filled | None = None
    """What that one fills in."""


class Desk:
    """Runs what visitors ask for.

    Args:
        client: the server.

    Raises:
        SafelightError: the server does not answer.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.capabilities = client.capabilities()
        self._folder = tempfile.TemporaryDirectory(prefix="safelight-ui-")
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    # -- visitors ------------------------------------------------------------------------------

    def session(self, name: str | None) -> Session:
        """The visitor of that name."""
        with self._lock:
            key = name or ""
            if key not in self._sessions:
                folder = Path(self._folder.name) / secrets.token_hex(8)
                folder.mkdir()
                self._sessions[key] = Session(folder)
            return self._sessions[key]

    def leave(self, name: str | None) -> None:
        """A visitor has gone: their run stops, their pictures are deleted."""
        with self._lock:
            gone = self._sessions.pop(name or "", None)
        if gone is not None:
            if gone.stop is not None:
                gone.stop.set()
            shutil.rmtree(gone.folder, ignore_errors=True)

    # -- models --------------------------------------------------------------------------------

    def refresh(self) -> Mapping[str, Any]:
        """Ask the server again what it has."""
        self.capabilities = self.client.capabilities()
        return self.capabilities

    @property
    def models(self) -> list[str]:
        """Names, the default first."""
        return list(self.capabilities.get("models", ()))

    def model(self, name: str, *, load: bool = False) -> Mapping[str, Any]:
        """What is known of a model; ``load`` has the server load one it has not looked at."""
        known = self.capabilities.get("details", {}).get(name) or {"name": name, "family": None}
        if load and known.get("family") is None:
            known = self.client.model(name)
            self.refresh()
        return known

    def able(self, mode: str) -> list[str]:
        """Models that have a mode."""
        return [name for name in self.models if mode in (self.model(name).get("modes") or ())]

    # -- making --------------------------------------------------------------------------------

    def make(self, session: Session, mode: str, values: Mapping[str, Any]) -> Iterator[Seen]:
        """Make what the form says, and put it on show and into the history.

        Raises:
            SafelightError: before anything is made; names the field.
        """
        if session.stop is not None:
            raise SafelightError("Something is being made already: cancel it first.")
        stop = session.stop = Stop()
        try:
            if mode == "grid":
                yield from self._grid(session, values, stop)
            else:
                body = form.body(mode, values, self.model(values["model"], load=True))
                for seen in follow(self.client, [body], stop):
                    if seen.final:
                        self._show(session, [self._kept(session, shot) for shot in seen.shots])
                    yield seen
        finally:
            stop.set()
            session.stop = None

    def _grid(self, session: Session, values: Mapping[str, Any], stop: Stop) -> Iterator[Seen]:
        mode = values.get("grid_of") or "text"
        body = form.body(mode, values, self.model(values["model"], load=True))
        given = [
            axes.axis(
                values.get(f"{x}_axis") or "", values.get(f"{x}_values") or "", body, x.upper()
            )
            for x in "xyz"
        ]
        body.setdefault("seed", secrets.randbelow(2**32))
        if any(given):
            body["count"] = 1
            cells = axes.cells(body, given)
            labels = [[] if each is None else each.labels for each in given]
        else:
            count = int(body["count"])
            across = math.ceil(math.sqrt(count))
            cells = [
                axes.Cell(
                    k % across, k // across, 0, {**body, "seed": body["seed"] + k, "count": 1}
                )
                for k in range(count)
            ]
            labels = [[""] * across, [""] * math.ceil(count / across), []]
        for k, cell in enumerate(cells):  # one in four is enough to look at
            cell.body["preview_every"] = 0 if k % 4 else cell.body.get("preview_every", 0)
        for seen in follow(self.client, [cell.body for cell in cells], stop):
            if seen.final:
                kept = [self._kept(session, shot) for shot in seen.shots]
                whole = self._sheet(session, cells, labels, seen.shots)
                self._show(session, [whole, *kept])
            yield seen

    def _sheet(
        self,
        session: Session,
        cells: list[axes.Cell],
        labels: list[list[str]],
        shots: tuple[Shot, ...],
    ) -> Kept:
        found: dict[tuple[int, int, int], Image.Image | None] = {}
        for shot in shots:
            cell = cells[shot.cell]
            image = None if shot.data is None else Image.open(io.BytesIO(shot.data))
            found[cell.x, cell.y, cell.z] = image
        drawn = sheet(found, *labels)
        prompt = cells[0].body.get("prompt", "")
        path = session.folder / f"grid-{secrets.token_hex(4)}.png"
        path.write_bytes(pictures.encode(drawn, "PNG", f"A grid of: {prompt}", ""))
        return Kept(path, "the whole grid")

    def _kept(self, session: Session, shot: Shot) -> Kept | None:
        """Write a picture's file; None where there is no picture."""
        if shot.data is None:
            return None
        path = session.folder / f"{shot.seed}-{secrets.token_hex(3)}.png"
        path.write_bytes(shot.data)
        found = provenance.read(path)
        path = path.rename(path.with_name(f"{_slug(found.request.prompt)}-{path.name}"))
        flagged = " · flagged" if shot.nsfw else ""
        return Kept(path, f"seed {shot.seed}{flagged}", found.record, found.parameters)

    def _show(self, session: Session, made: list[Kept | None]) -> None:
        good = [each for each in made if each is not None]
        session.shown, session.chosen = good, 0
        history = [*good, *session.history]
        for old in history[KEPT:]:
            with contextlib.suppress(OSError):
                old.path.unlink()
        session.history = history[:KEPT]

    # -- settings ------------------------------------------------------------------------------

    def settings(self, kept: Kept) -> form.Filled:
        """What makes a picture of the history again.

        Raises:
            InvalidRequest: it does not say.
        """
        if not kept.record and not kept.parameters:
            raise InvalidRequest("picture", "is a whole grid.", "Choose one of its pictures.")
        return self._filled(provenance.read(kept.path))

    def drop(self, session: Session, path: str) -> form.Filled:
        """Read a picture that was made here, or by AUTOMATIC1111.

        Raises:
            InvalidRequest: it does not say how it was made.
        """
        session.dropped = session.read = None
        try:
            found = provenance.read(path)
        except InvalidRequest as error:
            problem = error.problem.replace(str(path), "it")
            raise InvalidRequest("picture", problem, error.fix) from None
        session.dropped = Kept(Path(path), "dropped", found.record, found.parameters)
        session.read = self._filled(found)
        return session.read

    def _filled(self, found: provenance.Provenance) -> form.Filled:
        family = (found.record.get("model") or {}).get("family")
        filled = form.filled(
            found.request.model_dump(mode="json"),
            self._served(found),
            family,
            served=self.models,
            loras=list(self.capabilities.get("loras", ())),
        )
        return dataclasses.replace(filled, notes=(*filled.notes, *found.notes))

    def _served(self, found: provenance.Provenance) -> str | None:
        """The name that a picture's model is served by; else the name it gives itself."""
        own = str((found.record.get("model") or {}).get("name") or "") or None
        for name in self.models:
            if name == found.model or name.rstrip("/").rsplit("/", 1)[-1] in (found.model, own):
                return name
        return found.model or own


def _slug(text: str) -> str:
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return plain[:40].strip("-") or "picture"
