"""Tables of pictures: Parquet, JSONL and CSV, read a batch at a time under one set of names.

LAION's files name the same columns differently from release to release (``WIDTH`` and ``width``,
``AESTHETIC_SCORE`` and ``aesthetic``), and img2dataset renames them once more (``original_width``
is the size on the web, ``width`` that of the stored picture). :data:`COLUMNS` knows them all.
A bad row or file is listed in :class:`Bad` and passed over.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.errors import InvalidRequest, MissingExtra

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = (".parquet", ".jsonl", ".csv", ".tsv")
BATCH = 65_536

COLUMNS: dict[str, tuple[str, ...]] = {
    "URL": ("url", "image_url", "image_link"),
    "TEXT": ("text", "caption", "top_caption"),
    "WIDTH": ("original_width", "width", "image_width"),
    "HEIGHT": ("original_height", "height", "image_height"),
    "LANGUAGE": ("language", "lang"),
    "NSFW": ("nsfw",),
    "similarity": ("similarity", "clip_similarity", "clip_similarity_vitb32"),
    "pwatermark": ("pwatermark", "watermark", "watermark_score"),
    "punsafe": ("punsafe", "unsafe", "nsfw_score"),
    "AESTHETIC_SCORE": ("aesthetic_score", "aesthetic_score_v2", "aesthetics_score"),
    "aesthetic": ("aesthetic", "aesthetic_score_v1"),
}
"""Our name of a column (what img2dataset's own examples use), then the names it goes by, in
lower case, the best first. ``AESTHETIC_SCORE`` is of LAION's second predictor, ``aesthetic`` of its
first: two scales that must not be mixed."""

WORDS = ("URL", "TEXT", "LANGUAGE", "NSFW")
"""The columns of :data:`COLUMNS` that hold words; the others hold numbers."""

_NOISE = ("__index_level_0__",)


@dataclass
class Bad:
    """What was passed over: counted, and the first ones listed."""

    limit: int = 1000
    count: int = 0
    listed: list[dict[str, str]] = field(default_factory=list)

    def add(self, where: object, why: object) -> None:
        """One more: where it is, and what is wrong with it."""
        self.count += 1
        if len(self.listed) < self.limit:
            self.listed.append({"where": str(where), "why": str(why)[:300]})


def pyarrow(feature: str) -> Any:
    """The package, or an error that says how to get it."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra(feature, "train") from None
    return pa


def files_of(paths: Sequence[str | Path]) -> list[Path]:
    """The tables among ``paths``: files as they are, folders by what lies in them.

    Raises:
        InvalidRequest: a path does not exist, holds no table, or has an unknown ending.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS)
            if not inside:
                raise InvalidRequest("tables", f"{path} holds none of {', '.join(ENDINGS)}.")
            found += inside
        elif not path.exists():
            raise InvalidRequest("tables", f"no file {path}.")
        elif path.suffix.lower() not in ENDINGS:
            raise InvalidRequest("tables", f"{path} is none of {', '.join(ENDINGS)}.")
        else:
            found.append(path)
    if not found:
        raise InvalidRequest("tables", "none are given.", "Name files or folders.")
    return found


def mapping(names: Iterable[str]) -> dict[str, str]:
    """Our name to the file's, for the columns of :data:`COLUMNS` that a table has."""
    lower: dict[str, str] = {}
    for name in names:
        lower.setdefault(name.lower(), name)
    found: dict[str, str] = {}
    for ours, aliases in COLUMNS.items():
        for alias in aliases:
            if alias in lower:
                found[ours] = lower[alias]
                break
    return found


def rows(path: Path, bad: Bad) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of any table as (line or row number from 1, fields); bad lines are listed."""
    ending = path.suffix.lower()
    if ending == ".parquet":
        pa = pyarrow("reading Parquet")
        number = 0
        for batch in pa.parquet.ParquetFile(path).iter_batches(BATCH):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    elif ending == ".jsonl":
        yield from _json_rows(path, bad)
    else:
        yield from _csv_rows(path, bad, "\t" if ending == ".tsv" else ",")


def _json_rows(path: Path, bad: Bad) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                bad.add(f"{path}:{number}", error)
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                bad.add(f"{path}:{number}", "is not an object")


def _csv_rows(path: Path, bad: Bad, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        header = next(reader, None)
        if not header:
            bad.add(path, "has no header")
            return
        while True:
            try:
                line = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                bad.add(f"{path}:{reader.line_num}", error)
                continue
            if len(line) == len(header):
                yield reader.line_num, dict(zip(header, line, strict=True))
            elif line:
                bad.add(
                    f"{path}:{reader.line_num}", f"{len(line)} fields, the header has {len(header)}"
                )


class Tables:
    """Many tables as one: batches with our names and types, whatever the files call them.

    Attributes:
        files: the tables that can be read.
        names: for each of them, our column names to its own.
        schema: of every batch: the known columns that any file has, then the files' others.
        bad: rows and files that were passed over.
    """

    def __init__(self, paths: Sequence[str | Path], bad: Bad | None = None) -> None:
        self._pa = pyarrow("filtering tables")
        self.bad = Bad() if bad is None else bad
        self.files: list[Path] = []
        self.names: list[dict[str, str]] = []
        self._fields: list[list[Any]] = []
        for path in files_of(paths):
            try:
                fields = self._fields_of(path)
            except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors too
                self.bad.add(path, error)
                continue
            self.files.append(path)
            self._fields.append(fields)
            self.names.append(mapping(f.name for f in fields))
        if not self.files:
            raise InvalidRequest(
                "tables", f"none can be read: {self.bad.listed[0]['why']}", "Are they complete?"
            )
        self.schema = self._union()

    def batches(self, index: int, size: int = BATCH) -> Iterator[pa.RecordBatch]:
        """Batches of file number ``index``. A file that breaks off is listed, not fatal."""
        path = self.files[index]
        try:
            if path.suffix.lower() == ".parquet":
                for batch in self._pa.parquet.ParquetFile(path).iter_batches(size):
                    yield self._shaped(batch, index)
                return
            stream = (row for _, row in rows(path, self.bad))
            while part := list(islice(stream, size)):
                yield self._shaped(self._from_rows(part, index), index)
        except (OSError, ValueError) as error:
            self.bad.add(path, f"breaks off: {error}")

    def _fields_of(self, path: Path) -> list[Any]:
        pa = self._pa
        if path.suffix.lower() == ".parquet":
            return [f for f in pa.parquet.read_schema(path) if f.name not in _NOISE]
        names: dict[str, None] = {}
        for _, row in islice(rows(path, Bad()), 1000):
            names.update(dict.fromkeys(row))
        if not names:
            raise ValueError("holds no row that can be read")
        return [pa.field(name, pa.string()) for name in names]

    def _union(self) -> Any:
        pa = self._pa
        known = {ours for names in self.names for ours in names}
        fields = [
            pa.field(ours, pa.string() if ours in WORDS else pa.float64())
            for ours in COLUMNS
            if ours in known
        ]
        others: dict[str, Any] = {}
        for columns, names in zip(self._fields, self.names, strict=True):
            for column in columns:
                if column.name in names.values() or column.name in COLUMNS:
                    continue
                kind = others.setdefault(column.name, column.type)
                if kind != column.type:
                    others[column.name] = pa.string()
        return pa.schema([*fields, *(pa.field(n, t) for n, t in others.items())])

    def _from_rows(self, part: list[dict[str, Any]], index: int) -> Any:
        pa = self._pa
        columns = {
            f.name: pa.array([_word(row.get(f.name)) for row in part], pa.string())
            for f in self._fields[index]
        }
        return pa.RecordBatch.from_pydict(columns)

    def _shaped(self, batch: Any, index: int) -> Any:
        pa, names = self._pa, self.names[index]
        columns = []
        for field_ in self.schema:
            theirs = names.get(field_.name, field_.name)
            at = batch.schema.get_field_index(theirs)
            if at < 0:
                columns.append(pa.nulls(batch.num_rows, field_.type))
            else:
                columns.append(_cast(pa, batch.column(at), field_.type))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def _word(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def number(value: Any) -> float | None:
    """A number that may be written as words; None where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _cast(pa: Any, column: Any, kind: Any) -> Any:
    if column.type == kind:
        return column
    try:
        return column.cast(kind, safe=False)
    except pa.ArrowInvalid:  # words where numbers belong: what can be read is
        if pa.types.is_floating(kind):
            return pa.array([number(v) for v in column.to_pylist()], kind)
        return pa.array([_word(v) for v in column.to_pylist()], pa.string()).cast(kind)
    except pa.ArrowNotImplementedError:  # nested values, as JSON
        return pa.array([_word(v) for v in column.to_pylist()], kind)
