"""Tables out: Parquet, JSONL, CSV, or addresses alone. A file appears when it is complete."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safelight.data.tables import pyarrow
from safelight.errors import InvalidRequest

ENDINGS = (".parquet", ".jsonl", ".csv", ".txt")


class Writer:
    """Takes batches; with no path it takes them and does nothing."""

    def __init__(self, path: Path | None, schema: Any, extra: str | None) -> None:
        self.path, self.extra = path, extra
        self._file: Any = None
        self._table: Any = None
        if path is None:
            return
        pa = pyarrow("writing tables")
        self._pa = pa
        self.schema = schema.append(pa.field(extra, pa.string())) if extra else schema
        self._part = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".parquet":
            self._table = pa.parquet.ParquetWriter(self._part, self.schema)
        else:
            self._file = self._part.open("w", encoding="utf-8", newline="")
            if path.suffix.lower() == ".csv":
                csv.writer(self._file).writerow(self.schema.names)

    def write(self, batch: Any, mask: np.ndarray, more: Sequence[str] = ()) -> None:
        """The rows of ``batch`` under ``mask``; ``more`` fills the extra column."""
        if self.path is None or not mask.any():
            return
        chosen = batch.filter(self._pa.array(mask))
        if self.extra:
            arrays = [*chosen.columns, self._pa.array(list(more), self._pa.string())]
            chosen = self._pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        if self._table is not None:
            self._table.write_batch(chosen)
        elif self.path.suffix.lower() == ".txt":
            self._file.writelines(f"{url}\n" for url in chosen.column("URL").to_pylist())
        elif self.path.suffix.lower() == ".csv":
            csv.writer(self._file).writerows(zip(*map(_plain, chosen.columns), strict=True))
        else:
            for row in chosen.to_pylist():
                there = {k: v for k, v in row.items() if v is not None}
                self._file.write(json.dumps(there, ensure_ascii=False, default=str) + "\n")

    def _close(self) -> None:
        for open_ in (self._table, self._file):
            if open_ is not None:
                open_.close()

    def finish(self) -> None:
        """Everything is written: the file takes its name."""
        if self.path is not None:
            self._close()
            os.replace(self._part, self.path)

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self.path is not None:
            self._close()
            self._part.unlink(missing_ok=True)


def _plain(column: Any) -> list[Any]:
    return ["" if v is None else v for v in column.to_pylist()]


def open_writer(
    path: str | Path | None, schema: Any, inputs: Sequence[Path], *, extra: str | None = None
) -> Writer:
    """A writer by the path's ending.

    Args:
        path: where to; None throws everything away.
        schema: of the batches.
        inputs: files being read, which must not be written over.
        extra: a further column of words.

    Raises:
        InvalidRequest: an unknown ending, or the path is one of the inputs.
    """
    if path is None:
        return Writer(None, schema, None)
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise InvalidRequest("output", f"cannot write {path}.", f"Use {', '.join(ENDINGS)}.")
    if path.resolve() in {p.resolve() for p in inputs}:
        raise InvalidRequest("output", f"{path} is also an input.", "Name another file.")
    return Writer(path, schema, extra)
