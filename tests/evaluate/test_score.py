"""Scores: known intervals, a perfect generator, a swapping one, and the reports."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from safelight.data import stilllife
from safelight.data.attributes import attribute_classes, mirrored_classes
from safelight.data.stilllife import Arrangement, Scene
from safelight.evaluate import prompts, report
from safelight.evaluate.judge import Judge, describe
from safelight.evaluate.prompts import Prompt
from safelight.evaluate.score import ListScore, Share, score_list

SIZE = 64


class KnowingJudge(Judge):
    """Reads a picture's own truth, by the picture's bytes."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        pictures = stilllife.render(scenes, SIZE)
        truths = attribute_classes(scenes)
        self.known = {p.tobytes(): t for p, t in zip(pictures, truths, strict=True)}

    def classes(self, pictures: np.ndarray) -> np.ndarray:  # type: ignore[override]
        nothing = np.full(5, -1)
        return np.array([self.known.get(p.tobytes(), nothing) for p in pictures])


def swapped(scene: Scene) -> Scene:
    if scene.b is None:
        return scene
    a = dataclasses.replace(scene.a, colour=scene.b.colour)
    return dataclasses.replace(scene, a=a, b=dataclasses.replace(scene.b, colour=scene.a.colour))


def score(which: str, n: int, change=lambda scene: scene, **options) -> ListScore:  # type: ignore[no-untyped-def]
    chosen = prompts.load(which, n)
    scenes = {(p.text, p.seed): change(p.scene()) for p in chosen}
    judge = KnowingJudge([*scenes.values(), *(p.scene() for p in chosen)])

    def generate(texts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        return stilllife.render([scenes[key] for key in zip(texts, seeds, strict=True)], SIZE)

    return score_list(which, chosen, generate, judge, batch=16, **options)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(
    right: int, total: int, low: float, high: float
) -> None:
    found = Share(right, total).interval
    assert found == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert Share(total - right, total).interval[1] == pytest.approx(1 - found[0])


def test_a_share_of_nothing_claims_nothing() -> None:
    assert math.isnan(Share(0, 0).value)
    assert Share(0, 0).interval == (0.0, 1.0)
    assert str(Share(0, 0)) == "—"


def test_real_renders_score_the_ceiling() -> None:
    for which in ("seen", "held_out", "pair", "single"):
        result = score(which, 30)
        cells = result.generated.cells
        assert cells["all"] == Share(30, 30)
        assert cells["swapped"].right == 0
        assert cells["hue"].value >= 0.9
        assert result.real is not None
        assert result.real.cells == cells
        assert not result.failures
        assert sum(cells[a.name.lower()].total for a in Arrangement) == 30


def test_swapped_colours_are_swapped_and_nothing_else() -> None:
    cells = score("seen", 60, swapped).generated.cells
    same = sum(
        p.scene().a.colour == p.scene().b.colour  # type: ignore[union-attr]
        for p in prompts.load("seen", 60)
    )
    assert cells["all"].right == same
    assert cells["relation"].value == cells["shapes"].value == 1
    assert cells["swapped"].value == 1
    assert cells["hue_colours"].value >= 0.95
    assert cells["hue"].right <= same + 1


def test_mirrored_pictures_are_wrong_only_left_and_right() -> None:
    cells = score("held_out", 60, stilllife.mirror).generated.cells
    assert cells["left_right"].right == 0
    assert cells["stack"].value == cells["depth"].value == 1
    scenes = [p.scene() for p in prompts.load("held_out", 60)]
    np.testing.assert_array_equal(
        mirrored_classes(attribute_classes(scenes)),
        attribute_classes([stilllife.mirror(s) for s in scenes]),
    )


def test_other_pictures_score_nothing() -> None:
    def another(scene: Scene) -> Scene:
        return stilllife.scene_for(("white", "torus"), seed=1)

    assert score("seen", 20, another).generated.cells["all"].right == 0


def test_ceilings_and_frechet_stand_beside_the_score() -> None:
    def darker(pictures: np.ndarray) -> np.ndarray:
        return (pictures * 0.3).astype(np.uint8)

    def features(pictures: np.ndarray) -> np.ndarray:
        return pictures.reshape(len(pictures), 8, 8, 8, 8, 3).mean((2, 4, 5)).reshape(-1, 64)[:, :6]

    seen: list[tuple[str, int, int]] = []
    result = score(
        "seen", 24, autoencode=darker, features=features, progress=lambda *s: seen.append(s)
    )
    assert result.decoded is not None
    assert result.decoded.cells["all"].right == 0  # no darkened picture is known to this judge
    assert result.frechet["generated"] == result.frechet["real"] < result.frechet["decoded"]
    assert result.frechet["ratio"] == result.frechet["generated"] / result.frechet["decoded"]
    assert seen[-1][1:] == (24, 24)


def test_the_report_holds_every_number(tmp_path: Path) -> None:
    scores = [score("seen", 16, swapped), score("single", 6)]
    report.write(tmp_path, scores, guidance_scale=3.0)
    numbers = json.loads((tmp_path / "scores.json").read_text())
    assert numbers["settings"] == {"guidance_scale": 3.0}
    cell = numbers["lists"]["seen"]["generated"]["swapped"]
    assert cell["right"] == cell["total"] > 0
    table = (tmp_path / "scores.md").read_text()
    assert "| colours swapped (left/right) | 100.0 %" in table
    assert "**single**, 6 prompts" in table
    assert (tmp_path / "seen-failures.png").exists()
    assert (tmp_path / "single.png").exists()
    assert not (tmp_path / "single-failures.png").exists()


def test_a_generator_that_loses_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="4 prompts gave 3 pictures"):
        score_list(
            "seen",
            prompts.load("seen", 4),
            lambda texts, seeds: np.zeros((3, 64, 64, 3), np.uint8),
            Judge.__new__(Judge),
        )


def test_a_prompt_of_another_world_is_refused() -> None:
    with pytest.raises(ValueError, match="a horse"):
        score_list(
            "seen",
            [Prompt("a horse on the moon", 0, 1, "train", 0)],
            lambda texts, seeds: np.zeros((1, 64, 64, 3), np.uint8),
            Judge.__new__(Judge),
        )


def test_classes_are_told_in_words() -> None:
    scene = stilllife.scene_for(("red", "cube"), ("blue", "sphere"), Arrangement.STACK)
    assert describe(attribute_classes([scene])[0]) == "stack: red cube, blue sphere"
    alone = stilllife.scene_for(("cyan", "torus"))
    assert describe(attribute_classes([alone])[0]) == "single: cyan torus"
