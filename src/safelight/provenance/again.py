"""Making a picture again from what its file says, and comparing the two.

:func:`replay` promises no difference where the plan and the model are the same
(:func:`safelight.provenance.record.plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from safelight.errors import InvalidRequest
from safelight.provenance.record import read
from safelight.request import GenerateRequest, ImageResult
from safelight.store import pictures

LOSSY = ("JPEG", "WEBP")


@dataclass(frozen=True)
class Difference:
    """Between two pictures, over all 8-bit channel values."""

    largest: int
    """0..255."""
    mean: float
    equal: float
    """Share of values that are the same."""


def compare(a: Image.Image, b: Image.Image) -> Difference:
    """Pixel difference of two pictures of one size.

    Raises:
        InvalidRequest: their sizes differ.
    """
    if a.size != b.size:
        raise InvalidRequest("picture", f"is {a.size}, the new one {b.size}: it was resized.")
    one = np.asarray(a.convert("RGB"), dtype=np.int16)
    difference = np.abs(one - np.asarray(b.convert("RGB"), dtype=np.int16))
    return Difference(
        int(difference.max()), float(difference.mean()), float((difference == 0).mean())
    )


@dataclass(frozen=True)
class Replay:
    """A picture made again.

    Args:
        result: the new one.
        difference: None where there is no new picture.
        same_plan: the plan digest is that of the file.
        same_model: so is the model's; None where either has none.
        same_pixels: the new picture is, bit by bit, what was once made; None where the file does
            not say. A lossy file differs from it all the same.
        changes: what is different now, for people.
        lossy: the file's format does not keep pixels.
    """

    result: ImageResult
    difference: Difference | None
    same_plan: bool
    same_model: bool | None
    same_pixels: bool | None
    changes: tuple[str, ...]
    lossy: bool

    @property
    def broken(self) -> bool:
        """The promise is: same plan, same model, no difference. (A lossy or edited file is
        compared by its pixel digest alone.)"""
        return self.same_plan and self.same_model is not False and self.same_pixels is False


Again = Callable[[GenerateRequest], list[ImageResult]]


def replay(path: str | Path, again: Again) -> Replay:
    """Make a picture again from what it says, and compare.

    Args:
        again: makes a request's pictures (``Generator.generate``), on the model to compare with.

    Raises:
        InvalidRequest: the file says nothing, or has been resized.
    """
    provenance = read(path)
    request, record = provenance.request, provenance.record
    batch = record.get("batch") or {"index": 0, "size": 1, "alike": True}
    index = 0
    if batch["alike"] and batch["size"] > 1 and not request.deterministic:
        # In the same company, so that sums are taken in the same order.
        index = int(batch["index"])
        first = ((request.seed or 0) - index) % 2**63
        request = request.replace(seed=first, count=int(batch["size"]))
    result = again(request)[index]
    changes = [*_changes(record, result.metadata), *provenance.notes]
    same_plan = record.get("plan_digest") == result.metadata.get("plan_digest")
    if record and not record["batch"]["alike"]:
        changes.append("it was made together with other requests' pictures")
    with Image.open(path) as file:
        lossy = file.format in LOSSY
    old = pictures.open_picture(path, field="picture")
    difference = None if result.image is None else compare(old, result.image)
    pixels = record.get("pixels")
    return Replay(
        result=result,
        difference=difference,
        same_plan=same_plan,
        same_model=_same_model(record, result.metadata),
        same_pixels=None if pixels is None else pixels == result.metadata["pixels"],
        changes=tuple(changes),
        lossy=lossy,
    )


def _same_model(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool | None:
    was, now = (record.get("model", {}).get("digest") for record in (old, new))
    return was == now if was and now else None


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found = []
    for part in ("plan", "model"):
        was, now = old.get(part, {}), new.get(part, {})
        optional = {"checker", "cheaper"} & (set(was) | set(now)) if was and now else set()
        for key in sorted((set(was) & set(now) - {"batch", "source"}) | optional):
            if was.get(key) != now.get(key):
                found.append(f"{part} {key}: {_brief(was.get(key))}, now {_brief(now.get(key))}")
    files = [{a["name"]: a["sha256"] for a in each.get("adapters", ())} for each in (old, new)]
    for name in sorted(files[0].keys() & files[1].keys()):
        if files[0][name] != files[1][name]:
            found.append(f"{name}: {_brief(files[0][name])}, now {_brief(files[1][name])}")
    return found


def _brief(value: object) -> str:
    text = str(value)
    return f"{text[:10]}…" if len(text) == 64 else text
