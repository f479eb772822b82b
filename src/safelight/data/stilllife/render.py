"""A vectorised ray-caster for the still-life world: one to four hundred small pictures a second.

The camera is orthographic, so all rays of a picture share one direction, and in a thing's own
frame each surface is met by a short closed form (a ring by a few sphere-tracing steps). Things are
traced only inside their own screen boxes, grouped by (shape, box size) over the whole batch, at
`oversample`² rays a pixel; the background and its shadows are smooth and take one ray a pixel.
The lamp is white, so a traced sample is two numbers, diffuse light and highlight; colour comes in
when samples have been averaged. Light is linear until the last step, sRGB after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, cos, floor, sin

import numpy as np

from safelight.data.stilllife.layout import Body, Layout, lay_out, support
from safelight.data.stilllife.shadows import proxy_frames, shadow
from safelight.data.stilllife.trace import CAMERA_DISTANCE, Hits, trace
from safelight.data.stilllife.world import Scene

# sRGB, 0-255.
COLOUR_RGB = {
    "red": (222, 28, 36),
    "orange": (255, 128, 12),
    "yellow": (255, 220, 32),
    "green": (36, 164, 52),
    "cyan": (40, 212, 222),
    "blue": (28, 68, 224),
    "purple": (138, 44, 184),
    "white": (250, 250, 250),
}
FLOOR_RGB = {
    "grey": (148, 148, 152),
    "wooden": (152, 106, 70),
    "dark": (66, 66, 74),
    "beige": (210, 190, 156),
    "mint": (156, 194, 168),
}
WALL_RGB = {"cream": (224, 214, 190), "slate": (122, 136, 154), "rose": (204, 162, 160)}


@dataclass(frozen=True)
class Rendering:
    """N pictures and their truth.

    rgb: uint8 (N, H, W, 3). depth: float32 (N, H, W), distance from the camera plane in world
    units, at the pixel's nearest sample. masks: bool (N, 2, H, W), the pixels of which more than
    half shows thing a or b (all False where there is no b).
    """

    rgb: np.ndarray
    depth: np.ndarray
    masks: np.ndarray


def render(scenes: Sequence[Scene], size: int, *, oversample: int | None = None) -> np.ndarray:
    """Draw scenes: uint8 sRGB (N, size, size, 3); `oversample`² rays a pixel (9, or 4 above 64)."""
    return _draw_all(scenes, size, oversample, full=False).rgb


def render_full(scenes: Sequence[Scene], size: int, *, oversample: int | None = None) -> Rendering:
    """Draw scenes with depth and visible masks."""
    return _draw_all(scenes, size, oversample, full=True)


def _draw_all(
    scenes: Sequence[Scene], size: int, oversample: int | None, *, full: bool
) -> Rendering:
    if oversample is None:
        oversample = 3 if size <= 64 else 2  # a small picture's edges need more levels
    if size < 8 or oversample < 1:
        raise ValueError(f"size must be at least 8 and oversample at least 1: {size}, {oversample}")
    n = len(scenes)
    rgb = np.empty((n, size, size, 3), np.uint8)
    depth = np.empty((n, size, size) if full else (0, size, size), np.float32)
    masks = np.zeros((n, 2, size, size) if full else (0, 2, size, size), bool)
    # Batches small enough to stay in the cache, large enough to hide Python's own cost.
    step = max(1, 32 * 64 * 64 // (size * size))
    for start in range(0, n, step):
        part = slice(start, min(n, start + step))
        _draw_batch(
            scenes[part],
            size,
            oversample,
            rgb[part],
            depth[part] if full else None,
            masks[part] if full else None,
        )
    return Rendering(rgb, depth, masks)


@dataclass
class _Box:
    """One thing's screen box: rows top ... top + side and columns left ... left + side (pixels)."""

    picture: int
    slot: int
    body: Body
    other: Body | None
    top: int
    left: int
    side: int
    hits: Hits | None = None
    at: int = 0  # its row in the group's arrays


def _draw_batch(
    scenes: Sequence[Scene],
    size: int,
    k: int,
    rgb: np.ndarray,
    depth: np.ndarray | None,
    masks: np.ndarray | None,
) -> None:
    layouts = [lay_out(s) for s in scenes]
    light, far = _background(scenes, layouts, size, depth is not None)
    boxes = [box for i, lay in enumerate(layouts) for box in _boxes(i, lay, size)]
    groups: dict[tuple[str, int], list[_Box]] = {}
    for box in boxes:
        groups.setdefault((box.body.thing.shape, box.side), []).append(box)
    for (shape, side), group in groups.items():
        lays = [layouts[box.picture] for box in group]
        hits = trace(
            shape,
            [box.body for box in group],
            [box.other for box in group],
            lays,
            np.array([[box.top, box.left] for box in group], np.float32),
            side * k,
            size,
            k,
        )
        for at, box in enumerate(group):
            box.hits, box.at = hits, at
    _hide(boxes, k)
    pooled = [_pool_group(group, k, far is not None) for group in groups.values()]
    # The samples of two things are disjoint, so shares add up: first dim the background by all
    # that covers it, then add each thing's light.
    cover = np.zeros(light.shape[:3], np.float32)
    for group, (share, _, _, _) in zip(groups.values(), pooled, strict=True):
        for box in group:
            here, mine = _windows(box, size)
            cover[box.picture][here] += share[box.at][mine]
    light *= (1.0 - cover)[..., None]
    for group, (share, diffuse, shine, near) in zip(groups.values(), pooled, strict=True):
        for box in group:
            here, mine = _windows(box, size)
            albedo = linear(COLOUR_RGB[box.body.thing.colour])
            canvas = light[box.picture][here]
            canvas += diffuse[box.at][mine][..., None] * albedo
            canvas += shine[box.at][mine][..., None]
            if far is not None and near is not None:
                window = far[box.picture][here]
                np.minimum(window, near[box.at][mine], out=window)
            if masks is not None:
                masks[box.picture, box.slot][here] = share[box.at][mine] > 0.5
    rgb[...] = _encode(light)
    if depth is not None and far is not None:
        depth[...] = far


def _boxes(picture: int, lay: Layout, size: int) -> list[_Box]:
    """The screen boxes of a layout, with sides rounded up so that many things share a group."""
    up = (0.0, cos(lay.pitch), -sin(lay.pitch))
    scale = size / lay.view
    quantum = max(2, size // 16)
    found = []
    for slot, body in enumerate(lay.bodies):
        u = (body.centre[0] - lay.u) * scale + 0.5 * size
        v = 0.5 * size - (body.centre[1] * up[1] + body.centre[2] * up[2] - lay.v) * scale
        left = floor(u - support(body, (-1.0, 0.0, 0.0)) * scale)
        right = ceil(u + support(body, (1.0, 0.0, 0.0)) * scale)
        top = floor(v - support(body, up) * scale)
        bottom = ceil(v + support(body, (0.0, -up[1], -up[2])) * scale)
        side = quantum * ceil(max(right - left, bottom - top) / quantum)
        other = lay.bodies[1 - slot] if len(lay.bodies) == 2 else None
        found.append(_Box(picture, slot, body, other, top, left, side))
    return found


def _hide(boxes: list[_Box], k: int) -> None:
    """Where two things of a picture overlap on the screen, forget the samples of the farther."""
    for a, b in itertools.pairwise(boxes):
        if a.picture != b.picture or a.hits is None or b.hits is None:
            continue
        top, left = max(a.top, b.top), max(a.left, b.left)
        height = min(a.top + a.side, b.top + b.side) - top
        width = min(a.left + a.side, b.left + b.side) - left
        if height <= 0 or width <= 0:
            continue
        (ra, ca), (rb, cb) = ((k * (top - x.top), k * (left - x.left)) for x in (a, b))
        here_a = (a.at, slice(ra, ra + k * height), slice(ca, ca + k * width))
        here_b = (b.at, slice(rb, rb + k * height), slice(cb, cb + k * width))
        a_wins = a.hits.depth[here_a] < b.hits.depth[here_b]
        for box, here, keep in ((a, here_a, a_wins), (b, here_b, ~a_wins)):
            hits = box.hits
            assert hits is not None
            for values in (hits.cover, hits.diffuse, hits.shine):
                values[here] *= keep


def _windows(box: _Box, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of a box inside the picture, as (slices of the picture, slices of the box)."""
    r0, r1 = max(0, box.top), max(0, min(size, box.top + box.side))
    c0, c1 = max(0, box.left), max(0, min(size, box.left + box.side))
    here = (slice(r0, r1), slice(c0, c1))
    return here, (slice(r0 - box.top, r1 - box.top), slice(c0 - box.left, c1 - box.left))


def _pool_group(
    group: list[_Box], k: int, want_depth: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """A group's samples as pixels: cover, diffuse, shine and (if wanted) the nearest depth."""
    hits = group[0].hits
    assert hits is not None
    near = None
    if want_depth:
        seen = np.where(hits.cover > 0, hits.depth, np.inf)
        n, side = seen.shape[0], seen.shape[1] // k
        near = seen.reshape(n, side, k, side, k).min(axis=(2, 4))
    return _pool(hits.cover, k), _pool(hits.diffuse, k), _pool(hits.shine, k), near


def _pool(samples: np.ndarray, k: int) -> np.ndarray:
    """(n, k·side, k·side) samples -> (n, side, side) means."""
    rows = sum(samples[:, i::k] for i in range(k))
    return sum(rows[:, :, i::k] for i in range(k)) * np.float32(1.0 / k**2)  # type: ignore[return-value,index]


def _background(
    scenes: Sequence[Scene], layouts: list[Layout], size: int, want_depth: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Floor and wall in linear light (N, size, size, 3), shadows included, and their depth."""
    f4 = np.float32

    def column(values: list[float]) -> np.ndarray:
        return np.array(values, f4)[:, None, None]

    grid = ((np.arange(size, dtype=f4) + 0.5) / size - 0.5).astype(f4)
    view = column([lay.view for lay in layouts])
    x = grid[None, None, :] * view + column([lay.u for lay in layouts])  # (n, 1, size)
    v = -grid[None, :, None] * view + column([lay.v for lay in layouts])  # (n, size, 1)
    sp, cp = column([sin(x.pitch) for x in layouts]), column([cos(x.pitch) for x in layouts])
    wall_z = column([lay.wall_z for lay in layouts])
    on_floor_z = -v / sp
    z = np.maximum(on_floor_z, wall_z)
    y = np.maximum((v + wall_z * sp) / cp, 0.0)
    # The seam is a horizontal line: its pixel's share of wall is known exactly.
    wall = np.clip((v + wall_z * sp) / (view / size) + 0.5, 0.0, 1.0)
    # A pool of light around the middle, brighter towards the lamp; a wall that darkens upwards.
    lamp = column([lay.light[0] for lay in layouts])
    glow = column([1.0 + 0.05 * s.look.glow for s in scenes])
    across = grid[None, None, :] * 2.0
    pool = 1.0 - 0.13 * across * across + 0.16 * lamp * across
    fall = np.where(wall > 0.5, 0.92 - 0.16 * y, 0.86 + 0.22 * (0.5 - (v - v[:, -1:]) / view))
    shade = pool * (fall * glow)
    for slot in (0, 1):
        bodies = [lay.bodies[slot] if slot < len(lay.bodies) else None for lay in layouts]
        have = [i for i, body in enumerate(bodies) if body is not None]
        if not have:
            continue
        to_local, offset, to_lamp = proxy_frames(
            [b for b in bodies if b is not None], [layouts[i].light for i in have]
        )
        m, o, lamp_l = to_local[..., None, None], offset[..., None, None], to_lamp[..., None, None]
        xs, ys, zs = x[have], y[have], z[have]
        rest = [m[:, i, 1] * ys + m[:, i, 2] * zs + o[:, i] for i in range(3)]
        p = [m[:, i, 0] * xs + rest[i] for i in range(3)]
        shade[have] *= shadow(p, lamp_l, cast=0.42, contact=0.55)
    floors = np.array([linear(FLOOR_RGB[s.floor]) for s in scenes], f4)[:, None, None]
    walls = np.array([linear(WALL_RGB[s.wall]) for s in scenes], f4)[:, None, None]
    light = (floors + (walls - floors) * wall[..., None]) * shade[..., None]
    if not want_depth:
        return light, None
    depth = f4(CAMERA_DISTANCE) - y * sp - z * cp
    return light, np.broadcast_to(depth, shade.shape).astype(f4)


@cache
def linear(rgb: tuple[int, int, int]) -> np.ndarray:
    """sRGB 0-255 -> linear light 0-1, float32 (3,)."""
    c = np.array(rgb, np.float64) / 255.0
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4).astype(np.float32)


@cache
def _srgb_table() -> np.ndarray:
    x = np.arange(4097) / 4096.0
    y = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    return np.round(255.0 * y).astype(np.uint8)


def _encode(light: np.ndarray) -> np.ndarray:
    """Linear light -> uint8 sRGB by table: the power function would cost more than the rays."""
    index = np.clip(light * np.float32(4096.0) + np.float32(0.5), 0.0, 4096.0).astype(np.uint16)
    return _srgb_table()[index]
