"""What the objectives share: the still-life stream and picture helpers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight.data import stilllife
from safelight.data.renders import open_renders, scenes_of
from safelight.data.stilllife import Scene, Split
from safelight.nets.vae import to_uint8
from safelight.store.pictures import save
from safelight.train.recipe import DataRecipe

VALIDATION_SEEDS: dict[Split, int] = {"val": 2, "combo": 3, "pair": 4}
"""Series of the validation sets; no recipe trains on them."""
SPLITS: tuple[Split, ...] = ("val", "combo", "pair")


def key(seed: int, index: int, stream: int) -> np.random.Generator:
    """Random numbers of one picture of a run, whatever batch or process it falls into."""
    return np.random.Generator(np.random.Philox(key=[seed * 1009 + stream, index]))


class Stream:
    """The pictures of a run: ``data.count`` renders, mirrored or not, in shuffled epochs."""

    def __init__(self, data: DataRecipe, seed: int) -> None:
        self.data, self.seed = data, seed
        self.renders = open_renders(
            data.cache, seed=data.seed, split=data.split, size=data.size, count=data.count
        )
        self.scenes = scenes_of(data.seed, data.count, data.split)
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

    def pixels(self, places: np.ndarray, flips: np.ndarray) -> Tensor:
        """Pictures ``(N, 3, H, W)`` in [-1, 1]."""
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
