"""A flat index of CLIP embeddings: which training pictures are nearest to a text or a picture.

One ``.npz`` file: float16 embeddings of unit length, and what is needed to show the pictures again.
Search compares with every row; for millions of pictures that is a matrix product of a second.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from safelight.data.clip import CLIP
from safelight.data.sources import BadSample, Source, open_source
from safelight.data.tables import Bad
from safelight.errors import InvalidRequest
from safelight.spec import Record

SCHEMA = 1
_BATCH = 64


class Hit(Record):
    """A picture that was found."""

    key: str
    place: int
    """Its index in the source."""
    score: float
    """Cosine of the embeddings."""
    caption: str


class Index:
    """Embeddings with the keys and captions of their pictures."""

    def __init__(
        self, embeddings: np.ndarray, keys: list[str], captions: list[str], about: dict[str, Any]
    ) -> None:
        self.embeddings, self.keys, self.captions, self.about = embeddings, keys, captions, about

    def __len__(self) -> int:
        return len(self.keys)

    def nearest(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the nearest pictures, best first, and their cosines; both ``(N, count)``.

        Args:
            queries: unit vectors ``(N, D)``.
            count: how many each; fewer where the index is smaller.
        """
        count = min(count, len(self))
        rows, scores = [], []
        table = self.embeddings.astype(np.float32)
        for start in range(0, len(queries), _BATCH):
            products = queries[start : start + _BATCH].astype(np.float32) @ table.T
            order = np.argsort(-products, axis=1, kind="stable")[:, :count]
            rows.append(order)
            scores.append(np.take_along_axis(products, order, axis=1))
        if not rows:
            return np.empty((0, count), np.int64), np.empty((0, count), np.float32)
        return np.concatenate(rows), np.concatenate(scores)

    def hits(self, query: np.ndarray, count: int) -> list[Hit]:
        """The nearest pictures to one unit vector ``(D,)``."""
        rows, scores = self.nearest(query[None], count)
        places = self.about["places"]
        return [
            Hit(key=self.keys[r], place=places[r], score=float(s), caption=self.captions[r])
            for r, s in zip(rows[0].tolist(), scores[0].tolist(), strict=True)
        ]

    def check(self, clip: CLIP) -> None:
        """Raises InvalidRequest where the index was built with another CLIP."""
        if clip.digest != self.about["clip_digest"]:
            raise InvalidRequest(
                "clip", f"the index was built with {self.about['clip']}, not with {clip.name}.",
                "Give the same --clip, or build the index again.",
            )  # fmt: skip

    def source(self, path: str | Path | None = None) -> Source:
        """The pictures, where they were or at ``path``."""
        return open_source(
            path or self.about["source"], caption=self.about["caption"], split=self.about["split"]
        )

    def save(self, path: str | Path) -> None:
        """Write the index; a reader never sees half of it."""
        texts = {"keys": self.keys, "captions": self.captions, "about": self.about}
        blob = np.frombuffer(json.dumps(texts, ensure_ascii=False).encode(), np.uint8)
        part = Path(f"{path}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, embeddings=self.embeddings, texts=blob)
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """Read an index.

        Raises:
            InvalidRequest: the file is missing, or no index of this version.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                embeddings, texts = file["embeddings"], json.loads(file["texts"].tobytes())
            if texts["about"]["schema"] != SCHEMA:
                raise ValueError(f"schema {texts['about']['schema']}, this reads {SCHEMA}")
            if len(texts["keys"]) != len(embeddings):
                raise ValueError("keys and embeddings differ in number")
        except FileNotFoundError:
            problem = f"no file {path}."
            raise InvalidRequest("index", problem, "Build it: safelight data index.") from None
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise InvalidRequest("index", f"{path} is no index: {error}.") from error
        return cls(embeddings, texts["keys"], texts["captions"], texts["about"])


def build_index(
    source: Source,
    clip: CLIP,
    *,
    caption: str | None = None,
    split: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Index, Bad]:
    """Embed every picture of a source; those that cannot be read are listed.

    Args:
        source: of :func:`~safelight.data.sources.open_source`.
        clip: the towers.
        caption, split: how the source was opened, kept so that a search can open it again.
        progress: called with the number of pictures since the last call.
    """
    bad, parts, waiting = Bad(), [], []
    keys, captions, places = [], [], []
    for place in range(len(source)):
        try:
            picture, words = source.picture(place), source.captions(place)
        except BadSample as error:
            bad.add(source.key(place), error)
        else:
            waiting.append(picture)
            keys.append(source.key(place))
            captions.append(words[0] if words else "")
            places.append(place)
        if len(waiting) == _BATCH:
            parts.append(clip.pictures(waiting))
            waiting = []
        if progress is not None:
            progress(1)
    parts.append(clip.pictures(waiting))
    about = {
        "schema": SCHEMA,
        "source": source.name,
        "caption": caption,
        "split": split,
        "clip": clip.name,
        "clip_digest": clip.digest,
        "places": places,
    }
    return Index(np.concatenate(parts).astype(np.float16), keys, captions, about), bad


def show(hits: list[Hit], source: Source) -> list[Image.Image | None]:
    """The pictures of hits, found by their keys; None for one that is gone."""
    by_key: dict[str, int] | None = None
    pictures: list[Image.Image | None] = []
    for hit in hits:
        place = hit.place
        try:
            if place >= len(source) or source.key(place) != hit.key:  # the source has changed
                by_key = by_key or {source.key(i): i for i in range(len(source))}
                place = by_key[hit.key]
            pictures.append(source.picture(place))
        except (BadSample, KeyError):
            pictures.append(None)
    return pictures
