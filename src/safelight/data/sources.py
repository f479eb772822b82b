"""Sources of pictures with captions, all behind one small interface.

A :class:`Source` has a length, and gives for an index the picture's bytes and its captions. What
order they are shown in, how they are cropped and what happens to bad ones is
:mod:`safelight.data.reader`'s business. :func:`open_source` finds out what a path is:

- a folder of pictures, captions in sidecar ``.txt`` files or in ``metadata.jsonl|csv|parquet``
  (the layout of Hugging Face's ``imagefolder``);
- WebDataset shards, as img2dataset writes them (:mod:`safelight.data.shards`);
- Hugging Face ``datasets``: Parquet with pictures inside, or a ``save_to_disk`` folder
  (:mod:`safelight.data.arrow`);
- ``stilllife:SPLIT:SEED:COUNT``, drawn on the spot.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from safelight.data import stilllife
from safelight.data.tables import Bad, rows
from safelight.errors import InvalidRequest, SafelightError
from safelight.store.pictures import encode, open_picture

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTIONS = ("text", "caption", "TEXT", "captions", "prompt", "description", "top_caption")
"""Columns and JSON fields that hold captions, the best first."""
FILES = ("file_name", "file", "path", "image")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class BadSample(SafelightError):
    """A picture or caption that cannot be used; readers skip, count and list it."""


class Source(ABC):
    """Pictures with captions, by index.

    Attributes:
        name: where it comes from, for reports and manifests.
        bad: what could not even be counted as a sample (broken metadata lines, cut-off shards).
    """

    name: str
    bad: Bad

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """A name for this sample that stays the same from run to run."""

    @abstractmethod
    def data(self, index: int) -> bytes:
        """The picture's file. Raises :class:`BadSample`."""

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """All captions, stripped, without empty ones. Raises :class:`BadSample`."""

    def picture(self, index: int) -> Image.Image:
        """The picture as RGB, the right way up. Raises :class:`BadSample`."""
        try:
            return open_picture(self.data(index), field="picture")
        except InvalidRequest as error:
            raise BadSample(error.problem) from error

    def size(self, index: int) -> tuple[int, int]:
        """Width and height, from the header alone. Raises :class:`BadSample`."""
        try:
            with Image.open(io.BytesIO(self.data(index))) as image:
                turned = image.getexif().get(0x0112) in _TURNED
                width, height = image.size
                return (height, width) if turned else (width, height)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BadSample(f"is not a picture: {error}") from error


def clean_captions(value: Any) -> tuple[str, ...]:
    """A field's captions: a string, or a list of them; whitespace collapsed, empty ones gone."""
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = (" ".join(v.split()) for v in values if isinstance(v, str))
    return tuple(t for t in texts if t)


def captions_in(row: dict[str, Any], column: str | None) -> tuple[str, ...]:
    """The captions of a row: of ``column``, or of the first of :data:`CAPTIONS` that has any."""
    for name in (column,) if column else CAPTIONS:
        if found := clean_captions(row.get(name)):
            return found
    return ()


class Folder(Source):
    """A folder of pictures, at any depth, in the order of their paths."""

    def __init__(self, folder: str | Path, *, caption: str | None = None) -> None:
        self.root, self.name, self.bad = Path(folder), str(folder), Bad()
        self._captions: dict[str, tuple[str, ...]] = {}
        names = {
            p.relative_to(self.root).as_posix()
            for p in self.root.rglob("*")
            if p.suffix.lower() in ENDINGS and p.is_file()
        }
        for file in sorted(p for name in _METADATA for p in self.root.rglob(name)):
            names |= self._read_metadata(file, caption)
        self._names = sorted(names)

    def _read_metadata(self, file: Path, caption: str | None) -> set[str]:
        """Captions from a metadata file, whose paths are relative to it; returns the paths."""
        top, found = self.root.resolve(), set()
        for number, row in rows(file, self.bad):
            theirs = next((row[f] for f in FILES if isinstance(row.get(f), str)), None)
            if not theirs:
                self.bad.add(f"{file}:{number}", f"names no file ({', '.join(FILES)})")
                continue
            path = (file.parent / theirs).resolve()
            if not path.is_relative_to(top):
                self.bad.add(f"{file}:{number}", f"{theirs} lies outside the folder")
                continue
            name = path.relative_to(top).as_posix()
            self._captions[name] = captions_in(row, caption)
            found.add(name)
        return found

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return self._names[index]

    def data(self, index: int) -> bytes:
        try:
            return (self.root / self._names[index]).read_bytes()
        except OSError as error:
            raise BadSample(f"cannot be read: {error.strerror}") from error

    def captions(self, index: int) -> tuple[str, ...]:
        name = self._names[index]
        if found := self._captions.get(name):
            return found
        for ending in (".txt", ".caption"):
            try:
                text = (self.root / name).with_suffix(ending).read_text(encoding="utf-8-sig")
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                raise BadSample(f"its caption cannot be read: {error}") from error
            return clean_captions(text)
        return ()


class StillLife(Source):
    """The procedural world, drawn when it is asked for."""

    def __init__(
        self, split: stilllife.Split = "train", seed: int = 1, count: int = 1000, size: int = 64
    ) -> None:
        self.split: stilllife.Split = split
        self.seed, self.count, self.side = seed, count, size
        self.name, self.bad = f"stilllife:{split}:{seed}:{count}", Bad()

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"{self.split}-{self.seed}-{index:07d}"

    def picture(self, index: int) -> Image.Image:
        scene = stilllife.scene(self.seed, index, self.split)
        return Image.fromarray(stilllife.render([scene], self.side)[0])

    def data(self, index: int) -> bytes:
        return encode(self.picture(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return (stilllife.plain_caption(stilllife.scene(self.seed, index, self.split)),)

    def size(self, index: int) -> tuple[int, int]:
        return self.side, self.side


class Subset(Source):
    """Some samples of another source."""

    def __init__(self, source: Source, places: Sequence[int]) -> None:
        self.source, self.places = source, places
        self.name, self.bad = source.name, source.bad

    def __len__(self) -> int:
        return len(self.places)

    def key(self, index: int) -> str:
        return self.source.key(self.places[index])

    def data(self, index: int) -> bytes:
        return self.source.data(self.places[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(self.places[index])

    def picture(self, index: int) -> Image.Image:
        return self.source.picture(self.places[index])

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size(self.places[index])


def without(source: Source, drop: Collection[str]) -> Source:
    """The source without the samples of these keys, such as a list of duplicates."""
    drop = set(drop)
    return Subset(source, [i for i in range(len(source)) if source.key(i) not in drop])


def read_keys(path: str | Path) -> set[str]:
    """The keys in a list such as ``safelight data dedup`` writes: one a line.

    Raises:
        InvalidRequest: the file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidRequest("exclude", f"{path} cannot be read: {error}.") from error
    return {line for line in lines if line}


def open_source(
    path: str | Path,
    *,
    caption: str | None = None,
    split: str | None = None,
    exclude: str | Path | None = None,
) -> Source:
    """Whatever lies at ``path`` as a source.

    Args:
        path: a folder, a ``.tar`` or ``.parquet`` file, ``shards/{00000..00127}.tar``, or
            ``stilllife:SPLIT:SEED:COUNT``.
        caption: the column or field that holds captions; default: the first of
            :data:`CAPTIONS`.
        split: of a ``datasets`` folder with several.
        exclude: a file of keys to leave out, one a line.

    Raises:
        InvalidRequest: there is nothing there, or no picture in it.
    """
    source = _open(str(path), caption, split)
    source.name = str(path)  # what opens it again
    if len(source) == 0:
        raise InvalidRequest("data", f"{path} holds no pictures.", f"Known: {', '.join(ENDINGS)}.")
    return source if exclude is None else without(source, read_keys(exclude))


def _open(path: str, caption: str | None, split: str | None) -> Source:
    from safelight.data.arrow import ArrowRows, arrow_files
    from safelight.data.shards import Shards, expand

    if path.startswith("stilllife:"):
        return _still_life(path)
    if "{" in path or path.endswith(".tar"):
        return Shards(expand(path), caption=caption)
    place = Path(path)
    if not place.exists():
        raise InvalidRequest("data", f"no folder or file {path}.")
    if files := arrow_files(place, split):
        return ArrowRows(files, name=path, caption=caption)
    if place.is_file():
        raise InvalidRequest("data", f"{path} is no folder, .tar or .parquet of pictures.")
    if tars := sorted(place.glob("*.tar")):
        return Shards(tars, caption=caption)
    return Folder(place, caption=caption)


def _still_life(path: str) -> StillLife:
    match = re.fullmatch(r"stilllife:(train|val|combo|pair|all)(?::(\d+))?(?::(\d+))?", path)
    if not match:
        raise InvalidRequest("data", f"cannot read {path!r}.", "stilllife:SPLIT:SEED:COUNT")
    split, seed, count = match.groups()
    return StillLife(split, int(seed or 1), int(count or 1000))  # type: ignore[arg-type]
