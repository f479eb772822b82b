"""Whether generated pictures are training pictures: the nearest one of each, in two spaces.

- In pixels: both pictures at 32x32, values in 0..1, the root of the mean square difference, taken
  on 4x4 tiles of which the worst counts, so that an equal background does not make a copy (the
  measure of Carlini et al. 2023, 2301.13188, "Extracting Training Data from Diffusion Models", who
  call 0.15 and less a copy).
- In a CLIP's embeddings: the cosine; 0.98, where ``safelight data dedup`` calls pictures equal. It
  finds what was moved, mirrored or recoloured, and in a narrow world it finds too much.

What a limit means in a world is shown by pictures that no training saw: the same rate for real,
held-out pictures is the rate of false alarms. And what de-duplication would change is shown by how
often the copied picture stands in the training set (:mod:`safelight.data.duplicates`): Carlini et
al. found nearly all copies among those that stand there often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from safelight.data.clip import CLIP
from safelight.data.duplicates import METHODS, Method, find_duplicates
from safelight.data.framing import crop
from safelight.data.index import Index, build_index
from safelight.data.sources import BadSample, Source
from safelight.errors import InvalidRequest, SafelightError
from safelight.evaluate.features import batches
from safelight.evaluate.metrics import squared_distances
from safelight.evaluate.score import Share
from safelight.generate import Generator
from safelight.spec import Record

PIXELS, COSINE = 0.15, 0.98
"""A copy is at most so far in pixels, or at least so near in embeddings."""
USUAL: tuple[Method, ...] = ("exact", "perceptual")
"""What counts as a duplicate, as far as nothing else is said."""
_SIDE, _TILES = 32, 4
_STEP = _SIDE // _TILES
_ROWS = 4096


class Near(Record):
    """A picture's nearest training pictures."""

    name: str
    """Of the generated picture: its file, or its prompt and seed."""
    pixel_key: str
    pixel_distance: float
    pixel_copies: int
    """How often the training set holds that picture; 1: once."""
    pixel_group: str
    """The one of its copies that de-duplication keeps."""
    cosine_key: str
    cosine: float
    cosine_copies: int
    cosine_group: str


@dataclass
class Training:
    """Training pictures, ready to be compared with."""

    source: Source
    index: Index
    tiles: np.ndarray
    """float32 ``(M, tiles, values)``, a row for each of the index."""
    copies: dict[str, int]
    """By key, how often it is there; keys that stand alone are left out."""
    groups: dict[str, str]
    """By key, the copy that de-duplication keeps; keys that stand alone are left out."""

    @property
    def duplicated(self) -> int:
        """Pictures that are there more than once."""
        return sum(key in self.copies for key in self.index.keys)

    def often(self, key: str) -> int:
        """How often a picture is there."""
        return self.copies.get(key, 1)


def study(
    source: Source,
    clip: CLIP,
    *,
    index: Index | None = None,
    methods: Sequence[Method] = USUAL,
    progress: Callable[[str, int], None] | None = None,
) -> Training:
    """Look through the training pictures.

    Args:
        index: of ``safelight data index``, built with the same CLIP; else it is built here.
        methods: what counts as a duplicate.
        progress: called with a stage and the number of pictures since the last call.
    """

    def tell(stage: str) -> Callable[[int], None]:
        return lambda n: progress(stage, n) if progress is not None else None

    if wrong := [m for m in methods if m not in METHODS]:
        raise InvalidRequest("method", f"unknown {wrong[0]!r}.", f"One of {', '.join(METHODS)}.")
    if index is None:
        index, _ = build_index(source, clip, progress=tell("embeddings"))
    else:
        index.check(clip)
    if len(index) == 0:
        raise InvalidRequest("training", f"{source.name} holds no picture that can be read.")
    tiles, step = [], tell("pixels")
    for place, key in zip(index.about["places"], index.keys, strict=True):
        if place >= len(source) or source.key(place) != key:
            raise InvalidRequest("index", f"is not of {source.name}: {key} is not where it was.")
        tiles.append(tiled(source.picture(place)))
        step(1)
    report = find_duplicates(
        source, methods, embed=clip.pictures, clip=clip.name, progress=tell("duplicates")
    )
    copies, groups = {}, {}
    for group in report.groups:
        keys = [group.keep, *(d.key for d in group.drop)]
        copies.update(dict.fromkeys(keys, len(keys)))
        groups.update(dict.fromkeys(keys, group.keep))
    return Training(source, index, np.stack(tiles), copies, groups)


def tiled(picture: Image.Image) -> np.ndarray:
    """A picture as float32 ``(tiles, values)`` in 0..1."""
    small = crop(picture.convert("RGB"), (_SIDE, _SIDE))[0].astype(np.float32) / 255
    cut = small.reshape(_TILES, _STEP, _TILES, _STEP, 3).swapaxes(1, 2)
    return cut.reshape(_TILES * _TILES, -1)


def pixel_distance(one: np.ndarray, two: np.ndarray) -> float:
    """The worst tile's root mean square difference, of two :func:`tiled` pictures."""
    apart = one.astype(np.float64) - two
    return float(np.sqrt((apart**2).mean(1).max()))


def nearest_pixels(queries: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Rows ``(N,)`` of ``table`` ``(M, tiles, values)`` nearest to ``queries``."""
    best, rows = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
    for start in range(0, len(table), _ROWS):
        part = table[start : start + _ROWS]
        worst = np.zeros((len(queries), len(part)))
        for tile in range(table.shape[1]):
            apart = squared_distances(
                queries[:, tile].astype(np.float64), part[:, tile].astype(np.float64)
            )
            np.maximum(worst, apart, out=worst)
        place = worst.argmin(1)
        least = worst[np.arange(len(queries)), place]
        nearer = least < best
        best[nearer], rows[nearer] = least[nearer], start + place[nearer]
    return rows


def nearest(
    training: Training, clip: CLIP, pictures: Iterable[tuple[str, Image.Image]]
) -> Iterator[tuple[Near, Image.Image]]:
    """Each picture's nearest training pictures, in order, with the picture."""
    names: list[str] = []

    def only() -> Iterator[Image.Image]:
        for name, picture in pictures:
            names.append(name)
            yield picture

    for part in batches(only()):
        mine, names[:] = names[: len(part)], names[len(part) :]
        queries = np.stack([tiled(p) for p in part])
        by_pixel = nearest_pixels(queries, training.tiles)
        by_cosine, cosines = training.index.nearest(clip.pictures(part), 1)
        for i, picture in enumerate(part):
            p, c = int(by_pixel[i]), int(by_cosine[i, 0])
            keys = training.index.keys
            found = Near(
                name=mine[i], pixel_key=keys[p],
                pixel_distance=pixel_distance(queries[i], training.tiles[p]),
                pixel_copies=training.often(keys[p]),
                pixel_group=training.groups.get(keys[p], keys[p]), cosine_key=keys[c],
                cosine=float(cosines[i, 0]), cosine_copies=training.often(keys[c]),
                cosine_group=training.groups.get(keys[c], keys[c]),
            )  # fmt: skip
            yield found, picture


@dataclass(frozen=True)
class Copying:
    """Copying rates of a set of pictures, in one space.

    Attributes:
        all: the share of pictures that are copies.
        once: copies of training pictures that stand there once: what de-duplication would leave.
        often: copies of training pictures that stand there more often.
        extracted: how many different training pictures were copied, all copies of one counted once.
    """

    all: Share
    once: Share
    often: Share
    extracted: int


def copying(
    found: Sequence[Near], *, pixels: float = PIXELS, cosine: float = COSINE
) -> dict[str, Copying]:
    """Copying rates, ``pixels`` and ``embedding``."""
    spaces = {
        "pixels": [(n.pixel_distance <= pixels, n.pixel_copies, n.pixel_group) for n in found],
        "embedding": [(n.cosine >= cosine, n.cosine_copies, n.cosine_group) for n in found],
    }
    return {
        space: Copying(
            Share.of(np.array([copy for copy, _, _ in rows], bool)),
            Share.of(np.array([copy and often == 1 for copy, often, _ in rows], bool)),
            Share.of(np.array([copy and often > 1 for copy, often, _ in rows], bool)),
            len({group for copy, _, group in rows if copy}),
        )
        for space, rows in spaces.items()
    }


def captions_of(source: Source, count: int, seed: int) -> list[tuple[str, int]]:
    """Prompts with seeds: captions of random training pictures, as often as they stand there.

    Raises:
        InvalidRequest: too few pictures have a caption.
    """
    order = np.random.default_rng(seed).permutation(len(source))
    chosen: list[tuple[str, int]] = []
    for place in order.tolist():
        if len(chosen) == count:
            break
        try:
            words = source.captions(place)
        except BadSample:
            continue
        if words:
            chosen.append((words[0], seed + len(chosen)))
    if len(chosen) < count:
        raise InvalidRequest(
            "count", f"{source.name} has {len(chosen)} captions, not {count}.", "Ask for fewer."
        )
    return chosen


class Prompted:
    """Pictures of prompts, with their names; flagged ones are counted and left out.

    The safety checker stays on, because people will look at the sheet.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[tuple[str, int]],
        *,
        batch: int = 50,
        progress: Callable[[int], None] | None = None,
        **wishes: Any,
    ) -> None:
        self.generator, self.prompts, self.batch = generator, prompts, batch
        self.wishes = {name: value for name, value in wishes.items() if value is not None}
        self.progress = progress
        self.flagged = 0

    def __iter__(self) -> Iterator[tuple[str, Image.Image]]:
        for start in range(0, len(self.prompts), self.batch):
            some = self.prompts[start : start + self.batch]
            results = self.generator.generate(
                [words for words, _ in some], seed=[seed for _, seed in some], count=1,
                **self.wishes,
            )  # fmt: skip
            for (words, seed), result in zip(some, results, strict=True):
                if result.nsfw:
                    self.flagged += 1
                elif result.image is None:
                    raise SafelightError(f"no picture of {words!r}, seed {seed}: {result.message}")
                else:
                    yield f"{words} ({seed})", result.image
            if self.progress is not None:
                self.progress(len(some))


def named(source: Source, limit: int | None = None) -> Iterator[tuple[str, Image.Image]]:
    """The pictures of a source with their keys, without those that cannot be read."""
    for place in range(min(len(source), limit or len(source))):
        try:
            yield source.key(place), source.picture(place)
        except BadSample:
            continue
