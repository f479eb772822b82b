"""Copies of training pictures, as Markdown, JSON and a sheet of the nearest pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from safelight.data.sheet import picture_sheet
from safelight.data.sources import BadSample
from safelight.evaluate.memorisation import Copying, Near, Training, copying
from safelight.evaluate.score import Share
from safelight.store.pictures import save

SCHEMA = 1
SHOWN = 16
"""Pairs on a sheet, the nearest first."""


@dataclass
class Findings:
    """One set of pictures, compared with the training pictures."""

    name: str
    near: list[Near] = field(default_factory=list)
    nearest: list[tuple[Near, Image.Image]] = field(default_factory=list)
    """Those with the smallest pixel distances."""
    flagged: int = 0

    def add(self, found: Near, picture: Image.Image) -> None:
        """One more picture; only the nearest are kept."""
        self.near.append(found)
        self.nearest.append((found, picture))
        if len(self.nearest) > 8 * SHOWN:
            self.trim()

    def trim(self) -> None:
        """Keep the nearest alone."""
        self.nearest = sorted(self.nearest, key=lambda row: row[0].pixel_distance)[:SHOWN]


def markdown(training: Training, sets: Sequence[Findings], *, pixels: float, cosine: float) -> str:
    """A row for each set and space."""
    lines = [
        f"{len(training.index)} training pictures, {training.duplicated} of them there more than "
        f"once. A copy: at most {pixels:g} in pixels, cosine of at least {cosine:g}.",
        "",
        "| pictures | space | copies | of one there once | of one there more often | copied |",
        "|" + "---|" * 6,
    ]
    for some in sets:
        for space, c in copying(some.near, pixels=pixels, cosine=cosine).items():
            lines.append(
                f"| {some.name}, {len(some.near)} | {space} | {c.all} | {c.once} | {c.often} "
                f"| {c.extracted} different |"
            )
        if some.flagged:
            lines.append(f"| {some.name} | | {some.flagged} flagged: left out | | | |")
    return "\n".join(lines) + "\n"


def as_json(
    training: Training, sets: Sequence[Findings], *, pixels: float, cosine: float, **settings: Any
) -> dict[str, Any]:
    """All numbers."""
    return {
        "schema": SCHEMA,
        "settings": {"pixels": pixels, "cosine": cosine, **settings},
        "training": {
            "source": training.source.name,
            "pictures": len(training.index),
            "duplicated": training.duplicated,
            "clip": training.index.about["clip"],
        },
        "sets": {
            some.name: {
                "pictures": len(some.near),
                "flagged": some.flagged,
                "copying": _rates(copying(some.near, pixels=pixels, cosine=cosine)),
                "nearest": [n.model_dump() for n in some.near],
            }
            for some in sets
        },
    }


def _rates(spaces: Mapping[str, Copying]) -> dict[str, Any]:
    return {
        space: {
            "all": _share(c.all),
            "once": _share(c.once),
            "often": _share(c.often),
            "extracted": c.extracted,
        }
        for space, c in spaces.items()
    }


def _share(share: Share) -> dict[str, Any]:
    return {
        "copies": share.right,
        "pictures": share.total,
        "wilson95": [round(v, 5) for v in share.interval],
    }


def sheet(training: Training, some: Findings, *, pixels: float, cosine: float) -> Image.Image:
    """The nearest pairs in rows: the picture, then its nearest in pixels and in embeddings."""
    some.trim()
    places = dict(zip(training.index.keys, training.index.about["places"], strict=True))

    def shown(key: str) -> Image.Image | None:
        try:
            return training.source.picture(places[key])
        except BadSample:
            return None

    pictures: list[Image.Image | None] = []
    words: list[str] = []
    for near, picture in some.nearest:
        mark = "COPY " if near.pixel_distance <= pixels else ""
        same = "COPY " if near.cosine >= cosine else ""
        pictures += [picture, shown(near.pixel_key), shown(near.cosine_key)]
        words += [
            near.name,
            f"{mark}pixels {near.pixel_distance:.3f}, there {near.pixel_copies}x: {near.pixel_key}",
            f"{same}cosine {near.cosine:.3f}, there {near.cosine_copies}x: {near.cosine_key}",
        ]
    return picture_sheet(pictures, words, size=160, columns=6)


def write(
    folder: Path,
    training: Training,
    sets: Sequence[Findings],
    *,
    pixels: float,
    cosine: float,
    **settings: Any,
) -> None:
    """``memorisation.json``, ``memorisation.md``, and a sheet of nearest pairs a set.

    The sheets are ``nearest-generated.png`` and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limits = {"pixels": pixels, "cosine": cosine}
    document = as_json(training, sets, **limits, **settings)
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    (folder / "memorisation.json").write_text(text, encoding="utf-8")
    (folder / "memorisation.md").write_text(markdown(training, sets, **limits), encoding="utf-8")
    for some in sets:
        if some.near:
            name = f"nearest-{some.name.replace(' ', '-')}.png"
            save(folder / name, sheet(training, some, **limits))
