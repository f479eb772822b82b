"""What a sweep is measured on: prompts with seeds, and the pictures to compare with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from safelight.data.framing import crop
from safelight.errors import InvalidRequest
from safelight.evaluate import prompts as lists
from safelight.evaluate.score import reference_renders
from safelight.store.pictures import open_picture

COCO_COUNT, COCO_SIZE = 10_000, 512
"""Of the cards: 10,000 random prompts, at 512x512."""


@dataclass(frozen=True, eq=False)
class Brief:
    """Prompts, their seeds, and a reference.

    Attributes:
        name: for people.
        size: side of the pictures; None: the model's own.
        reference: the pictures to compare with, by the side of those that were made.
        about: names of the reference's pictures; part of the digest.
    """

    name: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    size: int | None
    reference: Callable[[int], Iterator[np.ndarray]]
    about: str = ""

    @property
    def digest(self) -> str:
        """Tells briefs apart: prompts, seeds and reference."""
        text = json.dumps([self.prompts, self.seeds, self.about])
        return hashlib.sha256(text.encode()).hexdigest()


def still_life(name: str, count: int | None = None, *, size: int | None = None) -> Brief:
    """One of the fixed lists, or its first prompts, against fresh renders, four for each prompt.

    Raises:
        InvalidRequest: no such list.
    """
    if name not in lists.DIGESTS:
        raise InvalidRequest("list", f"no list {name!r}.", f"One of {', '.join(lists.DIGESTS)}.")
    chosen = lists.load(name, count)

    def reference(size: int) -> Iterator[np.ndarray]:
        for part in reference_renders(chosen, size):
            yield from part

    return Brief(
        f"still life: {name}, {len(chosen)} prompts",
        tuple(p.text for p in chosen), tuple(p.seed for p in chosen), size, reference, name,
    )  # fmt: skip


def coco(
    captions: str | Path,
    images: str | Path,
    count: int | None = None,
    *,
    seed: int = 0,
    size: int | None = None,
) -> Brief:
    """Random captions of COCO's validation set, against all of its pictures.

    The cards say "10000 random prompts from the COCO2017 validation set", not which: ours are drawn
    by ``seed``, without putting back, and their pictures have the seeds ``seed``, ``seed + 1`` ….

    Args:
        captions: ``captions_val2017.json``.
        images: the folder of its pictures (``val2017``).
        count: how many captions; default 10,000.
        seed: of the choice.
        size: side of the pictures, made and real (scaled to cover the square, and cut); default
            512.

    Raises:
        InvalidRequest: a file is missing or not what it should be, before anything is made.
    """
    count = COCO_COUNT if count is None else count
    folder, (texts, files) = Path(images), _read(Path(captions))
    if not folder.is_dir():
        raise InvalidRequest("images", f"no folder {folder}.", "Give COCO's val2017.")
    here = {p.name for p in folder.iterdir()}
    if missing := [name for name in files if name not in here]:
        raise InvalidRequest(
            "images", f"{folder} lacks {len(missing)} of {len(files)} pictures, as {missing[0]}."
        )
    if not 0 < count <= len(texts):
        raise InvalidRequest("count", f"{count} of {len(texts)} captions cannot be drawn.")
    places = np.random.default_rng(seed).choice(len(texts), count, replace=False)

    def reference(side: int) -> Iterator[np.ndarray]:
        for name in files:
            yield crop(_opened(folder / name), (side, side))[0]

    return Brief(
        f"COCO: {count} of {len(texts)} captions, seed {seed}",
        tuple(texts[i] for i in places), tuple(seed + k for k in range(count)),
        COCO_SIZE if size is None else size, reference, "\n".join(files),
    )  # fmt: skip


def _opened(path: Path) -> Image.Image:
    return open_picture(path, field="images")


def _read(path: Path) -> tuple[list[str], list[str]]:
    """Captions in the order of their ids, and names of picture files."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        rows = sorted(data["annotations"], key=lambda row: row["id"])
        texts = [" ".join(row["caption"].split()) for row in rows]
        files = sorted({Path(row["file_name"]).name for row in data["images"]})
    except FileNotFoundError:
        raise InvalidRequest("coco", f"no file {path}.", "Give captions_val2017.json.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{path} is no COCO captions file: {type(error).__name__} {error}."
        raise InvalidRequest("coco", problem) from error
    return [t for t in texts if t], files
