"""A look through a whole source: what can be used, in which shapes, and what cannot, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from safelight.data.framing import buckets, nearest
from safelight.data.sources import BadSample, Source
from safelight.data.tables import Bad
from safelight.errors import InvalidRequest
from safelight.spec import Record


class SourceReport(Record):
    """What a source holds."""

    source: str
    samples: int
    good: int
    bad: int
    """Samples that a run would skip, and lines and shards that gave no sample at all."""
    bad_listed: tuple[dict[str, str], ...]
    smallest: int
    """Shortest side of the pictures that can be used."""
    captions: int
    """Captions in all; a picture may have several."""
    buckets: dict[str, int]
    """Pictures by aspect bucket, ``512x512`` and so on."""


def check_source(
    source: Source,
    *,
    min_side: int = 0,
    size: int = 512,
    progress: Callable[[int], None] | None = None,
) -> SourceReport:
    """Decode every picture and read every caption, as a run would.

    Args:
        source: the pictures.
        min_side: smaller ones count as bad.
        size: of the square bucket; a multiple of 64, or of 8 below 256.
        progress: called with the number of pictures since the last call.

    Raises:
        InvalidRequest: a size that makes no buckets.
    """
    if size < 8:
        raise InvalidRequest("size", f"{size} is too small.", "At least 8.")
    shapes = buckets(size, step=64 if size >= 256 else 8)
    bad = Bad()
    bad.count, bad.listed = source.bad.count, list(source.bad.listed)
    sizes: list[tuple[int, int]] = []
    captions = 0
    for place in range(len(source)):
        if progress is not None:
            progress(1)
        try:
            words = source.captions(place)
            if not words:
                raise BadSample("has no caption")
            shape = source.picture(place).size
            if min(shape) < min_side:
                raise BadSample(f"is {shape[0]}x{shape[1]}, under {min_side}")
        except BadSample as error:
            bad.add(source.key(place), error)
            continue
        captions += len(words)
        sizes.append(shape)
    counts = Counter(nearest(*shape, shapes) for shape in sizes)
    return SourceReport(
        source=source.name,
        samples=len(source),
        good=len(sizes),
        bad=bad.count,
        bad_listed=tuple(bad.listed),
        smallest=min((min(s) for s in sizes), default=0),
        captions=captions,
        buckets={f"{shapes[b][0]}x{shapes[b][1]}": n for b, n in counts.most_common()},
    )
