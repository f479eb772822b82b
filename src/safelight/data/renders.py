"""Still-life renders on disk: drawn once, read by every training stage.

A set is named by its seed, split, size and number of scenes; drawing it again gives the same
bytes, so the file is a cache and never an input that must be kept.

Scenes come in groups of :data:`GROUP`: a scene and variants of it that differ in one way each
(colours exchanged, order exchanged, a shape, a colour or the arrangement changed). A contrastive
batch made of whole groups cannot be told apart by background or by a single object.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from safelight.data import stilllife
from safelight.data.stilllife import Scene, Split

GROUP = 4
_CHUNK = 512
_VARIANT_STREAM = 7


def scene_at(seed: int, index: int, split: Split) -> list[Scene]:
    """Group number ``index``: ``GROUP`` scenes, of training combinations only for ``train``."""
    base = stilllife.scene(seed, index, split)
    rng = stilllife.generator(seed, index, _VARIANT_STREAM)
    changed = list(stilllife.variants(base, rng, train_only=split in ("train", "val")).values())
    order = rng.permutation(len(changed))[: GROUP - 1]
    group = [base, *(changed[i] for i in order)]
    # A lone object has fewer variants: fill up with further scenes of the split.
    fill = 0
    while len(group) < GROUP:
        group.append(stilllife.scene(seed + 1_000_003 + fill, index, split))
        fill += 1
    return group


def scenes_of(seed: int, count: int, split: Split) -> list[Scene]:
    """The first ``count`` scenes of a set, in the order of its pictures."""
    groups = -(-count // GROUP)
    return [s for i in range(groups) for s in scene_at(seed, i, split)][:count]


def _draw(job: tuple[str, int, Split, int, int, int, int]) -> int:
    path, seed, split, size, count, start, stop = job
    scenes = [s for i in range(start, stop) for s in scene_at(seed, i, split)]
    pictures = np.lib.format.open_memmap(path, mode="r+")
    first = start * GROUP
    last = min(count, stop * GROUP)
    pictures[first:last] = stilllife.render(scenes, size)[: last - first]
    return last - first


def open_renders(
    folder: str | Path,
    *,
    seed: int,
    split: Split,
    size: int,
    count: int,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Open a set of renders, drawing it first where it is missing.

    Args:
        folder: where sets are kept; made if missing.
        count: number of pictures.
        workers: drawing processes; default one a core.
        progress: called with the number of pictures drawn since the last call.

    Returns:
        uint8 ``(count, size, size, 3)``, memory-mapped read-only.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"stilllife-{split}-{seed}-{size}px-{count}.npy"
    done = path.with_suffix(".json")
    if not done.exists():
        part = path.with_suffix(".part")
        shape = (count, size, size, 3)
        np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape).flush()
        groups = -(-count // GROUP)
        jobs: list[tuple[str, int, Split, int, int, int, int]] = [
            (str(part), seed, split, size, count, i, min(i + _CHUNK // GROUP, groups))
            for i in range(0, groups, _CHUNK // GROUP)
        ]
        workers = workers or os.cpu_count() or 1
        context = multiprocessing.get_context("spawn")
        with context.Pool(workers) as pool:
            for drawn in pool.imap_unordered(_draw, jobs):
                if progress is not None:
                    progress(drawn)
        part.rename(path)
        done.write_text(json.dumps({"seed": seed, "split": split, "size": size, "count": count}))
    return np.load(path, mmap_mode="r")


def _label(job: tuple[int, Split, int, int]) -> np.ndarray:
    seed, split, start, stop = job
    scenes = [s for i in range(start, stop) for s in scene_at(seed, i, split)]
    masks = stilllife.render_full(scenes, 2 * PATCHES, oversample=1).masks
    n = len(scenes)
    cover = masks.reshape(n, masks.shape[1], PATCHES, 2, PATCHES, 2).sum((3, 5))
    labels = np.zeros((n, PATCHES, PATCHES), dtype=np.uint8)
    for k in range(cover.shape[1]):
        labels[cover[:, k] >= 2] = k + 1
    return labels


PATCHES = 8
"""Patches along a side in :func:`open_labels`."""


def open_labels(folder: str | Path, *, seed: int, split: Split, count: int) -> np.ndarray:
    """Which object each patch of the pictures of :func:`open_renders` mostly shows.

    Returns:
        uint8 ``(count, PATCHES, PATCHES)``: 0 neither, 1 object a, 2 object b.
    """
    path = Path(folder) / f"stilllife-{split}-{seed}-labels-{count}.npy"
    if not path.exists():
        groups = -(-count // GROUP)
        step = _CHUNK // GROUP
        jobs: list[tuple[int, Split, int, int]] = [
            (seed, split, i, min(i + step, groups)) for i in range(0, groups, step)
        ]
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            labels = np.concatenate(pool.map(_label, jobs))[:count]
        with path.with_suffix(".part").open("wb") as file:
            np.save(file, labels)
        path.with_suffix(".part").rename(path)
    return np.load(path)
