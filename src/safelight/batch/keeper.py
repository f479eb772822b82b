"""Keeps what is made: files first, then the lines that name them. A thread of its own.

Writing and syncing a picture takes about as long as a few steps of a small model; on its own
thread it costs none, and everything that is waiting is made durable with one sync.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safelight.batch import ledger
from safelight.batch.ledger import Ledger, Record
from safelight.batch.rows import Wish
from safelight.batch.window import Made
from safelight.request import Outcome

log = logging.getLogger(__name__)

_WAITING = 64  # pictures that may wait to be written
_TOGETHER = 8  # pictures that are made durable by one line of the manifest
_ENDINGS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
GOOD = (Outcome.ok, Outcome.nan_recovered)
FLAGGED = (Outcome.nsfw, Outcome.rejected)

Heard = Callable[[Record], None]


class Keeper:
    """Writes pictures and their records.

    Args:
        heard: called with the record of every row that ends, on the keeper's thread.
    """

    def __init__(self, book: Ledger, folder: Path, format: str, heard: Heard) -> None:
        self.book, self.folder, self._heard = book, folder, heard
        self._ending = _ENDINGS[format]
        self._queue: queue.Queue[tuple[Wish, Made | None] | None] = queue.Queue(_WAITING)
        self._error: BaseException | None = None
        self._times: dict[int, tuple[float, float]] = {}
        self._thread = threading.Thread(target=self._work, name="safelight-keeper", daemon=True)
        self._thread.start()

    def keep(self, wish: Wish, made: Made | None) -> None:
        """A picture of a row, or (None) a row that failed before it was tried.

        Raises:
            DiskFull, SafelightError: what went wrong with an earlier one.
        """
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._queue.put((wish, made), timeout=0.2)
                return
            except queue.Full:
                continue

    def close(self) -> None:
        """Write what waits.

        Raises:
            DiskFull, SafelightError: what went wrong.
        """
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.2)
                break
            except queue.Full:
                continue
        self._thread.join()
        if self._error is not None:
            raise self._error

    # -- the keeper's thread -----------------------------------------------------------------

    def _work(self) -> None:
        try:
            ended = False
            while not ended:
                items = [self._queue.get()]
                while len(items) < _TOGETHER and items[-1] is not None:
                    try:
                        items.append(self._queue.get_nowait())
                    except queue.Empty:
                        break
                ended = items[-1] is None
                self._take([item for item in items if item is not None])
        except BaseException as error:
            self._error = error

    def _take(self, items: list[tuple[Wish, Made | None]]) -> None:
        fresh: dict[int, dict[int, Record]] = {}
        entries: list[Record] = []
        for wish, made in items:
            if made is None or made.index is None:
                entries.append({"row": wish.row, "record": self._failed(wish, made)})
                continue
            picture = self._picture(wish, made)
            mine = fresh.setdefault(wish.row, dict(self.book.partial.get(wish.row, {})))
            mine[made.index] = picture
            assert wish.request is not None
            if len(mine) == wish.request.count:
                record = self._whole(wish, made, mine)
                entries.append({"row": wish.row, "record": record})
            else:
                entries.append({"row": wish.row, "index": made.index, "picture": picture})
        if not entries:
            return
        ledger.sync_folder(self.folder)
        self.book.commit(entries)
        for entry in entries:
            if "record" in entry:
                self._heard(entry["record"])

    def _picture(self, wish: Wish, made: Made) -> Record:
        """Write a picture's file; its record."""
        assert made.index is not None
        outcome, message, name = str(made.outcome), made.message, None
        if made.data is not None:
            try:
                data = made.data if isinstance(made.data, bytes) else made.data()
            except Exception as error:
                log.exception("row %d: picture %d cannot be encoded", wish.row, made.index)
                outcome, message = str(Outcome.error), f"{type(error).__name__}: {error}"
            else:
                name = f"{wish.row:06d}-{made.seed}{self._ending}"
                ledger.write(self.folder / name, data)
        before = self._times.get(wish.row, (made.started, made.ended))
        self._times[wish.row] = (min(before[0], made.started), max(before[1], made.ended))
        found: Record = {"file": name, "seed": made.seed, "outcome": outcome, "nsfw": made.nsfw}
        more = {"message": message, "notices": list(made.notices), "error": made.error}
        return found | {key: value for key, value in more.items() if value}

    def _whole(self, wish: Wish, made: Made, pictures: Mapping[int, Record]) -> Record:
        """A row's record, when its last picture is there."""
        parts = [pictures[index] for index in sorted(pictures)]
        began, ended = self._times.pop(wish.row, (0.0, 0.0))
        outcomes = [part["outcome"] for part in parts]
        bad = next((p for p in parts if p["outcome"] not in (*GOOD, *FLAGGED)), None)
        error = None
        if bad is not None:
            error = bad.get("error") or {"field": "", "problem": bad.get("message", ""), "fix": ""}
        notices = dict.fromkeys(note for part in parts for note in part.get("notices", ()))
        return self._record(
            wish,
            status=_status(outcomes),
            files=[part["file"] for part in parts if part["file"]],
            seeds=[part["seed"] for part in parts],
            outcomes=outcomes,
            messages=[p["message"] for p in parts if p.get("message")],
            notices=list(notices),
            seconds=round(ended - began, 3),
            error=error,
            request=made.request,
        )

    def _failed(self, wish: Wish, made: Made | None) -> Record:
        error = wish.error if made is None else made.error
        request = None if made is None else made.request
        self._times.pop(wish.row, None)
        return self._record(wish, status="failed", error=error, request=request)

    def _record(self, wish: Wish, **more: Any) -> Record:
        found: Record = {
            "row": wish.row,
            "line": wish.line,
            "status": "",
            "model": wish.model,
            "prompt": wish.prompt,
            "files": [],
            "seeds": [],
            "outcomes": [],
            "seconds": 0.0,
            "error": None,
        }
        found |= more
        if wish.extra:
            found["columns"] = dict(wish.extra)
        return found


def _status(outcomes: list[str]) -> str:
    """Of a row, from its pictures'."""
    if all(outcome in GOOD for outcome in outcomes):
        return "done"
    if all(outcome in (*GOOD, *FLAGGED) for outcome in outcomes):
        return "flagged"
    if any(outcome in (*GOOD, *FLAGGED) for outcome in outcomes):
        return "partial"
    return "failed"
