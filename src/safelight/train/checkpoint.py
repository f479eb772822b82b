"""Checkpoints on disk: whole or not there, checked, and pruned.

A file is written beside its place, synced, and then named with a digest of its bytes, so that a
name stands for a whole file: a process that is killed, or a disk that fills, leaves the ones
before it as they were. One that no longer matches its name is passed over when a run resumes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from safelight.errors import SafelightError

log = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d{12})-([0-9a-f]{16})\.pt")
_FIRST = "checkpoint.pt"
"""What the first version wrote: still read, no longer written."""


def save(folder: Path, seen: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write the state of a run after ``seen`` pictures, and drop all but the newest ``keep``.

    Raises:
        SafelightError: it could not be written; what was there is intact.
    """
    part = folder / "checkpoint.part"
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"checkpoint-{seen:012d}-{_digest(part)}.pt"
        part.replace(path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise SafelightError(
            f"{folder}: no checkpoint at {seen} pictures ({error}). Those before it are intact: "
            "make room and run the same command again."
        ) from error
    for old in _all(folder)[keep:]:
        old.unlink()
    (folder / _FIRST).unlink(missing_ok=True)
    return path


def newest(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The newest state that is whole; None where there is none.

    Raises:
        SafelightError: there are checkpoints, and not one of them can be read.
    """
    (folder / "checkpoint.part").unlink(missing_ok=True)
    found = _all(folder)
    if (folder / _FIRST).exists():
        found.append(folder / _FIRST)
    for path in found:
        named = _NAME.fullmatch(path.name)
        if named is not None and named[2] != _digest(path):
            log.warning("%s is damaged: falling back to the one before", path)
            continue
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch names no one kind for a file it cannot read
            log.warning("%s cannot be read (%s): falling back to the one before", path, error)
    if found:
        raise SafelightError(
            f"{folder}: none of its {len(found)} checkpoints is whole. Move them away to start "
            "from the beginning."
        )
    return None


def _all(folder: Path) -> list[Path]:
    """Checkpoints of a folder by their names, newest first."""
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
