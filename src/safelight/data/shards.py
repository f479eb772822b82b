"""WebDataset shards: tar files whose members belong together by their name up to the first dot.

``000123.jpg``, ``000123.txt`` and ``000123.json`` are one sample (https://github.com/webdataset).
Headers are read once to learn where the members lie; after that every sample is one seek away, so
that shards have a length and any order, as folders do. Plain tar only: in a compressed one nothing
can be found without unpacking what is before it.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelight.data.sources import ENDINGS, BadSample, Source, captions_in, clean_captions
from safelight.data.tables import Bad
from safelight.errors import InvalidRequest

_PICTURES = frozenset(e.removeprefix(".") for e in ENDINGS)
_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstandard"}


def expand(pattern: str) -> list[Path]:
    """``shards/{00000..00127}.tar`` as its files."""
    match = _RANGE.search(pattern)
    if match is None:
        return [Path(pattern)]
    first, last = match.groups()
    head, tail = pattern[: match.start()], pattern[match.end() :]
    numbers = range(int(first), int(last) + 1)
    return [p for n in numbers for p in expand(f"{head}{n:0{len(first)}d}{tail}")]


@dataclass
class _Members:
    """Where one sample's members lie: ending to (offset, size)."""

    shard: int
    key: str
    at: dict[str, tuple[int, int]] = field(default_factory=dict)


class Shards(Source):
    """Samples of tar shards, in the order in which they lie there.

    Args:
        paths: the shards.
        caption: the field of the sample's ``.json``; default: its ``.txt``, then the usual fields.

    Raises:
        InvalidRequest: a shard is missing or compressed. One that breaks off is listed in ``bad``
            and gives what comes before.
    """

    def __init__(self, paths: Sequence[str | Path], *, caption: str | None = None) -> None:
        self.paths, self.bad, self._caption = [Path(p) for p in paths], Bad(), caption
        self.name = str(self.paths[0].parent) if len(self.paths) > 1 else str(self.paths[0])
        self._samples: list[_Members] = []
        for number, path in enumerate(self.paths):
            self._index(number, path)

    def _index(self, number: int, path: Path) -> None:
        try:
            with path.open("rb") as file:
                kind = _COMPRESSED.get(file.read(2))
        except OSError as error:
            raise InvalidRequest("data", f"{path} cannot be read: {error.strerror}.") from error
        if kind:
            raise InvalidRequest("data", f"{path} is compressed ({kind}).", "Unpack it first.")
        current: _Members | None = None
        size = path.stat().st_size
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    match = _NAME.match(member.name)
                    if not member.isfile() or match is None:
                        continue
                    key, ending = match.groups()
                    if member.offset_data + member.size > size:
                        self.bad.add(path, f"breaks off inside {member.name}")
                        break
                    if current is None or current.key != key:
                        self._close(current)
                        current = _Members(number, key)
                    current.at[ending.lower()] = member.offset_data, member.size
        except (tarfile.TarError, OSError, EOFError) as error:
            self.bad.add(path, f"breaks off: {error}")
        self._close(current)

    def _close(self, sample: _Members | None) -> None:
        """A sample's last member was seen. One without a picture is kept only in the list."""
        if sample is None:
            return
        if _PICTURES & sample.at.keys():
            self._samples.append(sample)
        else:
            self.bad.add(f"{self.paths[sample.shard]}/{sample.key}", "has no picture")

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        sample = self._samples[index]
        return f"{self.paths[sample.shard].name}/{sample.key}"

    def _read(self, sample: _Members, ending: str) -> bytes:
        offset, size = sample.at[ending]
        try:
            with self.paths[sample.shard].open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise BadSample(f"cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise BadSample("is cut off")
        return data

    def data(self, index: int) -> bytes:
        sample = self._samples[index]
        return self._read(sample, next(e for e in sample.at if e in _PICTURES))

    def fields(self, index: int) -> dict[str, Any]:
        """What the sample's ``.json`` says: with img2dataset size, address and scores."""
        sample = self._samples[index]
        if "json" not in sample.at:
            return {}
        try:
            fields = json.loads(self._read(sample, "json"))
        except ValueError as error:
            raise BadSample(f"its JSON is broken: {error}") from error
        return fields if isinstance(fields, dict) else {}

    def captions(self, index: int) -> tuple[str, ...]:
        sample = self._samples[index]
        if self._caption is None and "txt" in sample.at:
            try:
                return clean_captions(self._read(sample, "txt").decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise BadSample(f"its caption is not UTF-8: {error}") from error
        return captions_in(self.fields(index), self._caption)
