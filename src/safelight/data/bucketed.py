"""A run's pictures in aspect buckets: neighbours in the run have one shape.

Pictures ``n * batch`` to ``(n + 1) * batch`` of a run are batch ``n`` of a
:class:`~safelight.data.framing.BucketPlan`. So what picture ``index`` is, and its shape, depend on
the seed and on ``index`` alone, as everywhere; and whoever takes a whole batch, or an even part of
one, has pictures of one shape, whichever process it is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from safelight.data.framing import BucketPlan, populated
from safelight.data.reader import Reader, Shown
from safelight.data.sources import BadSample, Source


class Bucketed:
    """Pictures of a reader by their number in the run, each in the shape of its bucket.

    Args:
        reader: reads them, crops them and replaces bad ones. What ``bad`` says is left out.
        sizes: width and height of every picture, of :func:`sizes_of`.
        shapes: of :func:`safelight.data.framing.buckets`; those that are nearest to fewer pictures
            than a batch are left out.
        batch: pictures that have one shape.

    Raises:
        InvalidRequest: there is no picture.
    """

    def __init__(
        self,
        reader: Reader,
        sizes: list[tuple[int, int] | None],
        shapes: list[tuple[int, int]],
        batch: int,
        *,
        bad: Mapping[int, str] | None = None,
    ) -> None:
        self.reader = reader
        reader.bad.update(bad or {})
        small = reader.min_side
        for place, size in enumerate(sizes):
            if size is not None and min(size) < small:
                reader.bad[place] = f"is {size[0]}x{size[1]}, under {small}"
        sizes = [None if place in reader.bad else size for place, size in enumerate(sizes)]
        self.plan = BucketPlan(sizes, populated(sizes, shapes, batch), batch, reader.seed)

    def __getitem__(self, index: int) -> Shown:
        """Picture ``index`` of the run; there is no last one."""
        number, at = divmod(index, self.plan.batch)
        shape, places = self.plan[number]
        return self.reader.read(index, places[at], shape)

    def report(self) -> dict[str, Any]:
        """What the reader says, and how many pictures each bucket holds."""
        filled = sorted(self.plan.members.items(), key=lambda entry: -len(entry[1]))
        held = {f"{w}x{h}": len(p) for b, p in filled for w, h in [self.plan.shapes[b]]}
        return {**self.reader.report(), "buckets": held}


def sizes_of(
    source: Source, cache: Path | None = None
) -> tuple[list[tuple[int, int] | None], dict[int, str]]:
    """Width and height of every picture of a source, read from the files' heads.

    Args:
        cache: a folder that keeps them; the next run over the same keys does not read them again.

    Returns:
        the sizes, None for what is no picture; and why each of those is none.
    """
    path = None if cache is None else cache / f"sizes-{_digest(source)}.npy"
    if path is not None and path.exists():
        table = np.load(path)
    else:
        table = np.array([_size(source, place)[0] for place in range(len(source))], np.int32)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            with part.open("wb") as file:
                np.save(file, table)
            part.replace(path)
    bad = {int(p): _size(source, int(p))[1] for p in np.flatnonzero(table[:, 0] == 0)}
    return [None if w == 0 else (w, h) for w, h in table.tolist()], bad


def _size(source: Source, place: int) -> tuple[tuple[int, int], str]:
    try:
        return source.size(place), ""
    except BadSample as error:
        return (0, 0), str(error)


def _digest(source: Source) -> str:
    """Of the keys: pictures under the same keys may change, and are then cut from other shapes."""
    digest = hashlib.blake2b(source.name.encode(), digest_size=8)
    for place in range(len(source)):
        digest.update(f"{source.key(place)}\n".encode())
    return digest.hexdigest()
