"""A perceptual hash: pictures that look alike have hashes that differ in few bits.

The hash of Facebook's PDQ (2019, "The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing
Algorithm"), itself in the line of pHash (Zauner 2010): luminance at 64x64, its discrete cosine
transform, the 16x16 lowest frequencies without the mean, each compared with their median: 256 bits.
Ours scales with Pillow's box filter, so its bits are not PDQ's own.

Pairs within a Hamming distance are found by the pigeonhole principle (Norouzi et al. 2012,
1307.2982): cut the bits into ``limit + 1`` bands; near pairs agree in one of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

BITS = 256
_SIDE, _LOW = 64, 16
_FLAT = 2.0
"""Standard deviation of the luminance, of 255, below which a picture shows nothing to compare."""
_POPCOUNT = np.array([bin(i).count("1") for i in range(256)], np.uint8)


def _cosines() -> np.ndarray:
    """Rows 1 to 16 of the orthonormal DCT-II of 64 values, ``(16, 64)``."""
    k, n = np.arange(1, _LOW + 1)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * _SIDE)) * np.sqrt(2 / _SIDE)


_DCT = _cosines()


def frequencies(picture: Image.Image) -> np.ndarray | None:
    """The 16x16 lowest frequencies of the luminance; None for a flat picture."""
    grey = picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    values = np.asarray(grey, dtype=np.float64)
    return None if values.std() < _FLAT else _DCT @ values @ _DCT.T


def bits(low: np.ndarray) -> np.ndarray:
    """Frequencies to the hash, uint8 ``(32,)``."""
    return np.packbits(low > np.median(low))


def mirrored(low: np.ndarray) -> np.ndarray:
    """The frequencies of the mirror image: odd ones across change their sign."""
    return low * np.where(np.arange(1, _LOW + 1) % 2, -1.0, 1.0)


def perceptual_hash(picture: Image.Image) -> np.ndarray | None:
    """uint8 ``(32,)``; None for a picture that shows nothing (one plain colour)."""
    low = frequencies(picture)
    return None if low is None else bits(low)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits in which hashes ``(..., 32)`` differ."""
    return _POPCOUNT[np.bitwise_xor(a, b)].sum(-1, dtype=np.int64)


def near_pairs(hashes: np.ndarray, limit: int) -> Iterator[tuple[int, int, int]]:
    """All pairs (i, j, distance), i < j, of hashes ``(N, 32)`` at most ``limit`` bits apart.

    Exact. Equal hashes are compared once, so that a thousand copies cost what one does (their
    pairs are all yielded).
    """
    if len(hashes) < 2:
        return
    unique, where = np.unique(hashes, axis=0, return_inverse=True)
    where = where.reshape(-1)
    members = [[] for _ in unique]
    for place, kind in enumerate(where.tolist()):
        members[kind].append(place)
    for same in members:
        yield from ((i, j, 0) for n, i in enumerate(same) for j in same[n + 1 :])
    for a, b, apart in _near_unique(unique, limit):
        yield from ((min(i, j), max(i, j), apart) for i in members[a] for j in members[b])


def _near_unique(hashes: np.ndarray, limit: int) -> Iterator[tuple[int, int, int]]:
    planes = np.unpackbits(hashes, axis=1)
    found: set[tuple[int, int]] = set()
    for band in np.array_split(np.arange(BITS), limit + 1):
        _, code = np.unique(np.packbits(planes[:, band], axis=1), axis=0, return_inverse=True)
        code = code.reshape(-1)
        order = np.argsort(code, kind="stable")
        ends = np.flatnonzero(np.diff(code[order])) + 1
        for group in np.split(order, ends):
            for n, i in enumerate(group[:-1].tolist()):
                others = group[n + 1 :]
                apart = distance(hashes[i], hashes[others])
                for j, d in zip(
                    others[apart <= limit].tolist(), apart[apart <= limit].tolist(), strict=True
                ):
                    if (i, j) not in found:
                        found.add((i, j))
                        yield i, j, d
