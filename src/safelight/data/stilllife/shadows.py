"""Soft shadows: every thing darkens its surroundings as an ellipsoid of its own proportions would.

In the ellipsoid's frame, scaled so that it is the unit ball, a point's shadow is a smooth function
of how closely its ray to the lamp passes the middle, and its contact darkening one of its distance.
"""

from __future__ import annotations

import numpy as np

from safelight.data.stilllife import layout as geometry
from safelight.data.stilllife.layout import Body, Vec

_CUBE, _BALL = geometry.CUBE_HALF * 1.15, geometry.SPHERE_RADIUS
# Half axes and height of the middle for a large thing, in its own frame.
_PROXY: dict[str, tuple[Vec, float]] = {
    "cube": ((_CUBE, _CUBE, _CUBE), 0.0),
    "sphere": ((_BALL, _BALL, _BALL), 0.0),
    "cylinder": (
        (
            geometry.CYLINDER_RADIUS * 1.06,
            geometry.CYLINDER_HALF * 1.12,
            geometry.CYLINDER_RADIUS * 1.06,
        ),
        0.0,
    ),
    "cone": (
        (geometry.CONE_RADIUS * 0.92, geometry.CONE_HEIGHT * 0.44, geometry.CONE_RADIUS * 0.92),
        geometry.CONE_HEIGHT * 0.34,
    ),
    "torus": (
        (
            geometry.TORUS_RADIUS + geometry.TORUS_TUBE,
            geometry.TORUS_TUBE * 1.3,
            geometry.TORUS_RADIUS + geometry.TORUS_TUBE,
        ),
        0.0,
    ),
}


def proxy_frames(
    bodies: list[Body], lights: list[Vec]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """World -> unit-ball maps: matrices (n, 3, 3), offsets (n, 3), unit lamp directions (n, 3)."""
    matrices = np.array([body.axes for body in bodies], np.float64)
    centres = np.array([body.centre for body in bodies], np.float64)
    half = np.array([_PROXY[b.thing.shape][0] for b in bodies]) * [[b.scale] for b in bodies]
    lift = np.array([_PROXY[b.thing.shape][1] * b.scale for b in bodies])
    offsets = -np.einsum("nij,nj->ni", matrices, centres)
    offsets[:, 1] -= lift
    matrices = matrices / half[:, :, None]
    lamp = np.einsum("nij,nj->ni", matrices, np.array(lights))
    lamp /= np.linalg.norm(lamp, axis=1, keepdims=True)
    f4 = np.float32
    return matrices.astype(f4), (offsets / half).astype(f4), lamp.astype(f4)


def shadow(p: list[np.ndarray], lamp: np.ndarray, *, cast: float, contact: float) -> np.ndarray:
    """The light left (0-1) at points `p` (three arrays, unit-ball frame); lamp is (n, 3, 1, 1)."""
    along = p[0] * lamp[:, 0]
    along += p[1] * lamp[:, 1]
    along += p[2] * lamp[:, 2]
    distance = p[0] * p[0]
    distance += p[1] * p[1]
    distance += p[2] * p[2]
    # Closest approach of the ray to the lamp; 1 inside 0.5, 0 outside 1.3, smooth between.
    s = np.clip((1.69 - (distance - along * along)) * np.float32(1 / 1.44), 0.0, 1.0)
    s *= s * (3.0 - 2.0 * s)
    s *= np.clip(0.25 - along, 0.0, 1.0) * np.float32(cast)
    # The further the shadow falls, the softer and fainter.
    np.maximum(distance, 1.0, out=distance)
    close = np.float32(contact) / (distance * distance)
    return (1.0 - np.minimum(s, 0.9)) * (1.0 - close)
