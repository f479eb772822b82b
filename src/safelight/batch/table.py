"""A file of requests: CSV, JSON lines, JSON, Parquet or plain text, read a row at a time.

A row that cannot be read is a row all the same, with the reason in place of its fields: rows are
counted, and what is made of them is named, by their number.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from safelight.errors import InvalidRequest, MissingExtra

KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
MAX_JSON = 512 * 2**20
"""Bytes of a .json file, which is read whole; the other kinds have no limit."""
_BATCH = 256  # rows of a Parquet file in memory

SHORT = {
    **{"n": "negative_prompt", "w": "width", "h": "height", "d": "seed"},
    **{"s": "steps", "l": "guidance_scale", "t": "strength"},
}
"""kohya's options of one letter in a line of text."""
_OPTION = re.compile(r"(?:^|\s)--([A-Za-z][\w-]*)(?=\s|$)")


@dataclass(frozen=True)
class Entry:
    """One row of the file.

    Args:
        row: its number, from 1.
        line: where it is, for messages: ``line 3``, ``row 3``.
        fields: by column; columns without a value are left out.
        problem: why there are none.
        typed: values have types; otherwise all are text.
    """

    row: int
    line: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    typed: bool = True


@dataclass(frozen=True)
class Table:
    """A file that has been looked through once.

    Args:
        rows: how many it holds.
        columns: every name that a row uses, as it is written, by its plain form.
        digest: SHA-256 of the file, in hexadecimal.
    """

    path: Path
    kind: str
    rows: int
    columns: Mapping[str, str]
    digest: str

    def __iter__(self) -> Iterator[Entry]:
        """The rows, in order; one at a time in memory, but for a .json, which is read whole."""
        return _READERS[self.kind](self.path)


def open_table(path: Path) -> Table:
    """Look a file through: that it can be read, its rows, its columns.

    Raises:
        InvalidRequest: it is missing, of an unknown kind, or no table.
        MissingExtra: it is Parquet, and pyarrow is not installed.
    """
    kind = KINDS.get(path.suffix.lower())
    if not path.exists():
        raise InvalidRequest("file", f"no file {path}.")
    if not path.is_file():
        raise InvalidRequest("file", f"{path} is not a file.")
    if kind is None:
        raise InvalidRequest("file", f"{path} is of no known kind.", f"One of {', '.join(KINDS)}.")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if kind == "parquet":
            rows, columns = _parquet_head(path)
        else:
            rows, columns = 0, {}
            for entry in _READERS[kind](path):
                rows += 1
                for name in entry.fields:
                    columns.setdefault(name, name)
    except OSError as error:
        raise InvalidRequest("file", f"{path} cannot be read: {error.strerror or error}.") from None
    if not rows:
        raise InvalidRequest("file", f"{path} holds no rows.")
    return Table(path, kind, rows, _plainly(columns), digest)


def plain(name: str) -> str:
    """A column's name as the program knows it: ``Negative Prompt`` is ``negative_prompt``."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _plainly(names: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(plain(name), name)
    return found


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(4)
    return "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


# -- kinds --------------------------------------------------------------------------------------


def _csv(path: Path) -> Iterator[Entry]:
    # What is no UTF-8 reaches the fields, which refuse it: one row's fault is not the file's.
    with path.open(encoding=_encoding(path), errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=_delimiter(path, file))
        header = [name.strip() for name in next(reader, [])]
        _check_header(header)
        row = 0
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row += 1
                yield Entry(row, f"line {reader.line_num}", problem=f"is no CSV: {error}.")
                continue
            if not any(cells):
                continue
            row += 1
            where = f"line {reader.line_num}"
            if len(cells) != len(header):
                problem = f"has {len(cells)} cells where the header has {len(header)}."
                yield Entry(row, where, problem=problem)
                continue
            given = {n: c for n, c in zip(header, cells, strict=True) if c.strip()}
            yield Entry(row, where, given, typed=False)


def _delimiter(path: Path, file: IO[str]) -> str:
    """A tab, a comma, or the semicolon that spreadsheets write where the comma is decimal."""
    first = file.readline()
    file.seek(0)
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max((",", ";", "\t"), key=first.count)


def _check_header(header: list[str]) -> None:
    if not any(header):
        raise InvalidRequest("file", "has no header.", "Its first line names the columns.")
    seen: dict[str, str] = {}
    for name in header:
        if not name:
            raise InvalidRequest("file", "has a column without a name.")
        if plain(name) in seen:
            raise InvalidRequest(name, f"is there twice (as {seen[plain(name)]}).")
        seen[plain(name)] = name


def _jsonl(path: Path) -> Iterator[Entry]:
    row = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row += 1
            where = f"line {number}"
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield Entry(row, where, problem=f"is not JSON: {error}.")
                continue
            yield _of_json(row, where, value)


def _json(path: Path) -> Iterator[Entry]:
    if path.stat().st_size > MAX_JSON:
        raise InvalidRequest("file", f"{path} is too large to read whole.", "Write it as .jsonl.")
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("file", f"{path} is not JSON: {error}.") from None
    if not isinstance(found, list):
        raise InvalidRequest("file", f"{path} is not a list of rows.", "Write [{…}, {…}].")
    for row, value in enumerate(found, 1):
        yield _of_json(row, f"row {row}", value)


def _of_json(row: int, where: str, value: Any) -> Entry:
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        return Entry(row, where, problem="is neither an object nor a prompt.")
    return Entry(row, where, {n: v for n, v in value.items() if not _missing(v)})


def _parquet_head(path: Path) -> tuple[int, dict[str, str]]:
    file = _parquet_file(path)
    names = [name for name in file.schema_arrow.names if name != "__index_level_0__"]
    _check_header(names)
    return file.metadata.num_rows, dict.fromkeys(names, "") | {n: n for n in names}


def _parquet(path: Path) -> Iterator[Entry]:
    row = 0
    for batch in _parquet_file(path).iter_batches(_BATCH):
        for value in batch.to_pylist():
            row += 1
            value.pop("__index_level_0__", None)
            given = {name: each for name, each in value.items() if not _missing(each)}
            yield Entry(row, f"row {row}", given)


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ImportError:
        raise MissingExtra("reading Parquet", "train") from None
    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise InvalidRequest("file", f"{path} is no Parquet file: {error}.") from None


def _missing(value: Any) -> bool:
    """None, and the not-a-number that stands for it in tables of numbers."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(path: Path) -> Iterator[Entry]:
    row = 0
    with path.open(encoding=_encoding(path), errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            row += 1
            try:
                yield Entry(row, f"line {number}", read_line(line), typed=False)
            except ValueError as error:
                yield Entry(row, f"line {number}", problem=str(error))


def read_line(line: str) -> dict[str, str]:
    """A prompt, or a prompt and options as in A1111's "prompts from file" and kohya's scripts.

    ``a red cube``; ``--prompt "a red cube" --steps 20``; ``a red cube --n blurred --w 512``.
    An option reaches to the next one; quotes around it are taken off.

    Raises:
        ValueError: an option twice, or without a value.
    """
    found: dict[str, str] = {}
    # What is in double quotes is no option.
    marks = list(_OPTION.finditer(re.sub(r'"[^"]*"', lambda quoted: "_" * len(quoted[0]), line)))
    if not marks:
        return {"prompt": line}
    before = line[: marks[0].start()].strip()
    if before:
        found["prompt"] = before
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        name = SHORT.get(mark[1], mark[1])
        value = line[mark.end() : after.start() if after else len(line)].strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        if not value:
            raise ValueError(f"--{mark[1]} has no value.")
        if name in found:
            raise ValueError(f"--{mark[1]} is given twice.")
        found[name] = value
    return found


_READERS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    "csv": _csv,
    "jsonl": _jsonl,
    "json": _json,
    "parquet": _parquet,
    "text": _text,
}
