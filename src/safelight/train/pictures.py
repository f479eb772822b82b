"""The pictures that objectives read: the still life, or a source of the user's own."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import multiprocessing
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from safelight.data import stilllife
from safelight.data.bucketed import Bucketed, sizes_of
from safelight.data.framing import buckets
from safelight.data.reader import Reader
from safelight.data.renders import open_renders, scenes_of
from safelight.data.sources import BadSample, Source, Subset, open_source
from safelight.data.stilllife import Scene, Split
from safelight.errors import InvalidRequest
from safelight.nets.vae import to_uint8
from safelight.store.pictures import save
from safelight.train.recipe import DataRecipe

VALIDATION_SEEDS: dict[Split, int] = {"val": 2, "combo": 3, "pair": 4}
"""Series of the validation sets; no recipe trains on them."""
SPLITS: tuple[Split, ...] = ("val", "combo", "pair")


def key(seed: int, index: int, stream: int) -> np.random.Generator:
    """Random numbers of one picture of a run, whatever batch or process it falls into."""
    return np.random.Generator(np.random.Philox(key=[seed * 1009 + stream, index]))


class Pictures(Protocol):
    """Captioned pictures that objectives read, wherever they come from.

    Another source than the still life is another class of this shape, and a line in
    :func:`open_pictures`. ``places`` and ``flips`` say which pictures and whether mirrored.
    """

    renders: np.ndarray | None
    """All pictures, uint8 ``(N, H, W, 3)``, where they fit on disk: latents are then computed
    once. None: they are encoded as they come."""

    def digest(self) -> str:
        """Stands for all of them, in a manifest."""
        ...

    def report(self) -> dict[str, Any]:
        """What was skipped so far and why: nothing where pictures are drawn."""
        ...

    def places(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Which pictures a run sees from its ``start``-th on: a function of the index alone."""
        ...

    def pixels(self, places: np.ndarray, flips: np.ndarray) -> Tensor:
        """``(N, 3, H, W)`` in [-1, 1]."""
        ...

    def captions(
        self,
        places: np.ndarray,
        flips: np.ndarray,
        rngs: list[np.random.Generator],
        *,
        plain: bool = False,
    ) -> list[str]:
        """One a picture; where there are several ways to say it, by its generator."""
        ...

    def nearness(self, places: np.ndarray, flips: np.ndarray, side: int) -> Tensor:
        """Depth, larger is nearer, in any unit, bicubic at a size: ``(N, side, side)``."""
        ...

    def held_out(self, split: Split, count: int) -> Pictures | None:
        """Pictures that no run trains on; None where the source has none."""
        ...


def open_pictures(data: DataRecipe, seed: int, batch: int = 1) -> Pictures:
    """The pictures that a recipe names.

    Args:
        batch: pictures of one shape, where the recipe has aspect buckets.

    Raises:
        InvalidRequest: there is nothing where the recipe says, or no picture in it.
    """
    if data.source == "stilllife":
        return Stream(data, seed)
    source = open_source(_place(data), caption=data.caption, exclude=data.exclude)
    kept, held_out = divided(source, data.hold_out)
    show = functools.partial(Reader, seed=seed, size=data.size, captions=data.captions)
    reader = show(kept, mirror=data.mirror, min_side=data.min_side)
    apart = {} if held_out is None else {"val": show(held_out, how="centre", shuffle=False)}
    digest = hashlib.blake2b(f"{data.source} {len(source)}".encode(), digest_size=8)
    for place in np.linspace(0, len(source) - 1, min(len(source), 4096)).astype(int):
        digest.update(source.key(int(place)).encode())
    if data.buckets is None:
        return Captioned(reader, digest.hexdigest(), apart)
    shapes = buckets(data.size, **dict(data.buckets))
    sizes, bad = sizes_of(kept, data.cache)
    shaped = Bucketed(reader, sizes, shapes, batch, bad=bad)
    return Captioned(shaped, digest.hexdigest(), apart)


def _place(data: DataRecipe) -> Path | str:
    """Where the pictures of a source lie; those of a filter have a folder of its name in it."""
    if not data.filter:
        return data.source
    place = Path(data.source) / data.filter
    if not place.exists():
        raise InvalidRequest(
            "data.filter",
            f"there is no {place}.",
            f"Make it: safelight data filter --name {data.filter}, then img2dataset with its list.",
        )
    return place


def divided(source: Source, share: float) -> tuple[Source, Source | None]:
    """What is trained on, and what is not: a picture's key alone decides, so that a source may
    grow. Nothing is held out where that would leave nothing."""
    limit = int(share * 2**32)
    apart = [zlib.crc32(f"hold out {source.key(k)}".encode()) < limit for k in range(len(source))]
    if share == 0 or all(apart) or not any(apart):
        return source, None
    kept, out = ([k for k, a in enumerate(apart) if a is which] for which in (False, True))
    return Subset(source, kept), Subset(source, out)


class Numbered(Protocol):
    """Any pictures by their number in the run (:class:`safelight.data.reader.Reader`): each has
    ``pixels``, uint8 ``(H, W, 3)``, and a ``caption``."""

    def __getitem__(self, index: int) -> Any: ...


class Captioned:
    """Pictures of a reader. It crops, mirrors and shuffles them itself, by their number.

    Args:
        digest: stands for them in the manifest.
        held_out: readers of pictures that are not trained on, by split.
    """

    renders: np.ndarray | None = None

    def __init__(
        self, reader: Numbered, digest: str, held_out: Mapping[str, Numbered] | None = None
    ) -> None:
        self._reader, self._digest, self._held_out = reader, digest, held_out or {}
        self._seen: dict[int, Any] = {}

    def digest(self) -> str:
        """See :class:`Pictures`."""
        return self._digest

    def report(self) -> dict[str, Any]:
        """See :class:`Pictures`."""
        return self._reader.report() if isinstance(self._reader, (Reader, Bucketed)) else {}

    def places(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers themselves, none of them mirrored here."""
        return np.arange(start, start + count), np.zeros(count, bool)

    def pixels(self, places: np.ndarray, flips: np.ndarray) -> Tensor:
        """See :class:`Pictures`."""
        return to_pixels(np.stack([self._read(int(i)).pixels for i in places]))

    def captions(
        self,
        places: np.ndarray,
        flips: np.ndarray,
        rngs: list[np.random.Generator],
        *,
        plain: bool = False,
    ) -> list[str]:
        """See :class:`Pictures`."""
        return [self._read(int(i)).caption for i in places]

    def corpus(self, most: int = 20_000) -> list[str]:
        """Captions of some samples, spread evenly over the source: words to learn from.

        Raises:
            InvalidRequest: none of them has any.
        """
        assert isinstance(self._reader, Reader)
        source, found = self._reader.source, list[str]()
        for place in np.linspace(0, len(source) - 1, min(len(source), most)).astype(int):
            with contextlib.suppress(BadSample):
                found += source.captions(int(place))
        if not found:
            raise InvalidRequest(
                "data.source",
                f"{source.name} has no captions.",
                "Put them beside the pictures (.txt, metadata.jsonl), or name data.caption.",
            )
        return found

    def nearness(self, places: np.ndarray, flips: np.ndarray, side: int) -> Tensor:
        """Photographs have no renderer to say it."""
        raise InvalidRequest("data.source", "has no depth maps.", "Use stilllife.")

    def held_out(self, split: Split, count: int) -> Captioned | None:
        """See :class:`Pictures`."""
        reader = self._held_out.get(split)
        return None if reader is None else Captioned(reader, self._digest)

    def _read(self, index: int) -> Any:
        """A picture is decoded once for its pixels and its caption."""
        if index not in self._seen:
            if len(self._seen) >= 256:
                self._seen.clear()
            self._seen[index] = self._reader[index]
        return self._seen[index]


class Stream:
    """The still life: ``data.count`` renders, mirrored or not, in shuffled epochs.

    Args:
        first: only so many of them, for validation.
    """

    def __init__(self, data: DataRecipe, seed: int, first: int | None = None) -> None:
        self.data, self.seed = data, seed
        self.renders: np.ndarray | None = open_renders(
            data.cache, seed=data.seed, split=data.split, size=data.size, count=data.count
        )
        self.scenes = scenes_of(data.seed, first or data.count, data.split)
        self._near: dict[int, np.ndarray] = {}
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def places(self, start: int, count: int, *, group: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Which renders pictures ``start`` to ``start + count`` of the run show.

        Args:
            group: keep this many neighbouring renders together (contrastive training).

        Returns:
            indices ``(count,)`` and whether each is mirrored ``(count,)``.
        """
        units = self.data.count // group
        chosen, flips = [], []
        for i in range(start // group, (start + count) // group):
            epoch, place = divmod(i, units)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = key(self.seed, epoch, 1).permutation(units)
            chosen.extend(range(self._order[place] * group, (self._order[place] + 1) * group))
            flips.extend([bool(key(self.seed, i, 2).integers(2))] * group)
        return np.array(chosen), np.array(flips)

    def digest(self) -> str:
        """BLAKE2 of the set's description and of 64 of its pictures, spread evenly."""
        assert self.renders is not None
        seen = self.data.model_dump_json(exclude={"cache"})
        digest = hashlib.blake2b(seen.encode(), digest_size=8)
        for i in np.linspace(0, len(self.renders) - 1, 64).astype(int):
            digest.update(np.ascontiguousarray(self.renders[i]).tobytes())
        return digest.hexdigest()

    def report(self) -> dict[str, Any]:
        """See :class:`Pictures`."""
        return {}

    def pixels(self, places: np.ndarray, flips: np.ndarray) -> Tensor:
        """Pictures ``(N, 3, H, W)`` in [-1, 1]."""
        assert self.renders is not None
        order = np.argsort(places)
        pictures = np.empty((len(places), *self.renders.shape[1:]), dtype=np.uint8)
        pictures[order] = self.renders[places[order]]
        pictures[flips] = pictures[flips][:, :, ::-1]
        return to_pixels(pictures)

    def seen_scenes(self, places: np.ndarray, flips: np.ndarray) -> list[Scene]:
        """The scenes as shown: mirrored ones with left and right exchanged."""
        return [
            stilllife.mirror(self.scenes[p]) if f else self.scenes[p]
            for p, f in zip(places, flips, strict=True)
        ]

    def captions(
        self,
        places: np.ndarray,
        flips: np.ndarray,
        rngs: list[np.random.Generator],
        *,
        plain: bool = False,
    ) -> list[str]:
        """See :class:`Pictures`."""
        scenes = self.seen_scenes(places, flips)
        if plain:
            return [stilllife.plain_caption(scene) for scene in scenes]
        return [stilllife.caption(scene, rng) for scene, rng in zip(scenes, rngs, strict=True)]

    def nearness(self, places: np.ndarray, flips: np.ndarray, side: int) -> Tensor:
        """From the renderer, once; its camera is orthographic, so distance and nearness are
        affine."""
        if side not in self._near:
            data, count = self.data, len(self.scenes)
            name = f"nearness-{data.split}-{data.seed}-{data.size}px-{count}-{side}.npy"
            self._near[side] = _open_nearness(data.cache / name, self.scenes, data.size, side)
        near = self._near[side][places].astype(np.float32)
        near[flips] = near[flips][:, :, ::-1]
        return torch.from_numpy(near)

    def held_out(self, split: Split, count: int) -> Stream:
        """The first pictures of a validation set."""
        total = 2048 if split == "pair" else 4096
        data = self.data.replace(split=split, seed=VALIDATION_SEEDS[split], count=total)
        return Stream(data, self.seed, first=count)


def _open_nearness(path: Path, scenes: list[Scene], size: int, side: int) -> np.ndarray:
    if not path.exists():
        jobs = [(scenes[i : i + 256], size, side) for i in range(0, len(scenes), 256)]
        if len(jobs) == 1:
            maps = [_draw_nearness(jobs[0])]
        else:
            with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
                maps = pool.map(_draw_nearness, jobs)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, np.concatenate(maps))
        part.rename(path)
    return np.load(path, mmap_mode="r")


def _draw_nearness(job: tuple[list[Scene], int, int]) -> np.ndarray:
    scenes, size, side = job
    near = torch.from_numpy(-stilllife.render_full(scenes, size, oversample=1).depth)
    small = F.interpolate(near[:, None], (side, side), mode="bicubic")[:, 0]
    return small.numpy().astype(np.float16)


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 ``(N, H, W, 3)`` to float32 ``(N, 3, H, W)`` in [-1, 1], channels last in memory."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def validation(data: DataRecipe, split: Split, count: int) -> tuple[Tensor, list[Scene]]:
    """``count`` pictures of a validation set, and their scenes."""
    seed = VALIDATION_SEEDS[split]
    total = 2048 if split == "pair" else 4096
    renders = open_renders(data.cache, seed=seed, split=split, size=data.size, count=total)
    scenes = scenes_of(seed, count, split)
    return to_pixels(np.array(renders[:count])), scenes


def save_grid(rows: list[Tensor], path: Path, scale: int = 2) -> None:
    """Rows of pictures ``(N, 3, H, W)`` in [-1, 1], as one PNG."""
    lines = [np.concatenate(list(to_uint8(row).numpy()), axis=1) for row in rows]
    sheet = Image.fromarray(np.concatenate(lines, axis=0))
    size = (sheet.width * scale, sheet.height * scale)
    save(path, sheet.resize(size, Image.Resampling.NEAREST))
