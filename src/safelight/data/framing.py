"""How a picture is brought to a size: crops, and buckets of like shapes.

Training follows the reference (CompVis): the shorter side is resized, bicubic and antialiased, and
the rest is cropped. Aspect buckets (NovelAI 2022, "Improvements on Stable Diffusion") keep more of
long pictures: a batch holds pictures of one shape, and shapes have about equally many pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from safelight.data import stilllife
from safelight.errors import InvalidRequest

_ORDER = 103  # a stream of random numbers


class Crop(NamedTuple):
    """What a crop shows, in pixels of the original."""

    left: float
    top: float
    right: float
    bottom: float


def crop(
    picture: Image.Image, size: tuple[int, int], where: tuple[float, float] | None = None
) -> tuple[np.ndarray, Crop]:
    """Scale a picture to cover ``size`` and cut it out.

    Args:
        picture: RGB.
        size: width and height of the result.
        where: across and down, uniform in [0, 1) for a uniform crop; None is the centre.

    Returns:
        uint8 ``(H, W, 3)``, and what of the original it shows.
    """
    width, height = size
    scale = max(width / picture.width, height / picture.height)
    big = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    if big != picture.size:
        picture = picture.resize(big, Image.Resampling.BICUBIC)
    spare = big[0] - width, big[1] - height
    if where is None:
        left, top = (round(s / 2) for s in spare)
    else:
        left, top = (min(int(w * (s + 1)), s) for w, s in zip(where, spare, strict=True))
    part = picture.crop((left, top, left + width, top + height))
    box = Crop(left / scale, top / scale, (left + width) / scale, (top + height) / scale)
    return np.asarray(part, dtype=np.uint8), box


def buckets(
    size: int = 512, *, step: int = 64, smallest: int | None = None, largest: int | None = None
) -> list[tuple[int, int]]:
    """Shapes (width, height) of at most ``size`` squared pixels, sides multiples of ``step``.

    Args:
        size: side of the square one.
        smallest: shortest side; default half of ``size``.
        largest: longest side; default twice ``size``.

    Raises:
        InvalidRequest: ``size`` is no multiple of ``step``.
    """
    if step < 1 or size < step or size % step:
        raise InvalidRequest("size", f"{size} is no multiple of the buckets' step {step}.")
    small = max(step, -(-(smallest or size // 2) // step) * step)
    large = largest or 2 * size
    found = {(size, size)}
    for width in range(small, large + 1, step):
        height = min(large, size * size // width // step * step)
        if height >= small:
            found |= {(width, height), (height, width)}
    return sorted(found)


def nearest(width: int, height: int, shapes: Sequence[tuple[int, int]]) -> int:
    """Which shape is closest in aspect ratio, by its logarithm."""
    ratio = np.log(width / height)
    return int(np.argmin([abs(np.log(w / h) - ratio) for w, h in shapes]))


def populated(
    sizes: Sequence[tuple[int, int] | None], shapes: Sequence[tuple[int, int]], least: int
) -> list[tuple[int, int]]:
    """The shapes that are nearest to at least so many pictures each; the others' pictures go to
    what is nearest of these.

    A shape of few pictures would show each of them many times to fill a batch.
    """
    shapes, distinct = list(shapes), Counter(size for size in sizes if size is not None)
    while len(shapes) > 1:
        counts = Counter[int]()
        for size, count in distinct.items():
            counts[nearest(*size, shapes)] += count
        few = min(range(len(shapes)), key=lambda b: counts[b])
        if counts[few] >= least:
            break
        # All empty ones at once, then one at a time: its pictures may fill up a neighbour.
        shapes = [s for b, s in enumerate(shapes) if (b != few if counts[few] else counts[b])]
    return shapes


class BucketPlan:
    """Batches of pictures of like shape; a function of seed and batch number alone.

    Every picture is in every epoch. A bucket's last batch is filled up with pictures of the same
    bucket, so that all batches are equally large.

    Args:
        sizes: width and height of every picture of the source; None for one that cannot be read,
            which is left out.
        shapes: of :func:`buckets`.
        batch: pictures a batch.
        seed: of the run.

    Raises:
        InvalidRequest: there is no picture.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int] | None],
        shapes: Sequence[tuple[int, int]],
        batch: int,
        seed: int = 0,
    ) -> None:
        if batch < 1:
            raise InvalidRequest("batch", f"{batch} is not positive.")
        members: dict[int, list[int]] = {}
        bucket_of = {size: nearest(*size, shapes) for size in set(sizes) if size is not None}
        for place, size in enumerate(sizes):
            if size is not None:
                members.setdefault(bucket_of[size], []).append(place)
        if not members:
            raise InvalidRequest("data", "there is no picture to put into buckets.")
        self.shapes, self.batch, self.seed, self.members = list(shapes), batch, seed, members
        counts = {b: -(-len(p) // batch) for b, p in members.items()}
        self._plan = [(b, k) for b, count in sorted(counts.items()) for k in range(count)]
        self._epoch: tuple[int, np.ndarray, dict[int, np.ndarray]] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._plan)

    def __getitem__(self, number: int) -> tuple[tuple[int, int], list[int]]:
        """Batch ``number`` of the run: its shape, and places in the source."""
        epoch, at = divmod(number, len(self._plan))
        if self._epoch is None or self._epoch[0] != epoch:
            rng = stilllife.generator(self.seed, epoch, _ORDER)
            order = rng.permutation(len(self._plan))
            inside = {b: rng.permutation(p) for b, p in sorted(self.members.items())}
            self._epoch = epoch, order, inside
        _, order, inside = self._epoch
        bucket, part = self._plan[order[at]]
        places = np.resize(inside[bucket], -(-len(inside[bucket]) // self.batch) * self.batch)
        return self.shapes[bucket], places[part * self.batch : (part + 1) * self.batch].tolist()
