"""From a scene's words and look to geometry: where things stand, and the camera that frames them.

World units: x to the right, y up from the floor (y = 0), z towards the viewer. The camera is
orthographic and looks down by `pitch`: a point lands on the picture at
(x, y cos(pitch) - z sin(pitch)). Everything is plain Python floats: a few dozen of them a scene.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, radians, sin, sqrt

from safelight.data.stilllife.world import Arrangement, Scene, Thing

Vec = tuple[float, float, float]

# Sizes of a large thing in world units, chosen so that all five look about equally wide.
CUBE_HALF = 0.44
SPHERE_RADIUS = 0.57
CYLINDER_RADIUS, CYLINDER_HALF = 0.48, 0.55
CONE_RADIUS, CONE_HEIGHT = 0.60, 1.30
TORUS_RADIUS, TORUS_TUBE = 0.48, 0.16
SMALL = 0.75

_SINK = 0.015  # stacked things overlap by this much, so that no light leaks between them
_PAIR_VIEW, _SINGLE_VIEW = 2.85, 2.15  # world units across the picture
_FILL = 0.90  # the things never span more than this share of the picture
_LEAST_FILL = 0.74  # and two things never less than this


@dataclass(frozen=True, slots=True)
class Body:
    """A placed thing: `axes` are its local x, y, z directions in the world; `centre` is the local
    origin (the middle; a cone's base centre)."""

    thing: Thing
    scale: float
    axes: tuple[Vec, Vec, Vec]
    centre: Vec
    tone: float


@dataclass(frozen=True, slots=True)
class Layout:
    """What the renderer draws. `view` is the picture's width (and height) in world units, (u, v)
    its middle on the picture plane; the wall stands at z = wall_z; `light` points to the lamp."""

    bodies: tuple[Body, ...]
    pitch: float
    view: float
    u: float
    v: float
    wall_z: float
    light: Vec


def lay_out(scene: Scene) -> Layout:
    """Place the things of a scene and aim the camera."""
    look = scene.look
    pitch = radians(26.0 + 4.0 * look.pitch)
    bodies = _place(scene)
    up = (0.0, cos(pitch), -sin(pitch))
    right = (1.0, 0.0, 0.0)
    u0, u1 = _span(bodies, right)
    v0, v1 = _span(bodies, up)
    single = len(bodies) == 1
    view = (_SINGLE_VIEW if single else _PAIR_VIEW) * (1.0 + 0.06 * look.zoom)
    extent = max(u1 - u0, v1 - v0)
    if not single:  # two small things: come closer
        view = min(view, extent / _LEAST_FILL)
    view = max(view, extent / _FILL)
    # Pan as far as the things stay inside, but never far from the middle.
    room_u = min(0.07 * view, 0.5 * (0.97 * view - (u1 - u0)))
    room_v = min(0.05 * view, 0.5 * (0.97 * view - (v1 - v0)))
    u = 0.5 * (u0 + u1) + look.pan_x * room_u
    v = 0.5 * (v0 + v1) + look.pan_y * room_v
    # The wall stands where its foot is a little above the middle, always behind the things.
    seam = v + view * (0.15 + 0.06 * look.horizon)
    wall_z = min(-seam / sin(pitch), _span(bodies, (0.0, 0.0, 1.0))[0] - 0.15)
    azimuth = radians((38.0 + 20.0 * abs(look.light_x)) * (1.0 if look.light_x >= 0 else -1.0))
    height = radians(50.0 + 7.0 * look.light_y)
    light = (cos(height) * sin(azimuth), sin(height), cos(height) * cos(azimuth))
    return Layout(bodies, pitch, view, u, v, wall_z, light)


def support(body: Body, direction: Vec) -> float:
    """How far the thing reaches from its centre along a unit direction (its support function)."""
    x, y, z = (_dot(axis, direction) for axis in body.axes)
    flat = sqrt(max(0.0, 1.0 - y * y))
    match body.thing.shape:
        case "cube":
            reach = CUBE_HALF * (abs(x) + abs(y) + abs(z))
        case "sphere":
            reach = SPHERE_RADIUS
        case "cylinder":
            reach = CYLINDER_RADIUS * flat + CYLINDER_HALF * abs(y)
        case "cone":
            reach = max(CONE_HEIGHT * y, CONE_RADIUS * flat)
        case _:
            reach = TORUS_RADIUS * flat + TORUS_TUBE
    return reach * body.scale


def _place(scene: Scene) -> tuple[Body, ...]:
    look = scene.look
    a = _stand(scene.a, look.yaws[0], look.tones[0])
    if scene.b is None:
        return (a,)
    b = _stand(scene.b, look.yaws[1], look.tones[1])
    right, left = (1.0, 0.0, 0.0), (-1.0, 0.0, 0.0)
    if scene.arrangement == Arrangement.LEFT_RIGHT:
        gap = 0.5 * (0.16 + 0.08 * look.spread)
        z = 0.16 * look.skew
        a = _moved(a, -gap - support(a, right), 0.0, z)
        b = _moved(b, gap + support(b, left), 0.0, -z)
    elif scene.arrangement == Arrangement.STACK:
        x, y, z = _top(b)
        a = _moved(a, x + 0.06 * look.skew, y - _SINK - 0.03 * (b.thing.shape == "cone"), z)
    else:
        side = 1.0 if look.skew >= 0 else -1.0
        # What hides behind a wider thing must step further aside to be seen.
        wider = max(0.0, support(a, right) - support(b, right))
        x = side * (0.46 + 0.16 * abs(look.skew) + 0.6 * wider)
        z = 0.80 + 0.10 * look.spread
        a = _moved(a, -0.5 * x, 0.0, z)
        b = _moved(b, 0.5 * x, 0.0, -z)
    return (a, b)


def _stand(thing: Thing, yaw: float, tone: float) -> Body:
    """The thing on the floor at the origin, turned by its yaw in [-1, 1]."""
    side = 1.0 if yaw >= 0 else -1.0
    if thing.shape == "torus":
        # A ring stands, leans back and faces the viewer, so that its hole is always seen.
        turn, lean = radians(28.0 * yaw), radians(14.0)
        s, c, sl, cl = sin(turn), cos(turn), sin(lean), cos(lean)
        axes = ((c, 0.0, -s), (s * cl, sl, c * cl), (s * sl, -cl, c * sl))
    else:
        # Cubes show two side faces, one broader than the other.
        turn = side * radians(27.0 + 14.0 * abs(yaw))
        s, c = sin(turn), cos(turn)
        axes = ((c, 0.0, -s), (0.0, 1.0, 0.0), (s, 0.0, c))
    body = Body(thing, SMALL if thing.size == "small" else 1.0, axes, (0.0, 0.0, 0.0), tone)
    return _moved(body, 0.0, support(body, (0.0, -1.0, 0.0)), 0.0)


def _top(body: Body) -> Vec:
    """The thing's highest point, where another may rest."""
    x, y, z = body.centre
    y += support(body, (0.0, 1.0, 0.0))
    if body.thing.shape == "torus":
        n = body.axes[1]
        flat = sqrt(n[0] ** 2 + n[2] ** 2)
        reach = TORUS_RADIUS * body.scale * n[1] / flat
        x, z = x - n[0] * reach, z - n[2] * reach
    return x, y, z


def _span(bodies: tuple[Body, ...], w: Vec) -> tuple[float, float]:
    back = (-w[0], -w[1], -w[2])
    return (
        min(_dot(b.centre, w) - support(b, back) for b in bodies),
        max(_dot(b.centre, w) + support(b, w) for b in bodies),
    )


def _moved(body: Body, x: float, y: float, z: float) -> Body:
    c = body.centre
    return Body(body.thing, body.scale, body.axes, (c[0] + x, c[1] + y, c[2] + z), body.tone)


def _dot(p: Vec, q: Vec) -> float:
    return p[0] * q[0] + p[1] * q[1] + p[2] * q[2]
