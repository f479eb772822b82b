"""Rays against one shape at a time, for many things at once: where they hit, and the light there.

Frames: `o` lies on the plane through the thing's centre at right angles to the ray `d`, so that
o·d = 0 and t is measured from that plane (negative towards the viewer). Arrays are
(things, rows, columns); per-thing constants are (things, 1, 1). All of it float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from safelight.data.stilllife import layout as geometry
from safelight.data.stilllife.layout import Body, Layout
from safelight.data.stilllife.shadows import proxy_frames, shadow

CAMERA_DISTANCE = 10.0  # depth of the plane through the world's origin, in world units

_TORUS_STEPS = 12
_F = np.float32
Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass
class Hits:
    """Samples of a group, each (n, side, side): cover is 1 where the ray hits and 0 elsewhere;
    diffuse (to be multiplied by the colour) and shine are 0 where it misses, depth is inf there."""

    cover: np.ndarray
    diffuse: np.ndarray
    shine: np.ndarray
    depth: np.ndarray


def trace(
    shape: str,
    bodies: list[Body],
    others: list[Body | None],
    layouts: list[Layout],
    corners: np.ndarray,
    side: int,
    size: int,
    k: int,
) -> Hits:
    """Trace things of one shape in square boxes of `side` samples.

    corners: (n, 2) first row and column of each box in pixels; k: samples along a pixel's side.
    """
    axes = np.array([body.axes for body in bodies], np.float64)  # rows: local axes in the world
    centre = np.array([body.centre for body in bodies], np.float64)
    pitch = np.array([lay.pitch for lay in layouts])
    zero = np.zeros_like(pitch)
    up = np.stack([zero, np.cos(pitch), -np.sin(pitch)], 1)
    ray = np.stack([zero, -np.sin(pitch), -np.cos(pitch)], 1)
    lamp = np.array([lay.light for lay in layouts])
    middle = np.array([[lay.u, lay.v, lay.view] for lay in layouts])

    # Picture-plane coordinates relative to the thing's centre, in units of its scale.
    scale = np.array([body.scale for body in bodies])
    steps = (np.arange(side) + 0.5) / k
    cu, cv = centre[:, 0], np.einsum("ni,ni->n", centre, up)
    per = middle[:, 2] / size
    u = (steps[None] + corners[:, 1:2] - 0.5 * size) * per[:, None] + (middle[:, 0] - cu)[:, None]
    v = (0.5 * size - steps[None] - corners[:, 0:1]) * per[:, None] + (middle[:, 1] - cv)[:, None]
    u = (u / scale[:, None]).astype(_F)[:, None, :]
    v = (v / scale[:, None]).astype(_F)[:, :, None]

    right_l, up_l, d, lamp_l, sky = (
        np.einsum("nij,nj->ni", axes, w).astype(_F)[..., None, None]
        for w in (np.eye(3)[[0] * len(bodies)], up, ray, lamp, np.eye(3)[[1] * len(bodies)])
    )
    o = tuple(right_l[:, i] * u + up_l[:, i] * v for i in range(3))
    direction = (d[:, 0], d[:, 1], d[:, 2])
    t, hit, normal = _SURFACES[shape](o, direction)  # type: ignore[arg-type]
    np.copyto(t, 0.0, where=~hit)
    point = tuple(o[i] + t * direction[i] for i in range(3))

    lit, shine = _light(normal, lamp_l, -d, sky)
    height = sum(sky[:, i] * point[i] for i in range(3))
    height = height * scale[:, None, None].astype(_F) + centre[:, 1:2, None].astype(_F)
    # Things are a little darker where they meet the floor.
    lit *= 0.80 + 0.20 * np.clip(height * 2.5, 0.0, 1.0)
    have = [i for i, other in enumerate(others) if other is not None]
    if have:
        left = _from_other(point, have, bodies, others, layouts)
        lit[have] *= left
        shine[have] *= left
    tone = np.array([1.0 + 0.06 * body.tone for body in bodies], _F)[:, None, None]
    cover = hit.astype(_F)
    lit *= cover * tone
    shine *= cover
    base = (centre * ray).sum(1) + CAMERA_DISTANCE
    depth = base.astype(_F)[:, None, None] + t * scale[:, None, None].astype(_F)
    np.copyto(depth, np.inf, where=~hit)
    return Hits(cover, lit, shine, depth)


def _light(
    n: Triple, lamp: np.ndarray, eye: np.ndarray, sky: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A soft key lamp, light from above and from the viewer's side, and a small highlight."""
    half = lamp + eye
    half = half / np.sqrt((half * half).sum(axis=1, keepdims=True))

    def facing(w: np.ndarray) -> np.ndarray:
        total = n[0] * w[:, 0]
        total += n[1] * w[:, 1]
        total += n[2] * w[:, 2]
        return total

    key = np.maximum(facing(lamp) * _F(0.88) + _F(0.12), 0.0)
    lit = _F(0.72) * key
    lit += _F(0.17) * facing(sky)
    lit += _F(0.23)
    shine = np.clip(facing(half), 0.0, 1.0)  # rays that miss may carry any normal
    for _ in range(5):  # the 32nd power
        shine *= shine
    shine *= _F(0.30)
    return lit, shine


def _from_other(
    point: tuple[np.ndarray, ...],
    have: list[int],
    bodies: list[Body],
    others: list[Body | None],
    layouts: list[Layout],
) -> np.ndarray:
    """The light that the picture's other thing leaves."""
    m, offset, lamp = proxy_frames(
        [other for other in others if other is not None], [layouts[i].light for i in have]
    )
    axes = np.array([bodies[i].axes for i in have])
    centre = np.array([bodies[i].centre for i in have])
    scale = np.array([bodies[i].scale for i in have])[:, None, None]
    # local -> world (axesᵀ p·scale + centre) -> the other's unit ball, as one affine map
    q = (np.einsum("nij,nkj->nik", m, axes) * scale).astype(_F)[..., None, None]
    s = (np.einsum("nij,nj->ni", m, centre) + offset).astype(_F)[..., None, None]
    all_here = len(have) == len(bodies)
    x, y, z = (p if all_here else p[have] for p in point)
    local = []
    for i in range(3):
        coordinate = q[:, i, 0] * x
        coordinate += q[:, i, 1] * y
        coordinate += q[:, i, 2] * z
        coordinate += s[:, i]
        local.append(coordinate)
    return shadow(local, lamp[..., None, None], cast=0.45, contact=0.40)


# -- surfaces: (o, d) -> t, hit, unit normal, for a large thing in its own frame ------------------


def _sphere(o: Triple, d: Triple) -> tuple[np.ndarray, np.ndarray, Triple]:
    r = _F(geometry.SPHERE_RADIUS)
    inside = r * r - (o[0] * o[0] + o[1] * o[1] + o[2] * o[2])
    hit = inside > 0
    t = -np.sqrt(np.maximum(inside, 0.0))
    return t, hit, tuple((o[i] + t * d[i]) / r for i in range(3))  # type: ignore[return-value]


def _cube(o: Triple, d: Triple) -> tuple[np.ndarray, np.ndarray, Triple]:
    h = _F(geometry.CUBE_HALF)
    near, far = [], []
    for i in range(3):
        inverse = 1.0 / np.where(np.abs(d[i]) < 1e-6, _F(1e-6), d[i])
        middle, half = -o[i] * inverse, np.abs(h * inverse)
        near.append(middle - half)
        far.append(middle + half)
    t = np.maximum(np.maximum(near[0], near[1]), near[2])
    hit = t < np.minimum(np.minimum(far[0], far[1]), far[2])
    x_face, y_face = near[0] >= t, near[1] >= t
    z_face = ~(x_face | y_face)
    faces = (x_face, y_face & ~x_face, z_face)
    return t, hit, tuple(-np.sign(d[i]) * faces[i] for i in range(3))  # type: ignore[return-value]


def _cylinder(o: Triple, d: Triple) -> tuple[np.ndarray, np.ndarray, Triple]:
    r, h = _F(geometry.CYLINDER_RADIUS), _F(geometry.CYLINDER_HALF)
    a = d[0] * d[0] + d[2] * d[2]
    b = o[0] * d[0] + o[2] * d[2]
    c = o[0] * o[0] + o[2] * o[2] - r * r
    root = b * b - a * c
    wall = (-b - np.sqrt(np.maximum(root, 0.0))) / a
    cap = (h - o[1]) / d[1]  # only the upper cap faces the camera
    t = np.maximum(wall, cap)  # a convex body: the ray is inside once it has passed both
    on_cap = cap > wall
    y = o[1] + t * d[1]
    far = (-b + np.sqrt(np.maximum(root, 0.0))) / a
    hit = (root > 0) & (y > -h) & (t < far)
    wall_x, wall_z = (o[0] + t * d[0]) / r, (o[2] + t * d[2]) / r
    side = ~on_cap
    return t, hit, (wall_x * side, on_cap.astype(_F), wall_z * side)


def _cone(o: Triple, d: Triple) -> tuple[np.ndarray, np.ndarray, Triple]:
    slope = _F(geometry.CONE_RADIUS / geometry.CONE_HEIGHT)
    k2, apex = slope * slope, _F(geometry.CONE_HEIGHT)
    w = apex - o[1]  # distance below the apex; along the ray it changes by -d_y
    a = d[0] * d[0] + d[2] * d[2] - k2 * d[1] * d[1]
    b = o[0] * d[0] + o[2] * d[2] + k2 * w * d[1]
    c = o[0] * o[0] + o[2] * o[2] - k2 * w * w
    root = b * b - a * c
    t = (-b - np.sqrt(np.maximum(root, 0.0))) / a
    below = w - t * d[1]
    hit = (root > 0) & (below > 0) & (below < apex)
    x, z = o[0] + t * d[0], o[2] + t * d[2]
    # (x, k² below, z) has length slope·sqrt(1 + k²)·below on the surface.
    length = np.maximum(below * (slope * np.sqrt(1 + k2)), _F(1e-3))
    return t, hit, (x / length, k2 * below / length, z / length)


def _torus(o: Triple, d: Triple) -> tuple[np.ndarray, np.ndarray, Triple]:
    ring, tube = _F(geometry.TORUS_RADIUS), _F(geometry.TORUS_TUBE)
    reach = ring + tube
    t = -np.sqrt(np.maximum(reach * reach - (o[0] ** 2 + o[1] ** 2 + o[2] ** 2), 0.0))
    # The slab |y| <= tube holds the ring: start where the ray enters it.
    np.maximum(t, (tube - o[1] * np.sign(-d[1])) / -np.abs(d[1]), out=t)
    x, y, z = o
    away = tube_distance = gap = radial = t
    for _ in range(_TORUS_STEPS):
        x, y, z = o[0] + t * d[0], o[1] + t * d[1], o[2] + t * d[2]
        radial = np.sqrt(x * x + z * z)
        away = radial - ring
        tube_distance = np.sqrt(away * away + y * y)
        gap = tube_distance - tube
        t += gap
    hit = gap < 0.012
    radial_share = away / np.maximum(radial, _F(1e-4)) / np.maximum(tube_distance, _F(1e-4))
    normal = (x * radial_share, y / np.maximum(tube_distance, _F(1e-4)), z * radial_share)
    return t, hit, normal


_SURFACES = {
    "cube": _cube,
    "sphere": _sphere,
    "cylinder": _cylinder,
    "cone": _cone,
    "torus": _torus,
}
