"""What a still-life picture is judged by: five attributes, as class numbers.

Shared by whoever learns to read pictures (the auxiliary head of the contrastive training, the
judge, the probe) and whoever scores them. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from safelight.data import stilllife
from safelight.data.stilllife import Scene, Wanted, WantedThing

ATTRIBUTE_CLASSES = {
    "arrangement": 4,
    "shape_a": len(stilllife.SHAPES),
    "colour_a": len(stilllife.COLOURS),
    "shape_b": len(stilllife.SHAPES) + 1,
    "colour_b": len(stilllife.COLOURS) + 1,
}
"""What a picture is judged by. Classes of ``_b`` include "no second object", the last one."""


def attribute_classes(scenes: Sequence[Scene]) -> np.ndarray:
    """int64 ``(N, 5)`` class numbers in the order of :data:`ATTRIBUTE_CLASSES`."""
    table = stilllife.attribute_array(list(scenes))
    columns = [table[:, stilllife.ATTRIBUTES.index(name)] for name in ATTRIBUTE_CLASSES]
    classes = np.stack(columns, axis=1)
    absent = np.array(list(ATTRIBUTE_CLASSES.values())) - 1
    return np.where(classes < 0, absent, classes)


def wanted_classes(wanted: Sequence[Wanted]) -> np.ndarray:
    """int64 ``(N, 5)``: what captions ask for, in the order of :data:`ATTRIBUTE_CLASSES`."""

    def thing(it: WantedThing | None) -> list[int]:
        if it is None:
            return [len(stilllife.SHAPES), len(stilllife.COLOURS)]
        return [stilllife.SHAPES.index(it.shape), stilllife.COLOURS.index(it.colour)]

    rows = [[int(w.arrangement), *thing(w.a), *thing(w.b)] for w in wanted]
    return np.array(rows, np.int64).reshape(-1, len(ATTRIBUTE_CLASSES))


def mirrored_classes(classes: np.ndarray) -> np.ndarray:
    """The classes of the mirrored pictures: left and right exchanged, all else as it was."""
    out = classes.copy()
    beside = classes[:, 0] == stilllife.Arrangement.LEFT_RIGHT
    out[beside] = classes[beside][:, [0, 3, 4, 1, 2]]
    return out
