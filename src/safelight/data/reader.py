"""What a training run sees: a source, shuffled and cropped, each picture a function of its number.

Picture ``index`` of a run depends on the seed and on ``index`` alone: never on the process, on the
batch, or on what was read before. So a run resumes anywhere and on any number of processes. A bad
sample is replaced by another one that the same two numbers choose; it is counted and listed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from safelight.data import stilllife
from safelight.data.framing import Crop, crop
from safelight.data.sources import BadSample, Source
from safelight.errors import InvalidRequest

_VIEW, _REPLACE = 101, 102  # streams of random numbers
_ATTEMPTS = 64


class Shown(NamedTuple):
    """One picture as the run sees it."""

    pixels: np.ndarray
    """uint8 ``(H, W, 3)``."""
    caption: str
    key: str
    place: int
    """Its index in the source."""
    crop: Crop
    mirrored: bool


class Reader:
    """The pictures of a run.

    Args:
        source: where they come from.
        seed: of the run.
        size: width and height that the pictures are brought to, or one number for a square.
        how: ``centre``, or ``random``: where along the longer side to crop.
        mirror: show half of them mirrored. Off by default: captions may say left and right.
        min_side: pictures smaller than this count as bad.
        captions: ``need`` counts a picture without one as bad; ``optional`` gives it an empty one.
        shuffle: a new order each epoch; else the source's.

    Attributes:
        bad: index in the source to what is wrong with it, of those met so far.
        replaced: how many shown pictures stand in for bad ones.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int = 0,
        size: int | tuple[int, int] = 512,
        how: Literal["centre", "random"] = "random",
        mirror: bool = False,
        min_side: int = 0,
        captions: Literal["need", "optional"] = "need",
        shuffle: bool = True,
    ) -> None:
        if len(source) == 0:
            raise InvalidRequest("data", f"{source.name} holds no pictures.")
        self.source, self.seed, self.how, self.mirror = source, seed, how, mirror
        self.size = (size, size) if isinstance(size, int) else size
        if min(self.size) < 1:
            raise InvalidRequest("size", f"{self.size} is no size.")
        self.min_side, self.captions, self.shuffle = min_side, captions, shuffle
        self.bad: dict[int, str] = {}
        self.replaced = 0

    def place(self, index: int) -> int:
        """Which sample of the source picture ``index`` of the run is, before any is found bad."""
        epoch, at = divmod(index, len(self.source))
        return shuffled(at, len(self.source), (self.seed, epoch)) if self.shuffle else at

    def __getitem__(self, index: int) -> Shown:
        """Picture ``index`` of the run; there is no last one.

        Raises:
            InvalidRequest: many samples in a row are bad: the source is not what it should be.
        """
        return self.read(index, self.place(index), self.size)

    def read(self, index: int, place: int, size: tuple[int, int]) -> Shown:
        """The sample at ``place``, seen as picture ``index``, at ``size`` (width, height)."""
        first, rng = place, stilllife.generator(self.seed, index, _REPLACE)
        last = ""
        for _ in range(_ATTEMPTS):
            try:
                shown = self._view(index, place, size)
            except BadSample as error:
                self.bad[place] = str(error)
                last = f"{self.source.key(place)} {error}"
                place = int(rng.integers(len(self.source)))
            else:
                self.replaced += place != first
                return shown
        raise InvalidRequest(
            "data",
            f"{_ATTEMPTS} samples of {self.source.name} in a row cannot be used; the last: {last}.",
            "Is it the right folder, and is the caption column right?",
        )

    def _view(self, index: int, place: int, size: tuple[int, int]) -> Shown:
        words = self.source.captions(place)
        if not words and self.captions == "need":
            raise BadSample("has no caption")
        picture = self.source.picture(place)
        if min(picture.size) < self.min_side:
            raise BadSample(f"is {picture.width}x{picture.height}, under {self.min_side}")
        rng = stilllife.generator(self.seed, index, _VIEW)
        u, v, flip, word = rng.random(4)
        where = (u, v) if self.how == "random" else None
        pixels, box = crop(picture, size, where)
        mirrored = self.mirror and flip < 0.5
        return Shown(
            pixels=np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels,
            caption=words[int(word * len(words))] if words else "",
            key=self.source.key(place),
            place=place,
            crop=box,
            mirrored=mirrored,
        )

    def report(self) -> dict[str, Any]:
        """What was skipped so far: counts, and the list."""
        listed = [{"key": self.source.key(p), "why": why} for p, why in sorted(self.bad.items())]
        return {
            "source": self.source.name,
            "samples": len(self.source),
            "unreadable": self.source.bad.count,
            "unreadable_listed": self.source.bad.listed,
            "skipped": len(self.bad),
            "skipped_listed": listed,
            "replaced": self.replaced,
        }


def shuffled(at: int, count: int, key: Sequence[int]) -> int:
    """Where a random permutation of ``range(count)``, chosen by ``key``, sends ``at``.

    A Feistel network over the next even power of two, walked until it falls inside (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3): no table in memory,
    however many pictures there are.
    """
    half = max(1, (max(1, (count - 1).bit_length()) + 1) // 2)
    mask, name = (1 << half) - 1, ",".join(map(str, key)).encode()
    while True:
        left, right = at >> half, at & mask
        for turn in range(6):
            digest = hashlib.blake2b(b"%d,%d" % (turn, right), digest_size=8, key=name[:64])
            left, right = right, left ^ (int.from_bytes(digest.digest(), "little") & mask)
        at = left << half | right
        if at < count:
            return at
