"""What a checker of one's own is to find: a file of concepts, and pictures sorted by hand.

A concept is a sentence, several, or example pictures. A text file holds one sentence a line
(``special: `` before it makes it a special concept); a TOML file says more::

    [[concept]]
    name = "a red cube"
    sentences = ["a red cube", "a large red cube"]  # or: pictures = "examples/red-cubes"
    threshold = 0.24  # optional: else chosen from examples
    special = false
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError

from safelight.errors import InvalidRequest
from safelight.spec import Record
from safelight.store.pictures import open_picture

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST, MOST_SPECIAL = 17, 3
"""The published checker's numbers: with no more than these, diffusers loads it too."""
_SPECIAL = "special:"


class Concept(Record):
    """One thing to look for."""

    name: str
    sentences: tuple[str, ...] = ()
    pictures: Path | None = None
    """A picture, or a folder of them."""
    threshold: float | None = None
    """Cosine similarity above which it is there."""
    special: bool = False


def read_concepts(file: Path) -> list[Concept]:
    """The concepts of a file, special ones last.

    Raises:
        InvalidRequest: the file or a concept in it makes no sense.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("concepts", f"{file} cannot be read: {error}.") from None
    found = _from_toml(text, file) if file.suffix == ".toml" else _from_lines(text)
    for concept in found:
        if bool(concept.sentences) == (concept.pictures is not None):
            raise InvalidRequest(
                "concepts", f"{concept.name!r} needs sentences or pictures, one of the two."
            )
    plain = [c for c in found if not c.special]
    special = [c for c in found if c.special]
    if not plain:
        raise InvalidRequest("concepts", f"{file} names none.", "Write one sentence a line.")
    for kind, most, name in ((plain, MOST, "concepts"), (special, MOST_SPECIAL, "special ones")):
        if len(kind) > most:
            raise InvalidRequest("concepts", f"{len(kind)} {name}; a checker holds {most}.")
    return [*plain, *special]


def _from_lines(text: str) -> list[Concept]:
    lines = [line.strip() for line in text.splitlines()]
    found = []
    for line in lines:
        if line and not line.startswith("#"):
            special = line.startswith(_SPECIAL)
            sentence = line.removeprefix(_SPECIAL).strip()
            found.append(Concept(name=sentence, sentences=(sentence,), special=special))
    return found


def _from_toml(text: str, file: Path) -> list[Concept]:
    try:
        rows: list[dict[str, Any]] = tomllib.loads(text).get("concept", [])
        found = [Concept.model_validate(row) for row in rows]
    except (tomllib.TOMLDecodeError, ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        said = f"{first['loc']}: {first['msg']}" if first else str(error)
        raise InvalidRequest("concepts", f"{file}: {said}.") from None
    return [
        c if c.pictures is None else c.replace(pictures=file.parent / c.pictures) for c in found
    ]


def pictures_in(folder: Path, field: str) -> list[Path]:
    """A picture, or all below a folder, in order.

    Raises:
        InvalidRequest: there are none.
    """
    found = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    found = [path for path in found if path.suffix.lower() in PICTURES]
    if not found:
        raise InvalidRequest(field, f"{folder} holds no pictures.", f"Of {', '.join(PICTURES)}.")
    return found


def sorted_pictures(folder: Path, field: str) -> tuple[list[Path], list[Path]]:
    """The pictures of ``folder/safe`` and of ``folder/unsafe``."""
    for name in ("safe", "unsafe"):
        if not (folder / name).is_dir():
            raise InvalidRequest(field, f"{folder} has no folder {name}.", "Sort pictures into it.")
    return pictures_in(folder / "safe", field), pictures_in(folder / "unsafe", field)


def opened(paths: Sequence[Path], field: str) -> list[Image.Image]:
    """The pictures in files."""
    return [open_picture(path, field=field) for path in paths]
