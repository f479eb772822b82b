"""Feature vectors in a file that grows, and that a kill may cut off anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

_WIDTH = np.dtype("<u4")
_VALUE = np.dtype("<f4")


class RowFile:
    """Float32 vectors of one width: four bytes of width, then the rows; half a row counts for none.

    Args:
        path: need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.width, self._rows = path, 0, 0
        size = path.stat().st_size if path.exists() else 0
        if size >= _WIDTH.itemsize:
            self.width = int(np.fromfile(path, _WIDTH, 1)[0])
        if self.width:
            self._rows = (size - _WIDTH.itemsize) // (self.width * _VALUE.itemsize)

    def __len__(self) -> int:
        return self._rows

    def cut(self, rows: int) -> None:
        """Keep the first rows alone."""
        if not self.path.exists():
            return
        self._rows = min(rows, self._rows)
        whole = _WIDTH.itemsize + self._rows * self.width * _VALUE.itemsize
        os.truncate(self.path, whole if self._rows else 0)

    def add(self, rows: np.ndarray) -> None:
        """Write more rows ``(N, width)`` behind the last."""
        if self._rows and rows.shape[1] != self.width:
            raise ValueError(f"rows of {rows.shape[1]}, the file has {self.width}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if not self._rows:
                file.write(np.array([rows.shape[1]], _WIDTH).tobytes())
            file.write(np.ascontiguousarray(rows, _VALUE).tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.width = rows.shape[1]
        self._rows += len(rows)

    def read(self) -> np.ndarray:
        """All rows, float32 ``(N, width)``."""
        values = np.fromfile(self.path, _VALUE, self._rows * self.width, offset=_WIDTH.itemsize)
        return values.reshape(self._rows, self.width)
