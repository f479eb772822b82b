"""A banded cone: where its bands are, and that nothing else of the scene changes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from safelight.cli.main import main
from safelight.data import stilllife
from safelight.data.stilllife.layout import lay_out


def test_the_bands_alone_are_white() -> None:
    scene = stilllife.curio_scene(0, 3, ("blue", "cube"), stilllife.Arrangement.LEFT_RIGHT)
    size = 96
    odd = stilllife.render_curios([scene], size)[0].astype(int)
    plain = stilllife.render([scene], size, oversample=4)[0].astype(int)
    mask = stilllife.render_full([scene], size).masks[0, 0]
    assert np.abs(odd - plain)[~mask].mean() < 1.0, "the rest is the same scene"
    white = mask & (odd.min(axis=2) > 110)
    assert 0.25 < white.sum() / mask.sum() < 0.55
    # Along the cone's axis, from its tip down: red, white, red, white, red.
    lay = lay_out(scene)
    column = int((lay.bodies[0].centre[0] - lay.u) / lay.view * size + size / 2)
    rows = np.flatnonzero(mask[:, column])[2:-2]
    bands = white[rows, column].astype(int)
    assert np.abs(np.diff(bands)).sum() == 4
    assert not bands[0]
    assert not bands[-1]


def test_a_curio_takes_the_place_of_a_cone() -> None:
    scene = stilllife.scene_for(("red", "cube"))
    with pytest.raises(ValueError, match="cone"):
        stilllife.render_curios([scene], 32)
    behind = stilllife.scene_for(("red", "cube"), ("red", "cone"), stilllife.Arrangement.DEPTH)
    assert stilllife.render_curios([behind], 32).shape == (1, 32, 32, 3)


def test_the_command_writes_a_folder(tmp_path) -> None:
    place = tmp_path / "curio"
    with pytest.raises(SystemExit) as leaving:
        main(["stilllife", "curio", "-o", str(place), "--count", "2", "--size", "32"])
    assert not leaving.value.code
    pictures = [Image.open(p) for p in sorted(place.iterdir())]
    assert [p.size for p in pictures] == [(32, 32)] * 2
    with pytest.raises(SystemExit) as leaving:
        main(["stilllife", "curio", "-o", str(place)])
    assert leaving.value.code == 2
