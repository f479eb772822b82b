"""Duplicates among training pictures: equal files, pictures that look alike, that mean the same.

The cards admit that their data was not de-duplicated, and that duplicates are memorised
(https://rom1504.github.io/clip-retrieval/ shows it). Three tests, from sure to loose:

- ``exact``: the files' SHA-256;
- ``perceptual``: hashes of :mod:`safelight.data.hashing` within ``hamming`` bits: the same picture
  in another size, format or quality;
- ``embedding``: CLIP embeddings with a cosine of at least ``cosine`` (SemDeDup, Abbas et al. 2023,
  2303.09540, without its clustering: every pair is compared).

Of each group the largest picture stays (most pixels, then the largest file). A picture goes only if
it is *directly* near one that stays; being near is not passed on, so a chain of small changes does
not swallow a data set.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from safelight.data import hashing
from safelight.data.sources import BadSample, Source
from safelight.data.tables import Bad
from safelight.spec import Record

Method = Literal["exact", "perceptual", "embedding"]
METHODS: tuple[Method, ...] = ("exact", "perceptual", "embedding")
Embed = Callable[[list[Image.Image]], np.ndarray]
"""Pictures to embeddings of unit length ``(N, D)``."""
_BATCH, _BLOCK = 64, 1024


class Duplicate(Record):
    """A picture to drop."""

    key: str
    method: Method
    """The surest test that it fails."""
    measure: float
    """Bits of difference (``perceptual``), cosine (``embedding``), 0 (``exact``)."""


class Group(Record):
    """A picture that stays, and those that go for its sake."""

    keep: str
    drop: tuple[Duplicate, ...]


class DedupReport(Record):
    """What was found."""

    source: str
    samples: int
    kept: int
    found: dict[str, int]
    """Pictures to drop, by test."""
    groups: tuple[Group, ...]
    bad: int
    """Pictures that cannot be read; they are neither kept nor in the list to drop."""
    bad_listed: tuple[dict[str, str], ...]
    flat: int
    """Pictures of one plain colour, which the perceptual test passes over."""
    hamming: int = Field(ge=0, lt=hashing.BITS)
    cosine: float
    clip: str | None

    @property
    def drop(self) -> list[str]:
        """Keys to drop."""
        return [d.key for group in self.groups for d in group.drop]


def find_duplicates(
    source: Source,
    methods: Collection[Method] = ("exact", "perceptual"),
    *,
    hamming: int = 24,
    cosine: float = 0.98,
    mirrored: bool = False,
    embed: Embed | None = None,
    clip: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> DedupReport:
    """Look through a source once, and compare.

    Args:
        source: the pictures.
        methods: which tests.
        hamming: most bits of 256 in which copies' hashes differ. PDQ's authors advise 31 for
            photographs, with people looking at the result; the default is stricter.
        cosine: least cosine of embeddings.
        mirrored: the perceptual test also finds mirror images.
        embed: for the embedding test, :meth:`safelight.data.clip.CLIP.pictures`.
        clip: its name, for the report.
        progress: called with the number of pictures read since the last call.
    """
    if "embedding" in methods and embed is None:
        raise ValueError("the embedding test needs `embed`")
    seen = _look(source, methods, mirrored, embed, progress)
    edges: dict[tuple[int, int], tuple[Method, float]] = {}
    for method in METHODS:  # the surest first
        if method in methods:
            for i, j, measure in seen.pairs(method, hamming, cosine):
                edges.setdefault((i, j), (method, measure))
    groups = _choose(source, seen, edges)
    drop = [d for group in groups for d in group.drop]
    return DedupReport(
        source=source.name,
        samples=len(source),
        kept=len(seen.places) - len(drop),
        found={m: sum(d.method == m for d in drop) for m in METHODS if m in methods},
        groups=groups,
        bad=seen.bad.count,
        bad_listed=tuple(seen.bad.listed),
        flat=seen.flat,
        hamming=hamming,
        cosine=cosine,
        clip=clip,
    )


class _Seen:
    """What one look at every picture leaves: a row each, by position in ``places``."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.worth: list[tuple[int, int]] = []
        """Pixels, then bytes: what decides which of a group stays."""
        self.files: list[bytes] = []
        self.hashes: list[np.ndarray] = []
        self.hashed: list[int] = []
        self.turned: list[np.ndarray] = []
        self.embeddings = np.empty((0, 0), np.float32)
        self.bad, self.flat = Bad(), 0

    def pairs(
        self, method: Method, hamming: int, cosine: float
    ) -> Iterator[tuple[int, int, float]]:
        """Rows (i, j, measure), i < j, that ``method`` calls the same."""
        if method == "exact":
            first: dict[bytes, int] = {}  # the first copy speaks for all of them
            for row, digest in enumerate(self.files):
                if first.setdefault(digest, row) != row:
                    yield first[digest], row, 0.0
        elif method == "perceptual" and self.hashes:
            n = len(self.hashes)
            stack = np.stack(self.hashes + self.turned)
            for i, j, apart in hashing.near_pairs(stack, hamming):
                # Turned ones follow the others; two turned ones say nothing new.
                if i < n and i != j % n:
                    a, b = self.hashed[i], self.hashed[j % n]
                    yield min(a, b), max(a, b), float(apart)
        elif method == "embedding":
            yield from near_embeddings(self.embeddings, cosine)


def near_embeddings(embeddings: np.ndarray, cosine: float) -> Iterator[tuple[int, int, float]]:
    """All pairs (i, j, cosine), i < j, of unit vectors ``(N, D)`` with at least this cosine."""
    for start in range(0, len(embeddings), _BLOCK):
        products = embeddings[start : start + _BLOCK] @ embeddings[start:].T
        for i, j in np.argwhere(np.triu(products >= cosine, 1)).tolist():
            yield start + i, start + j, float(products[i, j])


def _look(
    source: Source,
    methods: Collection[Method],
    mirrored: bool,
    embed: Embed | None,
    progress: Callable[[int], None] | None,
) -> _Seen:
    seen, waiting, parts = _Seen(), [], []
    for place in range(len(source)):
        if progress is not None:
            progress(1)
        try:
            data, picture = source.data(place), source.picture(place)
        except BadSample as error:
            seen.bad.add(source.key(place), error)
            continue
        row = len(seen.places)
        seen.places.append(place)
        seen.worth.append((picture.width * picture.height, len(data)))
        seen.files.append(hashlib.sha256(data).digest())
        if "perceptual" in methods:
            low = hashing.frequencies(picture)
            if low is None:
                seen.flat += 1
            else:
                seen.hashed.append(row)
                seen.hashes.append(hashing.bits(low))
                if mirrored:
                    seen.turned.append(hashing.bits(hashing.mirrored(low)))
        if "embedding" in methods and embed is not None:
            waiting.append(picture)
            if len(waiting) == _BATCH:
                parts.append(embed(waiting))
                waiting = []
    if waiting and embed is not None:
        parts.append(embed(waiting))
    if parts:
        seen.embeddings = np.concatenate(parts)
    return seen


def _choose(source: Source, seen: _Seen, edges: dict[tuple[int, int], Any]) -> tuple[Group, ...]:
    """The worthiest first: each that still stands takes its neighbours."""
    near: dict[int, dict[int, tuple[Method, float]]] = {}
    for (i, j), edge in edges.items():
        near.setdefault(i, {})[j] = edge
        near.setdefault(j, {})[i] = edge
    gone: set[int] = set()
    groups: dict[int, Group] = {}
    for row in sorted(near, key=lambda r: (-seen.worth[r][0], -seen.worth[r][1], r)):
        if row in gone:
            continue
        taken = sorted(r for r in near[row] if r not in gone and r not in groups)
        gone |= set(taken)
        if taken:
            groups[row] = Group(
                keep=source.key(seen.places[row]),
                drop=tuple(
                    Duplicate(
                        key=source.key(seen.places[r]), method=near[row][r][0],
                        measure=round(near[row][r][1], 6),
                    )
                    for r in taken
                ),
            )  # fmt: skip
    return tuple(groups[row] for row in sorted(groups))


def save_drop_list(report: DedupReport, path: str | Path) -> None:
    """One key a line: what ``exclude`` of :func:`safelight.data.sources.open_source` reads."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text("".join(f"{key}\n" for key in report.drop), encoding="utf-8")
    os.replace(part, path)
