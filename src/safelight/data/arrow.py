"""Hugging Face ``datasets``: pictures inside Parquet files or Arrow files.

A picture is a struct of ``bytes`` and ``path`` (the ``Image`` feature). Two layouts on the disk:
Parquet files with such a column, as the hub stores them, and what ``save_to_disk`` writes: Arrow
streams beside ``state.json``, several splits under ``dataset_dict.json``.
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from safelight.data.sources import CAPTIONS, BadSample, Source, clean_captions
from safelight.data.tables import Bad, pyarrow
from safelight.errors import InvalidRequest

PICTURES = ("image", "jpg", "jpeg", "png", "webp", "picture", "img")


def arrow_files(place: Path, split: str | None) -> list[Path]:
    """The Parquet or Arrow files of a dataset at ``place``; empty where it is none.

    Raises:
        InvalidRequest: there are several splits and ``split`` names none of them.
    """
    if place.is_file():
        return [place] if place.suffix.lower() in (".parquet", ".arrow") else []
    if (place / "dataset_dict.json").is_file():
        splits: list[str] = json.loads((place / "dataset_dict.json").read_text())["splits"]
        return arrow_files(place / _pick(split, splits, place), None)
    if (place / "state.json").is_file():
        state = json.loads((place / "state.json").read_text())
        return [place / entry["filename"] for entry in state["_data_files"]]
    # ``data/train-00000-of-00004.parquet``, as on the hub; a metadata table holds no pictures.
    files = [p for p in sorted(place.rglob("*.parquet")) if p.name != "metadata.parquet"]
    files = [p for p in files if _holds_pictures(p)]
    splits = sorted({p.name.split("-")[0] for p in files if "-of-" in p.name})
    if len(splits) > 1 or (split is not None and splits):
        chosen = _pick(split, splits, place)
        files = [p for p in files if p.name.startswith(f"{chosen}-")]
    return files


def _pick(split: str | None, splits: Sequence[str], place: Path) -> str:
    if split is None and (len(splits) == 1 or "train" in splits):
        return splits[0] if len(splits) == 1 else "train"
    if split is None or split not in splits:
        problem = f"{place} has the splits {', '.join(splits)}, not {split}."
        raise InvalidRequest("split", problem, "Name one of them.")
    return split


def _holds_pictures(path: Path) -> bool:
    pa = pyarrow("reading Parquet")
    try:
        schema = pa.parquet.read_schema(path)
    except (OSError, ValueError):
        return False
    return any(
        _is_picture(pa, schema.field(name).type) for name in PICTURES if name in schema.names
    )


def _is_picture(pa: Any, kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


class ArrowRows(Source):
    """Rows of Parquet or Arrow files, in their order.

    Args:
        files: ``.parquet`` or ``.arrow``.
        name: for reports.
        caption: the column of captions; default: the first usual one.

    Raises:
        InvalidRequest: no column holds pictures or, where ``caption`` names one, captions. A file
            that cannot be opened is listed in ``bad``.
    """

    def __init__(self, files: Sequence[Path], *, name: str, caption: str | None = None) -> None:
        self._pa = pyarrow("reading datasets folders")
        self.name, self.bad, self._lock = name, Bad(), threading.Lock()
        self._files: list[Path] = []
        self._parts: list[Any] = []
        """Per part a table, or (file, row group) where it is read when asked for."""
        lengths: list[int] = []
        schema: Any = None
        for path in files:
            try:
                parts, counts, schema = self._open(path)
            except (OSError, ValueError) as error:
                self.bad.add(path, error)
                continue
            self._parts += parts
            lengths += counts
            self._files += [path] * len(parts)
        if schema is None:
            raise InvalidRequest("data", f"nothing in {name} can be read.", str(self.bad.listed))
        self._ends = list(accumulate(lengths))
        self._starts = [e - n for e, n in zip(self._ends, lengths, strict=True)]
        self._picture = self._column(schema, PICTURES, name)
        self._words = self._column(schema, (caption,), name) if caption else None
        if caption is None:
            self._words = next((c for c in CAPTIONS if c in schema.names), None)
        self._cache: tuple[int, Any] | None = None

    def _open(self, path: Path) -> tuple[list[Any], list[int], Any]:
        pa = self._pa
        if path.suffix.lower() == ".parquet":
            file = pa.parquet.ParquetFile(path)
            groups = range(file.metadata.num_row_groups)
            counts = [file.metadata.row_group(g).num_rows for g in groups]
            return [(path, g) for g in groups], counts, file.schema_arrow
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        return [table], [table.num_rows], table.schema

    def _column(self, schema: Any, names: Sequence[str], name: str) -> str:
        found = next((n for n in names if n in schema.names), None)
        if found is None:
            problem = f"{name} has no column {' or '.join(names)}; there are {schema.names}."
            raise InvalidRequest("data", problem)
        return found

    def _cell(self, index: int, column: str) -> Any:
        number = bisect_right(self._ends, index)
        part = self._parts[number]
        if isinstance(part, tuple):
            with self._lock:
                if self._cache is None or self._cache[0] != number:
                    path, group = part
                    names = [c for c in (self._picture, self._words) if c]
                    try:
                        file = self._pa.parquet.ParquetFile(path)
                        self._cache = number, file.read_row_group(group, columns=names)
                    except (OSError, ValueError) as error:
                        raise BadSample(f"cannot be read: {error}") from error
                part = self._cache[1]
        return part.column(column)[index - self._starts[number]].as_py()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def key(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        file = self._files[number]
        return f"{file.name}/{index - self._starts[self._files.index(file)]}"

    def data(self, index: int) -> bytes:
        cell = self._cell(index, self._picture)
        if isinstance(cell, dict):
            if cell.get("bytes") is None and cell.get("path"):
                try:
                    return (self._files[0].parent / cell["path"]).read_bytes()
                except OSError as error:
                    raise BadSample(f"cannot be read: {error.strerror}") from error
            cell = cell.get("bytes")
        if not cell:
            raise BadSample("the row holds no picture")
        return cell

    def captions(self, index: int) -> tuple[str, ...]:
        return clean_captions(self._cell(index, self._words)) if self._words else ()
