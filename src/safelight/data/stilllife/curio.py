"""An object from outside the world: a cone banded in two colours, as on a road.

Every thing of still life has one colour, so no model of it has ever seen a band, and no caption
names one. A curio takes the place of a scene's first cone. The scene is drawn twice, once in each
colour, large; the height of every visible point above the cone's base, which the depth says,
chooses between the two; then the picture is made small. Light, shadows and what stands in front
are those of any other scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import cos, sin

import numpy as np

from safelight.data.stilllife.layout import CONE_HEIGHT, lay_out
from safelight.data.stilllife.render import render_full
from safelight.data.stilllife.trace import CAMERA_DISTANCE
from safelight.data.stilllife.world import Arrangement, Scene, Thing, scene_for

COLOURS = ("red", "white")
BANDS = 5
"""Of equal height, the lowest in the first colour."""
_FINE = 4  # samples along a pixel's side


def curio_scene(
    seed: int,
    index: int,
    b: tuple[str, str] | None = None,
    arrangement: Arrangement = Arrangement.SINGLE,
) -> Scene:
    """A scene whose first thing is to be a curio; arguments as for :func:`scene_for`."""
    return scene_for(Thing(COLOURS[0], "cone"), b, arrangement, seed=seed, index=index)


def render_curios(scenes: Sequence[Scene], size: int) -> np.ndarray:
    """Draw scenes with a curio in the place of their first cone: uint8 ``(N, size, size, 3)``.

    Raises:
        ValueError: a scene without a cone.
    """
    return np.stack([_draw(scene, size) for scene in scenes])


def _draw(scene: Scene, size: int) -> np.ndarray:
    slot = next((i for i, thing in enumerate(scene.things) if thing.shape == "cone"), None)
    if slot is None:
        raise ValueError("a curio takes the place of a cone, and the scene has none")
    name = "ab"[slot]
    painted = [
        replace(scene, **{name: Thing(colour, "cone", scene.things[slot].size)})
        for colour in COLOURS
    ]
    fine = size * _FINE
    first, second = (render_full([each], fine, oversample=1) for each in painted)
    odd = _bands(scene, slot, first.depth[0]) & first.masks[0, slot]
    mixed = np.where(odd[..., None], second.rgb[0], first.rgb[0]).astype(np.float64)
    small = mixed.reshape(size, _FINE, size, _FINE, 3).mean(axis=(1, 3))
    return np.rint(small).astype(np.uint8)


def _bands(scene: Scene, slot: int, depth: np.ndarray) -> np.ndarray:
    """Where the visible point lies in a band of the second colour, ``(H, W)``."""
    lay = lay_out(scene)
    body, size = lay.bodies[slot], len(depth)
    steps = (np.arange(size) + 0.5) / size - 0.5
    u, v = lay.u + steps[None, :] * lay.view, lay.v - steps[:, None] * lay.view
    nearer = CAMERA_DISTANCE - depth  # along the way to the camera, from the world's origin
    y = v * cos(lay.pitch) + nearer * sin(lay.pitch)
    z = nearer * cos(lay.pitch) - v * sin(lay.pitch)
    axis = body.axes[1]
    height = sum((p - c) * a for p, c, a in zip((u, y, z), body.centre, axis, strict=True))
    band = np.floor(np.asarray(height) / (body.scale * CONE_HEIGHT) * BANDS)
    return band % 2 == 1
