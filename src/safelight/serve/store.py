"""Jobs that outlive the process: what was asked and what came of it, in SQLite; pictures as files.

A job is written before its id is told, and its pictures before it counts as completed. So after a
crash every job that a client knows of is either finished, with its pictures, or runs again with the
same seeds, which gives the same pictures.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight import provenance
from safelight.errors import SafelightError
from safelight.serve.jobs import Job, Status
from safelight.store.pictures import write

SCHEMA = 1
_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY,
    key TEXT UNIQUE,
    model TEXT NOT NULL,
    body TEXT NOT NULL,
    format TEXT NOT NULL,
    priority INTEGER NOT NULL,
    created REAL NOT NULL,
    completed REAL,
    status TEXT NOT NULL,
    told TEXT
)
"""


class StoreError(SafelightError):
    """The folder of jobs cannot be used."""


@dataclass(frozen=True)
class Kept:
    """A job as it is on disk.

    Args:
        body: the request as it was sent, with its seed.
        told: what the native interface says of it; None until it is final.
    """

    id: str
    model: str
    body: Mapping[str, Any]
    format: str
    priority: int
    created: float
    status: Status
    told: Mapping[str, Any] | None


class Store:
    """A folder with ``jobs.sqlite`` and ``pictures/``. Safe to share between threads.

    Raises:
        StoreError: the folder cannot be written, or a newer version wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA):
                raise StoreError(f"{folder} is of schema {version}; this version reads {SCHEMA}.")
            with self._db:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute(_TABLE)
                self._db.execute(f"PRAGMA user_version={SCHEMA}")
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{folder} cannot be used for jobs: {error}") from error

    def add(self, job: Job, body: Mapping[str, Any], key: str | None = None) -> None:
        """Write a job before anybody is told its id.

        Raises:
            StoreError: the disk does not take it.
        """
        row = (job.id, key, job.model, json.dumps(body), job.format, job.priority, job.created)
        self._execute(
            "INSERT INTO jobs (id, key, model, body, format, priority, created, status)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, 'queued')",
            row,
        )

    def finish(self, job: Job, status: Status, told: Mapping[str, Any]) -> None:
        """Write a job's pictures, then what became of it. Where they do not fit, none stays, and
        what is written is that it failed.

        Raises:
            StoreError: the disk does not take it.
        """
        try:
            for result in job.results:
                if result.image is not None:
                    path = self.picture(job.id, result.index)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write(path, provenance.encode(result, job.format))
        except OSError as error:
            self._clear(job.id)
            problem = f"the pictures of {job.id} cannot be stored: {error}"
            results = [{**each, "url": None} for each in told.get("results", ())]
            failed = {**told, "status": "failed", "error": problem, "results": results}
            self._end(job, Status.failed, failed)
            raise StoreError(problem) from error
        self._end(job, status, told)

    def _end(self, job: Job, status: Status, told: Mapping[str, Any]) -> None:
        self._execute(
            "UPDATE jobs SET status = ?, completed = ?, told = ? WHERE id = ?",
            (str(status), job.completed, json.dumps(told), job.id),
        )

    def fail(self, kept: Kept, problem: str) -> None:
        """Write that a job cannot be run any more, and why."""
        told = {"id": kept.id, "model": kept.model, "status": "failed", "error": problem}
        told |= {"url": f"/v1/jobs/{kept.id}", "results": []}
        self._execute(
            "UPDATE jobs SET status = 'failed', told = ? WHERE id = ?", (json.dumps(told), kept.id)
        )

    def remove(self, name: str) -> None:
        """Forget a job and its pictures."""
        self._execute("DELETE FROM jobs WHERE id = ?", (name,))
        self._clear(name)

    def _clear(self, name: str) -> None:
        folder = self.picture(name, 0).parent
        for path in folder.glob("*") if folder.is_dir() else ():
            path.unlink(missing_ok=True)
        if folder.is_dir():
            folder.rmdir()

    def picture(self, name: str, index: int) -> Path:
        """Where a picture lies; the file's kind is the job's format."""
        return self.folder / "pictures" / name / f"{index:04d}"

    def job(self, name: str) -> Kept | None:
        """A job by its id."""
        return self._one("id", name)

    def by_key(self, key: str) -> Kept | None:
        """A job by the idempotency key it came with."""
        return self._one("key", key)

    def unfinished(self) -> list[Kept]:
        """Those that a crash has left, oldest first."""
        rows = self._execute(
            "SELECT * FROM jobs WHERE status IN ('queued', 'generating') ORDER BY created", ()
        )
        return [_kept(row) for row in rows]

    def close(self) -> None:
        """Give the file back."""
        with self._lock:
            self._db.close()

    def _one(self, column: str, value: str) -> Kept | None:
        rows = self._execute(f"SELECT * FROM jobs WHERE {column} = ?", (value,))
        return _kept(rows[0]) if rows else None

    def _execute(self, statement: str, values: Sequence[Any]) -> list[sqlite3.Row]:
        try:
            with self._lock, self._db:
                self._db.row_factory = sqlite3.Row
                return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"{self.folder} cannot be used for jobs: {error}") from error


def _kept(row: sqlite3.Row) -> Kept:
    return Kept(
        id=row["id"],
        model=row["model"],
        body=json.loads(row["body"]),
        format=row["format"],
        priority=row["priority"],
        created=row["created"],
        status=Status(row["status"]),
        told=None if row["told"] is None else json.loads(row["told"]),
    )
