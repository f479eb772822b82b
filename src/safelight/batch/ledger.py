"""What is done, on disk: so that a run that was killed anywhere goes on where it was.

``manifest.jsonl`` holds one line a row of the input, in the input's order, and only ever grows.
Rows end in another order than they began, so what ends early stands in ``progress.jsonl`` until
its turn comes: finished pictures of unfinished rows, and finished rows that wait for earlier ones.
Both are written and synced after the pictures that they name; the half line that a crash may leave
at the end of either is cut off when the run is taken up again. ``batch.json`` says what run it is.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from safelight.errors import InvalidRequest, SafelightError

SCHEMA = 1
KIND = "safelight.batch"
STATE, MANIFEST, PROGRESS, LOCK = "batch.json", "manifest.jsonl", "progress.jsonl", ".batch.lock"
FAILED = ("failed", "partial")
"""Statuses of rows with a picture missing."""

Record = dict[str, Any]


class DiskFull(SafelightError):
    """There is no room for a picture or for the manifest. What was finished is kept."""


def write(path: Path, data: bytes) -> None:
    """Put a file in its place, durably: after a crash it is all there or not at all.

    The temporary name is always the same, so that a crash leaves one at most, and making the
    picture again takes it away.

    Raises:
        DiskFull: no room.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _explained(error, path) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _explained(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1), errno.EFBIG):
        return DiskFull(f"{path}: {error.strerror}. Make room, and run the same command again.")
    return SafelightError(f"{path} cannot be written: {error.strerror or error}.")


def line_of(record: Mapping[str, Any]) -> bytes:
    """A record as a line. ASCII, so that any text can be written."""
    return json.dumps(record, separators=(",", ":"), allow_nan=False, default=str).encode() + b"\n"


@dataclass
class Ledger:
    """The rows and pictures of one folder that are done.

    Attributes:
        next: the row that the manifest waits for.
        partial: by row, the records of pictures that are made of a row that is not finished.
    """

    folder: Path
    next: int = 1
    partial: dict[int, dict[int, Record]] = field(default_factory=dict)
    _early: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Where in the progress file the record of a row stands that ended before its turn."""
    _manifest: IO[bytes] | None = None
    _progress: IO[bytes] | None = None

    # -- taking up ---------------------------------------------------------------------------

    @classmethod
    def open(cls, folder: Path, *, again: bool = False) -> Ledger:
        """Read what is there, and cut off what a crash has left half written.

        Args:
            again: forget the rows that failed, so that they are tried once more.

        Raises:
            SafelightError: the manifest is not one of this program's, or cannot be written.
        """
        ledger = cls(folder)
        try:
            if again:
                _without_failures(folder)
            ledger._read_manifest()
            ledger._read_progress()
            ledger._manifest = (folder / MANIFEST).open("a+b", buffering=0)
            ledger._progress = (folder / PROGRESS).open("a+b", buffering=0)
            ledger.commit([])
        except OSError as error:
            raise _explained(error, folder) from error
        return ledger

    def _read_manifest(self) -> None:
        for _, record in _lines(self.folder / MANIFEST):
            if record.get("row") != self.next:
                raise SafelightError(
                    f"{self.folder / MANIFEST} has row {record.get('row')} where {self.next} "
                    "belongs. Start over with --restart, or use another folder."
                )
            self.next += 1

    def _read_progress(self) -> None:
        for place, record in _lines(self.folder / PROGRESS):
            row = record["row"]
            if row >= self.next:
                if "picture" in record:
                    self.partial.setdefault(row, {})[record["index"]] = record["picture"]
                else:
                    self._early[row] = place
                    self.partial.pop(row, None)

    def done(self, row: int) -> bool:
        """Whether a row is finished, one way or the other."""
        return row < self.next or row in self._early

    @property
    def finished(self) -> int:
        """How many rows are."""
        return self.next - 1 + len(self._early)

    # -- growing -----------------------------------------------------------------------------

    def commit(self, entries: Sequence[Record]) -> None:
        """Take in pictures (``row``, ``index``, ``picture``) and whole rows (``row``, ``record``).

        Returns when they are durable. What an entry names has to be durable before.

        Raises:
            DiskFull: no room; nothing of the entries counts then.
        """
        assert self._progress is not None
        assert self._manifest is not None
        in_turn = bytearray()
        early = bytearray()
        at, following = self._progress.seek(0, os.SEEK_END), self.next
        places: dict[int, tuple[int, int]] = {}
        for entry in entries:
            row = entry["row"]
            if "record" in entry and row == following:
                in_turn += line_of(entry["record"])
                following += 1
            else:
                line = line_of(entry)
                if "record" in entry:
                    places[row] = (at + len(early), len(line))
                early += line
        self._append(self._progress, early, at)
        self._early |= places
        while following in self._early:
            in_turn += line_of(self._record(*self._early.pop(following)))
            following += 1
        self._append(self._manifest, in_turn, self._manifest.seek(0, os.SEEK_END))
        for entry in entries:
            if "picture" in entry:
                self.partial.setdefault(entry["row"], {})[entry["index"]] = entry["picture"]
            else:
                self.partial.pop(entry["row"], None)
        self.next = following
        if not self._early and not self.partial and self._progress.tell():
            self._progress.truncate(0)

    def _append(self, file: IO[bytes], data: bytes | bytearray, at: int) -> None:
        """All of it, durably, or none."""
        left = memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
            if data:
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(at)
            raise _explained(error, Path(file.name)) from error

    def _record(self, at: int, length: int) -> Record:
        assert self._progress is not None
        self._progress.seek(at)
        return json.loads(self._progress.read(length))["record"]

    def close(self, *, finished: bool = False) -> None:
        """Close the files; a finished run needs no progress file."""
        for file in (self._manifest, self._progress):
            if file is not None:
                file.close()
        if finished:
            (self.folder / PROGRESS).unlink(missing_ok=True)


def records(folder: Path) -> Iterator[Record]:
    """The rows of a folder's manifest, in order."""
    return (record for _, record in _lines(folder / MANIFEST, mend=False))


def waiting(folder: Path) -> Iterator[Record]:
    """The rows that are finished and wait for earlier ones, after the run has ended."""
    last = sum(1 for _ in _lines(folder / MANIFEST, mend=False))
    for _, entry in _lines(folder / PROGRESS, mend=False):
        if "record" in entry and entry["row"] > last:
            yield entry["record"]


def _lines(path: Path, *, mend: bool = True) -> Iterator[tuple[tuple[int, int], Record]]:
    """The whole lines of a file, each with its place and length; half a line at the end is cut
    off."""
    if not path.exists():
        return
    good = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                if file.read(1):
                    raise SafelightError(f"{path} is damaged at byte {good}. Use --restart.")
                break
            yield (good, len(line)), record
            good += len(line)
        else:
            return
    if mend:
        os.truncate(path, good)


def _without_failures(folder: Path) -> None:
    """The manifest up to its first failure; what is good behind it waits for its turn again."""
    keep, kept, early = 0, True, bytearray()
    waiting = [entry for _, entry in _lines(folder / PROGRESS)]
    bad = {e["row"] for e in waiting if e.get("record", {}).get("status") in FAILED}
    last = 0
    for (at, length), record in _lines(folder / MANIFEST):
        last = record["row"]
        failed = record.get("status") in FAILED
        kept = kept and not failed
        if kept:
            keep = at + length
        elif not failed:
            early += line_of({"row": record["row"], "record": record})
    for entry in waiting:
        if entry["row"] > last and entry["row"] not in bad:
            early += line_of(entry)
    # First what is kept, then what is taken away: killed between the two, nothing has happened.
    write(folder / PROGRESS, bytes(early))
    sync_folder(folder)
    if (folder / MANIFEST).exists():
        os.truncate(folder / MANIFEST, keep)


# -- what run it is -------------------------------------------------------------------------------


def read_state(folder: Path) -> Record | None:
    """``batch.json``; None where there is none.

    Raises:
        SafelightError: it is not ours.
    """
    path = folder / STATE
    if not path.exists():
        if (folder / MANIFEST).exists():
            raise InvalidRequest(
                "output", f"{folder} holds a {MANIFEST} of something else.", "Use another folder."
            )
        return None
    try:
        found = json.loads(path.read_bytes())
        kind, schema = found["kind"], found["schema"]
    except (ValueError, KeyError, TypeError, OSError):
        kind, schema, found = None, None, {}
    if kind != KIND or schema != SCHEMA:
        raise InvalidRequest(
            "output", f"{path} is not of this version's batches.", "Use another folder."
        )
    return found


def write_state(folder: Path, state: Record) -> None:
    """Write ``batch.json``, durably."""
    text = json.dumps({"kind": KIND, "schema": SCHEMA, **state}, indent=2, default=str)
    write(folder / STATE, text.encode() + b"\n")
    sync_folder(folder)


def clear(folder: Path) -> None:
    """Forget a run: its files, and the pictures that its manifest names."""
    with contextlib.suppress(SafelightError):  # damaged: what can be read of it
        for _, entry in itertools.chain(_lines(folder / MANIFEST), _lines(folder / PROGRESS)):
            record = entry.get("record") or entry.get("picture") or entry
            for name in [*record.get("files", ()), record.get("file")]:
                if name and Path(name).name == name:  # a file of the folder itself, nothing else
                    (folder / name).unlink(missing_ok=True)
    for name in (MANIFEST, PROGRESS, STATE):
        (folder / name).unlink(missing_ok=True)


class Lock:
    """One run a folder at a time. The system lets go of it when the process ends, however."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / LOCK).open("a+b")
        try:
            import fcntl
        except ImportError:  # Windows: two runs at a time are the user's to avoid
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InvalidRequest("output", f"{folder} is in use by another run.") from None

    def release(self) -> None:
        """Let the next one in."""
        self._file.close()
