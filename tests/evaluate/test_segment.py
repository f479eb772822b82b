"""The hue check on real renders, on pictures with planted faults, and on plain patches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from safelight.data import stilllife
from safelight.data.stilllife import COLOURS, FLOORS, WALLS, Arrangement, Scene, Wanted
from safelight.evaluate import segment


def wants(scenes: list[Scene]) -> list[Wanted]:
    found = [stilllife.parse(stilllife.plain_caption(s)) for s in scenes]
    assert all(found)
    return [w for w in found if w is not None]


def drawn(arrangement: Arrangement, count: int, seed: int = 31) -> list[Scene]:
    found = []
    for index in range(20 * count):
        scene = stilllife.scene(seed, index, "all")
        if scene.arrangement == arrangement:
            found.append(scene)
        if len(found) == count:
            return found
    raise AssertionError("too few scenes")


@pytest.mark.parametrize("arrangement", Arrangement)
def test_real_renders_reach_the_stated_ceiling(arrangement: Arrangement) -> None:
    scenes = drawn(arrangement, 100)
    check = segment.check(stilllife.render(scenes, 64), wants(scenes))
    # Two standard errors of a hundred pictures below the ceiling that thousands gave.
    assert check.agrees.mean() >= segment.CEILING[arrangement.name.lower()] - 0.02


@pytest.mark.parametrize("size", [48, 96, 128])
def test_other_sizes_are_read_too(size: int) -> None:
    scenes = drawn(Arrangement.LEFT_RIGHT, 30)
    assert segment.check(stilllife.render(scenes, size), wants(scenes)).agrees.mean() >= 0.96


@pytest.mark.parametrize(
    "arrangement", [Arrangement.LEFT_RIGHT, Arrangement.STACK, Arrangement.DEPTH]
)
def test_exchanged_colours_are_found(arrangement: Arrangement) -> None:
    scenes = [s for s in drawn(arrangement, 60) if s.b and s.a.colour != s.b.colour]
    swapped = [
        dataclasses.replace(
            s,
            a=dataclasses.replace(s.a, colour=s.b.colour),
            b=dataclasses.replace(s.b, colour=s.a.colour),
        )
        for s in scenes
        if s.b is not None
    ]
    check = segment.check(stilllife.render(swapped, 64), wants(scenes))
    assert check.colours.mean() >= 0.98
    assert check.decided.all()
    assert check.relation.mean() == 0


def test_another_relation_is_found() -> None:
    kinds = [Arrangement.LEFT_RIGHT, Arrangement.STACK, Arrangement.DEPTH]
    for kind in kinds:
        scenes = [s for s in drawn(kind, 30) if s.b and s.a.colour != s.b.colour]
        pictures = stilllife.render(scenes, 64)
        for other in kinds:
            if other != kind:
                wanted = [dataclasses.replace(w, arrangement=other) for w in wants(scenes)]
                assert segment.check(pictures, wanted).relation.mean() <= 0.05


def test_a_missing_colour_is_found() -> None:
    scenes = drawn(Arrangement.SINGLE, 60)
    pictures = stilllife.render(scenes, 64)
    for shift in (1, 3, 5):
        wanted = [
            dataclasses.replace(
                w,
                a=dataclasses.replace(
                    w.a, colour=COLOURS[(COLOURS.index(w.a.colour) + shift) % len(COLOURS)]
                ),
            )
            for w in wants(scenes)
        ]
        assert segment.check(pictures, wanted).colours.mean() <= 0.02


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("wall", WALLS)
def test_no_floor_and_no_wall_is_a_colour(floor: str, wall: str) -> None:
    scenes = [
        stilllife.scene_for(("blue", "sphere"), seed=32, index=i, floor=floor, wall=wall)
        for i in range(8)
    ]
    share = segment.find(stilllife.render(scenes, 64)).share
    others = [i for i, colour in enumerate(COLOURS) if colour != "blue"]
    assert share[:, others].max() < segment.LEAST_SHARE
    assert share[:, COLOURS.index("blue")].min() > 2 * segment.LEAST_SHARE


def test_two_things_of_one_colour_are_left_undecided() -> None:
    scene = stilllife.scene_for(("red", "cube"), ("red", "cone"), Arrangement.STACK)
    check = segment.check(stilllife.render([scene], 64), wants([scene]))
    assert check.colours.all()
    assert not check.decided.any()
    assert check.agrees.all()


def test_an_empty_picture_shows_nothing() -> None:
    found = segment.find(np.full((1, 64, 64, 3), 90, np.uint8))
    assert found.share.max() == 0
    assert np.isnan(found.middle).all()
