"""Masks to learn inpainting on: Suvorov et al. 2022, LaMa (2109.07161), its "large" setting.

Half the time one to four random strokes, else one to three boxes, half of those with round
corners. Sizes are given for 512 pixels and scale with the picture.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

_NATIVE = 512


def lama_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A mask, float32 ``(height, width)``: 1 is to be painted, 0 is kept."""
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    scale = math.sqrt(width * height) / _NATIVE
    if rng.random() < 0.5:
        for _ in range(rng.integers(1, 5)):
            _stroke(draw, rng, mask.size, scale)
    else:
        for _ in range(rng.integers(1, 4)):
            _box(draw, rng, mask.size, scale)
    return (np.asarray(mask, dtype=np.float32) >= 128).astype(np.float32)


def _stroke(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: tuple[int, int], scale: float
) -> None:
    """A polyline of a few turns, with round joints."""
    x, y = rng.uniform(0, size)
    for turn in range(rng.integers(1, 6)):
        angle = rng.uniform(0, 2 * math.pi) + (math.pi if turn % 2 else 0.0)
        length = rng.uniform(10, 450) * scale
        width = max(1, round(rng.uniform(5, 400) * scale))
        to_x = float(np.clip(x + length * math.sin(angle), 0, size[0]))
        to_y = float(np.clip(y + length * math.cos(angle), 0, size[1]))
        draw.line((x, y, to_x, to_y), fill=255, width=width)
        for cx, cy in ((x, y), (to_x, to_y)):
            r = width / 2
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
        x, y = to_x, to_y


def _box(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: tuple[int, int], scale: float
) -> None:
    margin = 10 * scale
    width, height = rng.uniform(75, 450, 2) * scale
    left = rng.uniform(margin, max(margin, size[0] - margin - width))
    top = rng.uniform(margin, max(margin, size[1] - margin - height))
    right, bottom = min(left + width, size[0] - margin), min(top + height, size[1] - margin)
    corners = (left, top, right, bottom)
    round_off = rng.random() < 0.5
    if round_off:
        draw.rounded_rectangle(corners, radius=rng.uniform(0, 60) * scale, fill=255)
    else:
        draw.rectangle(corners, fill=255)
