"""The cross-check of the judge: colours by hue, relations by where the colours are. Not learned.

A pixel belongs to a colour by hue and saturation in linear light, where shading scales a pixel and
does not turn its hue. Floors and walls are less saturated than things are, all but the wooden one,
which orange must clear by a higher bar; white is what is bright and neutral. A colour is present
where it covers enough of the picture, and stands where its pixels have their median. The
thresholds were set on training renders; :data:`CEILING` is what the check gives on real held-out
renders, so that a lower number on generated pictures means something.

Two things of one colour cannot be told apart this way: their relation is left undecided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safelight.data.stilllife import COLOURS, Arrangement, Wanted
from safelight.evaluate.judge import resized

SIZE = 64
"""Pictures are looked at in this size."""

# Hue in linear light, degrees: from, to, and the least saturation.
HUES = {
    "red": (-40.0, 6.0, 0.70),
    "orange": (6.0, 29.0, 0.90),  # the wooden floor is at 20 degrees and 0.81
    "yellow": (29.0, 75.0, 0.70),
    "green": (90.0, 155.0, 0.62),
    "cyan": (160.0, 212.0, 0.62),
    "blue": (216.0, 253.0, 0.62),
    "purple": (253.0, 310.0, 0.62),
}
LEAST_LIGHT = 0.02
WHITE_LIGHT, WHITE_SATURATION = 0.42, 0.10
LEAST_SHARE = 0.02
"""A colour is present from this share of the picture's pixels on."""

CEILING = {"single": 1.0, "left_right": 0.999, "stack": 0.997, "depth": 0.992}
"""Share of 4,000 real renders (val, combo and pair) on which the check agrees with the truth."""


@dataclass(frozen=True)
class Found:
    """Where the eight colours are: ``share`` (N, 8) of the picture, and ``middle`` (N, 8, 2), the
    median x (to the right) and y (down) of their pixels in 0..1, NaN where there are none."""

    share: np.ndarray
    middle: np.ndarray


@dataclass(frozen=True)
class Check:
    """How pictures agree with prompts, ``(N,)`` bool each.

    ``colours``: every wanted colour is present. ``decided``: the relation can be told (one thing
    alone, or two of different colours). ``relation``: it is as wanted; False where undecided.
    """

    colours: np.ndarray
    decided: np.ndarray
    relation: np.ndarray

    @property
    def agrees(self) -> np.ndarray:
        """Colours and, where it can be told, relation."""
        return self.colours & (self.relation | ~self.decided)


def colour_masks(pictures: np.ndarray) -> np.ndarray:
    """bool ``(N, 8, 64, 64)``: which pixels show which colour, from uint8 ``(N, H, W, 3)``."""
    srgb = resized(pictures, SIZE).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    light = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055).clip(0) ** 2.4)
    r, g, b = np.moveaxis(light, -1, 0)
    top, low = light.max(-1), light.min(-1)
    spread = np.maximum(top - low, 1e-6)
    saturation = spread / np.maximum(top, 1e-6)
    hue = np.where(
        top == r, (g - b) / spread, np.where(top == g, 2 + (b - r) / spread, 4 + (r - g) / spread)
    )
    hue = (60 * hue + 40) % 360 - 40
    masks = np.zeros((len(pictures), len(COLOURS), SIZE, SIZE), bool)
    for i, colour in enumerate(COLOURS):
        if colour == "white":
            masks[:, i] = (low > WHITE_LIGHT) & (saturation < WHITE_SATURATION)
        else:
            start, stop, least = HUES[colour]
            masks[:, i] = (hue >= start) & (hue < stop) & (saturation > least) & (top > LEAST_LIGHT)
    return masks


def find(pictures: np.ndarray) -> Found:
    """Look for all colours in uint8 ``(N, H, W, 3)``."""
    masks = colour_masks(pictures)
    middle = np.full((*masks.shape[:2], 2), np.nan)
    for n, i in np.argwhere(masks.any((2, 3))):
        rows, columns = np.nonzero(masks[n, i])
        middle[n, i] = (np.median(columns) + 0.5) / SIZE, (np.median(rows) + 0.5) / SIZE
    return Found(masks.mean((2, 3)), middle)


def check(pictures: np.ndarray, wanted: Sequence[Wanted]) -> Check:
    """Compare pictures, uint8 ``(N, H, W, 3)``, with what their prompts want."""
    found = find(pictures)
    n = len(wanted)
    colours, decided, relation = np.ones(n, bool), np.ones(n, bool), np.zeros(n, bool)
    for k, want in enumerate(wanted):
        a = COLOURS.index(want.a.colour)
        b = a if want.b is None else COLOURS.index(want.b.colour)
        colours[k] = bool((found.share[k, [a, b]] >= LEAST_SHARE).all())
        if want.b is None:
            relation[k] = colours[k]
        elif a == b:
            decided[k] = False
        elif colours[k]:
            dx, dy = found.middle[k, b] - found.middle[k, a]
            relation[k] = stands(want.arrangement, float(dx), float(dy))
    return Check(colours, decided, relation)


def stands(arrangement: Arrangement, dx: float, dy: float) -> bool:
    """Whether the second thing, ``dx`` to the right of and ``dy`` below the first, stands so."""
    match arrangement:
        case Arrangement.LEFT_RIGHT:
            return dx > 0.2 and abs(dy) < 0.55 * dx
        case Arrangement.STACK:
            return dy > 0.15 and abs(dx) < 0.5 * dy
        case _:
            return dy < -0.08 and 0.3 * abs(dy) < abs(dx) < 2.3 * abs(dy)
