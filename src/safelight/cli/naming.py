"""Names of the files that pictures are written to. Nothing is overwritten unless it was named."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight.errors import InvalidRequest
from safelight.store.pictures import FORMATS

ENDINGS = {ending: name.lower() for ending, name in FORMATS.items()}
FIELDS = ("number", "seed", "prompt", "model", "sampler", "steps", "scale", "width", "height")
PATTERN = "{number}-{seed}"
FOLDER = Path("outputs")


@dataclass(frozen=True)
class Naming:
    """Where pictures go: one named file, or a folder and a pattern.

    Args:
        file: the name that was asked for; with several pictures each gets its seed behind it.
        ending: of the files, with the dot.
    """

    folder: Path
    ending: str
    file: Path | None = None
    pattern: str = PATTERN

    def path(self, fields: Mapping[str, Any], *, alone: bool) -> Path:
        """The file of one picture; parent folders are made.

        Args:
            fields: values of :data:`FIELDS` except ``number``.
            alone: it is the only picture of its call.
        """
        if self.file is not None:
            if alone:
                return _made(self.file)
            return _made(self.file.with_stem(f"{self.file.stem}-{fields['seed']}"))
        number = _next_number(self.folder)
        while True:
            values = {k: _slug(v) for k, v in fields.items()}
            name = self.pattern.format(number=f"{number:05d}", **values)
            path = self.folder / f"{name}{self.ending}"
            if not path.exists():
                return _made(path)
            if "{number" not in self.pattern:  # would be the same name for ever
                return _made(_free(path))
            number += 1

    def beside(self, first: Path, word: str) -> Path:
        """A name for something that belongs to the picture at ``first``: a grid, a preview."""
        return _made(_free(first.with_name(f"{first.stem}-{word}{self.ending}")))


def plan(output: Path | None, picture_format: str | None, pattern: str | None) -> Naming:
    """Checked before anything is loaded.

    Raises:
        InvalidRequest: an unknown format or pattern, or an output that cannot be written to.
    """
    by_format = {name: ending for ending, name in reversed(ENDINGS.items())}  # jpeg: .jpg
    if picture_format is not None and picture_format not in by_format:
        raise InvalidRequest(
            "format", f"{picture_format!r} is unknown.", f"One of {', '.join(sorted(by_format))}."
        )
    ending = by_format[picture_format or "png"]
    _check_pattern(pattern or PATTERN)
    if output is None:
        output = FOLDER
    is_file = bool(output.suffix) and not output.is_dir()
    if is_file:
        if output.suffix.lower() not in ENDINGS:
            raise InvalidRequest(
                "output",
                f"{output} ends in {output.suffix}, which is no format.",
                "Name it .png, .jpg or .webp, or name a folder.",
            )
        if picture_format not in (None, ENDINGS[output.suffix.lower()]):
            raise InvalidRequest("format", f"is {picture_format}, but the output is {output}.")
        if pattern is not None:
            raise InvalidRequest("name-pattern", f"has no use: the output is the file {output}.")
    folder = output.parent if is_file else output
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise InvalidRequest("output", f"{place} is a file, not a folder.")
            break
    if is_file:
        return Naming(folder, output.suffix, file=output)
    return Naming(folder, ending, pattern=pattern or PATTERN)


def _check_pattern(pattern: str) -> None:
    try:
        used = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise InvalidRequest("name-pattern", f"{pattern!r}: {error}.") from None
    for name in used:
        if name not in FIELDS:
            raise InvalidRequest(
                "name-pattern",
                f"there is no {{{name}}}.",
                f"There are {', '.join(f'{{{f}}}' for f in FIELDS)}.",
            )
    if not pattern.strip() or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise InvalidRequest("name-pattern", f"{pattern!r} leaves the output folder.")
    try:
        pattern.format(**dict.fromkeys(FIELDS, "x"))
    except (ValueError, IndexError, KeyError) as error:
        raise InvalidRequest("name-pattern", f"{pattern!r}: {error}.") from None


def _slug(value: object) -> str:
    """``value`` as part of a file name, on every system."""
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-.")[:80] or "x"


def _next_number(folder: Path) -> int:
    found = (re.match(r"(\d{5})\b", p.name) for p in folder.glob("*")) if folder.is_dir() else ()
    return 1 + max((int(match[1]) for match in found if match), default=0)


def _free(path: Path) -> Path:
    """``path``, or the first of its kind that nobody has taken."""
    free, k = path, 2
    while free.exists():
        free, k = path.with_stem(f"{path.stem}-{k}"), k + 1
    return free


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
