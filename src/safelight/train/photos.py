"""A folder of a few pictures, by their number in the run."""

from __future__ import annotations

import hashlib
import logging
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from safelight.data.framing import crop
from safelight.data.sources import BadSample, Folder
from safelight.errors import InvalidRequest
from safelight.train.pictures import key

log = logging.getLogger(__name__)


class Sight(NamedTuple):
    """How a picture is seen: which, whether mirrored, and where it is cut (None: the middle)."""

    place: int
    mirrored: bool
    where: tuple[float, float] | None


class Photos:
    """The pictures of a folder as squares, in shuffled epochs.

    Args:
        folder: of pictures, at any depth; bad ones are left out with a warning.
        size: side of the squares, in pixels.
        random_crop: cut squares anywhere, else from the middle.
        flip: half of the pictures mirrored.
        most: how many pictures at most, in the order of their names.
        field: the option that names the folder, for messages.

    Raises:
        InvalidRequest: there is no such folder, or no picture in it.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        *,
        random_crop: bool = False,
        flip: bool = False,
        most: int | None = None,
        field: str = "instance_data",
    ) -> None:
        if not folder.is_dir():
            raise InvalidRequest(field, f"{folder} is no folder.", "Name a folder of pictures.")
        self.folder, self.size, self.random_crop, self.flip = folder, size, random_crop, flip
        self._source, self.places, digest = Folder(folder), list[int](), hashlib.sha256()
        self._square: dict[int, bool] = {}
        for place in range(len(self._source)):
            if most is not None and len(self.places) == most:
                break
            try:
                width, height = self._source.picture(place).size
                digest.update(self._source.data(place))
            except BadSample as error:
                log.warning("%s: %s is left out: %s", folder, self._source.key(place), error)
                continue
            self._square[place] = width == height
            self.places.append(place)
        if not self.places:
            raise InvalidRequest(
                field, f"{folder} holds no picture.", "Put 5 to 10 pictures of the subject there."
            )
        self.digest = digest.hexdigest()[:16]
        self._decoded = lru_cache(64)(self._source.picture)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def names(self) -> list[str]:
        """The files' paths below the folder."""
        return [self._source.key(place) for place in self.places]

    def sight(self, index: int, seed: int, stream: int) -> Sight:
        """What picture ``index`` of the run shows: a function of seed, stream and index alone."""
        epoch, at = divmod(index, len(self.places))
        order = key(seed, epoch, stream).permutation(len(self.places))
        rng = key(seed, index, stream + 1)
        mirrored, where = bool(rng.random() < 0.5) and self.flip, tuple(rng.random(2).tolist())
        place = self.places[order[at]]
        cut = self.random_crop and not self._square[place]
        return Sight(place, mirrored, (where[0], where[1]) if cut else None)

    def caption(self, place: int) -> str:
        """What stands beside the picture, in a text file or a list; empty where nothing does."""
        return next(iter(self._source.captions(place)), "")

    def pixels(self, sight: Sight) -> np.ndarray:
        """uint8 ``(size, size, 3)``."""
        part, _ = crop(self._decoded(sight.place), (self.size, self.size), sight.where)
        return np.array(part[:, ::-1] if sight.mirrored else part)

    def all(self) -> np.ndarray:
        """Every picture, cut from the middle: uint8 ``(N, size, size, 3)``."""
        return np.stack([self.pixels(Sight(place, False, None)) for place in self.places])
