"""The still-life world: what a scene is, how scenes are drawn, and which are never trained on.

A scene is a frozen record of exact attributes (shape, colour and size of one or two things, their
arrangement, floor and wall) and of a *look*: numbers in [-1, 1] for everything that a caption does
not name (camera, light, turns, tones). Both are functions of (seed, split, index) alone.

Two-thing scenes are canonical: LEFT_RIGHT is (left, right), STACK is (top, bottom) and DEPTH is
(front, behind), so that every sentence about a scene, in either word order, means one record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from typing import Literal, get_args

import numpy as np

Split = Literal["train", "val", "combo", "pair", "all"]

SHAPES = ("cube", "sphere", "cylinder", "cone", "torus")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SIZES = ("small", "large")
# No floor or wall shares a word with an object's colour: "green" always names a thing.
FLOORS = ("grey", "wooden", "dark", "beige", "mint")
WALLS = ("cream", "slate", "rose")
SPLITS: tuple[str, ...] = get_args(Split)

# Colour-shape pairs that no training picture ever shows.
UNSEEN_PAIRS = frozenset(
    {("purple", "cone"), ("green", "torus"), ("orange", "cube"), ("cyan", "cylinder")}
)
HELD_OUT_SHARE = 0.15


class Arrangement(IntEnum):
    """How the things of a scene stand; the values are those of `attributes`."""

    SINGLE = 0
    LEFT_RIGHT = 1
    STACK = 2
    DEPTH = 3


# Left and right is the hardest relation to learn, so about half of all pairs show it.
_ARRANGEMENT_CDF = (0.20, 0.60, 0.80, 1.0)


@dataclass(frozen=True, slots=True)
class Thing:
    """One object by the words that name it."""

    colour: str
    shape: str
    size: str = "large"

    def __post_init__(self) -> None:
        for value, allowed in ((self.colour, COLOURS), (self.shape, SHAPES), (self.size, SIZES)):
            if value not in allowed:
                raise ValueError(f"unknown word {value!r}: choose one of {', '.join(allowed)}")

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape): what hold-outs are about; size is not part of it."""
        return self.colour, self.shape


@dataclass(frozen=True, slots=True)
class Look:
    """Everything a caption does not name; each number is uniform in [-1, 1].

    `pan_x`, `light_x`, `skew` and both yaws change sign in a mirror; the rest do not.
    `skew` is the sideways freedom of each arrangement (see `layout.py`).
    """

    pitch: float = 0.0
    zoom: float = 0.0
    pan_x: float = 0.0
    pan_y: float = 0.0
    horizon: float = 0.0
    light_x: float = 0.5
    light_y: float = 0.0
    skew: float = 0.3
    spread: float = 0.0
    yaws: tuple[float, float] = (0.4, -0.4)
    tones: tuple[float, float] = (0.0, 0.0)
    glow: float = 0.0


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture's exact truth. `b` is None exactly when `arrangement` is SINGLE."""

    arrangement: Arrangement
    a: Thing
    b: Thing | None
    floor: str
    wall: str
    look: Look

    def __post_init__(self) -> None:
        if (self.b is None) != (self.arrangement == Arrangement.SINGLE):
            raise ValueError("a SINGLE scene has one thing, every other arrangement has two")
        if self.floor not in FLOORS or self.wall not in WALLS:
            raise ValueError(f"unknown floor {self.floor!r} or wall {self.wall!r}")

    @property
    def things(self) -> tuple[Thing, ...]:
        return (self.a,) if self.b is None else (self.a, self.b)


# -- hold-outs ------------------------------------------------------------------------------------


@cache
def is_held_out_combination(arrangement: int, a: tuple[str, str], b: tuple[str, str]) -> bool:
    """Whether the canonical tuple is one of the ~15 % kept from training (unseen pairs aside)."""
    if arrangement == Arrangement.LEFT_RIGHT and b < a:
        a, b = b, a  # a mirrored picture must not leak a held-out one
    key = f"{Arrangement(arrangement).name} {' '.join(a)} / {' '.join(b)}"
    if key == "STACK red cube / blue sphere":  # the README's sentence
        return True
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"stilllife").digest()
    return int.from_bytes(digest, "little") < int(HELD_OUT_SHARE * 2**64)


def has_unseen_pair(scene: Scene) -> bool:
    """Whether the scene shows one of the four `UNSEEN_PAIRS`."""
    return any(thing.pair in UNSEEN_PAIRS for thing in scene.things)


def split_of(scene: Scene) -> Literal["train", "combo", "pair"]:
    """The part of the world a scene belongs to ("val" scenes are of the part "train")."""
    if has_unseen_pair(scene):
        return "pair"
    if scene.b is not None and is_held_out_combination(
        scene.arrangement, scene.a.pair, scene.b.pair
    ):
        return "combo"
    return "train"


def is_held_out(scene: Scene) -> bool:
    """Whether no model may be trained on this scene (the judge alone may)."""
    return split_of(scene) != "train"


# -- sampling -------------------------------------------------------------------------------------


def generator(seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one picture: keyed by (seed, stream, index), independent of order."""
    mask = (1 << 64) - 1
    low = ((stream & 0xFF) << 56) | (index & ((1 << 56) - 1))
    return np.random.Generator(np.random.Philox(key=np.array([seed & mask, low], np.uint64)))


def scene(seed: int, index: int, split: Split = "train") -> Scene:
    """Scene `index` of the endless series `seed`.

    "train" and "val" never show held-out things (and never share a stream); "combo" shows
    held-out combinations of seen pairs; "pair" shows at least one never-seen pair; "all" shows
    everything, in its natural proportions.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    rng = generator(seed, index, SPLITS.index(split))
    wanted = "train" if split == "val" else split
    while True:
        drawn = _draw(rng, two=split == "combo", unseen=split == "pair")
        if wanted == "all" or split_of(drawn) == wanted:
            return drawn


def scenes(seed: int, start: int, count: int, split: Split = "train") -> Iterator[Scene]:
    """Scenes start ... start + count - 1 of a series."""
    return (scene(seed, index, split) for index in range(start, start + count))


def scene_for(
    a: Thing | tuple[str, str],
    b: Thing | tuple[str, str] | None = None,
    arrangement: Arrangement = Arrangement.SINGLE,
    *,
    seed: int = 0,
    index: int = 0,
    floor: str | None = None,
    wall: str | None = None,
) -> Scene:
    """A scene with the given things; all that is not given is drawn from (seed, index).

    `a` and `b` are Things, or (colour, shape) whose size is then drawn. They are canonical:
    left/right, top/bottom or front/behind.
    """
    base = _draw(generator(seed, index, 200), two=b is not None)
    sizes = [thing.size for thing in base.things]
    return replace(
        base,
        arrangement=Arrangement(arrangement),
        a=a if isinstance(a, Thing) else Thing(*a, sizes[0]),
        b=b if b is None or isinstance(b, Thing) else Thing(*b, sizes[1]),
        floor=floor or base.floor,
        wall=wall or base.wall,
    )


def _draw(rng: np.random.Generator, *, two: bool = False, unseen: bool = False) -> Scene:
    """One scene of the whole world; `two` forbids singles, `unseen` plants a never-seen pair."""
    roll = float(rng.random())
    if two:
        roll = _ARRANGEMENT_CDF[0] + roll * (1 - _ARRANGEMENT_CDF[0])
    arrangement = Arrangement(next(i for i, edge in enumerate(_ARRANGEMENT_CDF) if roll < edge))
    picks = rng.integers(0, 1 << 30, 8).tolist()
    things = [_thing(picks[0], picks[1], rng.random())]
    if arrangement != Arrangement.SINGLE:
        other = _thing(picks[2], picks[3], rng.random())
        while other.pair == things[0].pair:  # two equal things would make the words ambiguous
            again = rng.integers(0, 1 << 30, 2).tolist()
            other = _thing(again[0], again[1], rng.random())
        things.append(other)
    if unseen:
        colour, shape = sorted(UNSEEN_PAIRS)[picks[4] % len(UNSEEN_PAIRS)]
        at = picks[5] % len(things)
        if all(thing.pair != (colour, shape) for thing in things):
            things[at] = replace(things[at], colour=colour, shape=shape)
    return Scene(
        arrangement=arrangement,
        a=things[0],
        b=things[1] if len(things) == 2 else None,
        floor=FLOORS[picks[6] % len(FLOORS)],
        wall=WALLS[picks[7] % len(WALLS)],
        look=_draw_look(rng),
    )


def _thing(colour: int, shape: int, size_roll: float) -> Thing:
    size = "large" if size_roll < 0.6 else "small"
    return Thing(COLOURS[colour % len(COLOURS)], SHAPES[shape % len(SHAPES)], size)


def _draw_look(rng: np.random.Generator) -> Look:
    x = rng.uniform(-1.0, 1.0, 14).tolist()
    return Look(*x[:9], yaws=(x[9], x[10]), tones=(x[11], x[12]), glow=x[13])


# -- changes --------------------------------------------------------------------------------------


def mirror(scene: Scene) -> Scene:
    """The scene as a mirror shows it: left and right exchanged, the light with them."""
    look, b = scene.look, scene.b
    swap = scene.arrangement == Arrangement.LEFT_RIGHT and b is not None
    yaws = (-look.yaws[0], -look.yaws[1])
    mirrored = replace(
        look,
        pan_x=-look.pan_x,
        light_x=-look.light_x,
        skew=-look.skew,
        yaws=yaws[::-1] if swap else yaws,
        tones=look.tones[::-1] if swap else look.tones,
    )
    if swap and b is not None:
        return replace(scene, a=b, b=scene.a, look=mirrored)
    return replace(scene, look=mirrored)


def variants(
    scene: Scene, rng: np.random.Generator, *, train_only: bool = False
) -> dict[str, Scene]:
    """Scenes that differ from this one in exactly one way, by the name of the change.

    The names are "colours_swapped", "order_swapped" (left/right, top/bottom, front/behind),
    "shape_changed", "colour_changed" and "arrangement_changed"; a change that is impossible here
    (or, with `train_only`, held out) is missing.
    """
    found: dict[str, Scene] = {}

    def keep(name: str, options: list[Scene]) -> None:
        usable = [
            s
            for s in options
            if (s.b is None or s.a.pair != s.b.pair) and not (train_only and is_held_out(s))
        ]
        if usable:
            found[name] = usable[int(rng.integers(len(usable)))]

    a, b = scene.a, scene.b
    if b is not None:
        if a.colour != b.colour and a.shape != b.shape:
            swapped = (replace(a, colour=b.colour), replace(b, colour=a.colour))
            keep("colours_swapped", [replace(scene, a=swapped[0], b=swapped[1])])
        keep("order_swapped", [replace(scene, a=b, b=a)])
        others = [k for k in Arrangement if k not in (Arrangement.SINGLE, scene.arrangement)]
        keep("arrangement_changed", [replace(scene, arrangement=k) for k in others])
    for name, values in (("shape", SHAPES), ("colour", COLOURS)):
        options = [
            replace(scene, **{slot: replace(thing, **{name: value})})
            for slot, thing in (("a", a), ("b", b))
            if thing is not None
            for value in values
            if value != getattr(thing, name)
        ]
        keep(f"{name}_changed", options)
    return found


# -- numbers --------------------------------------------------------------------------------------

ATTRIBUTES = (
    "n_objects",
    "arrangement",
    "shape_a",
    "colour_a",
    "size_a",
    "shape_b",
    "colour_b",
    "size_b",
    "floor",
    "wall",
)


def attributes(scene: Scene) -> dict[str, int]:
    """The scene as class indices in the order of `ATTRIBUTES`; b's are -1 for a single thing."""
    values = [len(scene.things), int(scene.arrangement)]
    for thing in (scene.a, scene.b):
        values += (
            [-1, -1, -1]
            if thing is None
            else [
                SHAPES.index(thing.shape),
                COLOURS.index(thing.colour),
                SIZES.index(thing.size),
            ]
        )
    values += [FLOORS.index(scene.floor), WALLS.index(scene.wall)]
    return dict(zip(ATTRIBUTES, values, strict=True))


def attribute_array(batch: list[Scene]) -> np.ndarray:
    """(N, len(ATTRIBUTES)) int64: one row of `attributes` a scene."""
    rows = [list(attributes(s).values()) for s in batch]
    return np.array(rows, np.int64).reshape(-1, len(ATTRIBUTES))
