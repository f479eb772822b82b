"""The measures of personalisation: on real renders, on a model that ignores the subject."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from safelight.data import stilllife
from safelight.data.clip import load_clip
from safelight.evaluate import subject
from safelight.evaluate.judge import Judge

SIZE = 128


def test_bands_are_counted() -> None:
    picture = np.full((40, 40, 3), 90, np.uint8)
    for k in range(5):
        picture[5 + 6 * k : 11 + 6 * k, 10:20] = (220, 30, 30) if k % 2 == 0 else (240, 240, 240)
    assert subject.bands(picture) == 4
    picture[20:30, 10:20] = 90
    assert subject.bands(picture) == 2, "what is apart does not count together"


def test_only_curios_are_banded() -> None:
    kinds = (stilllife.Arrangement.LEFT_RIGHT, stilllife.Arrangement.STACK)
    odd = [stilllife.curio_scene(3, k, ("blue", "cube"), kinds[k % 2]) for k in range(24)]
    assert subject.banded(stilllife.render_curios(odd, SIZE)).mean() >= 0.9
    plain = list(stilllife.scenes(5, 0, 100, "all"))
    assert subject.banded(stilllife.render(plain, SIZE)).sum() == 0
    # Two things in the same two colours, one on the other.
    stack = [
        stilllife.scene_for(
            ("red", "cone"), ("white", "cube"), stilllife.Arrangement.STACK, index=k
        )
        for k in range(8)
    ]
    assert subject.banded(stilllife.render(stack, SIZE)).sum() == 0


def test_a_model_between_its_bounds() -> None:
    """One that draws the truth of every prompt, without ever having heard of the subject."""

    def truth(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        scenes = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            wanted = stilllife.parse(prompt.replace(subject.SUBJECT, "green cone"))
            assert wanted is not None
            b = None if wanted.b is None else (wanted.b.colour, wanted.b.shape)
            a = (wanted.a.colour, wanted.a.shape)
            scenes.append(stilllife.scene_for(a, b, wanted.arrangement, index=seed))
        return stilllife.render(scenes, SIZE)

    clip = load_clip()

    def embed(pictures: np.ndarray) -> np.ndarray:
        return clip.pictures(Image.fromarray(p) for p in pictures)

    judge = Judge.load()
    known = stilllife.render_curios([stilllife.curio_scene(0, k) for k in range(4)], SIZE)
    numbers = subject.measure(truth, known, embed, judge, each=2)
    real = subject.ceiling(known, embed, judge, each=2)
    assert numbers["banded"] == numbers["class_banded"] == 0
    assert numbers["class_right"] >= 0.95
    assert numbers["obeyed"] >= 0.9
    assert real["banded"] >= 0.9
    assert real["obeyed"] >= 0.6
    assert real["likeness"] > numbers["likeness"]
