"""The copying alarm: its limits in closed form, planted copies, and what only looks alike."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from personal_micro import PROMPT, recipe, write_model, write_pictures
from safelight.data import stilllife
from safelight.data.clip import load_clip
from safelight.train.copying import Alarm, limit
from safelight.train.personal import PersonalObjective


def scenes(count: int, seed: int = 0) -> list[stilllife.Scene]:
    return [stilllife.scene(seed, i) for i in range(count)]


def test_the_limit_is_half_the_smallest_distance_of_different_pictures() -> None:
    apart = np.array([[0.0, 0.12, 0.4], [0.12, 0.0, 0.3], [0.4, 0.3, 0.0]])
    assert limit(apart) == pytest.approx(0.06)
    apart[0, 1] = apart[1, 0] = 0.0005  # two copies of one picture are one
    assert limit(apart) == 0.1, "never farther than 0.1"
    assert limit(np.zeros((1, 1))) == 0.1


def test_correlation_is_numpy_s() -> None:
    rng = np.random.default_rng(0)
    known = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    samples = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    for sample, seen in zip(samples, Alarm(known).look(samples), strict=True):
        place, distance = seen.nearest["pixels"]
        rows = [v.ravel() for k in known for v in (k, k[:, ::-1])]
        apart = [1 - np.corrcoef(sample.ravel(), row)[0, 1] for row in rows]
        assert distance == pytest.approx(min(apart))
        assert place == int(np.argmin(apart)) // 2


def test_copies_are_found_and_new_scenes_are_not() -> None:
    """Six renders of one thing; copies of them, mirrored or noisy; new scenes of it."""
    thing = stilllife.Thing("red", "cone")
    same = [s for s in scenes(4000) if s.a == thing or s.b == thing]
    pictures = stilllife.render(same[:46], 64)
    known, fresh = pictures[:6], pictures[6:]
    rng = np.random.default_rng(0)
    noisy = np.clip(known + rng.normal(0, 6, known.shape), 0, 255).astype(np.uint8)
    alarm = Alarm(known, load_clip().pictures)
    for copies in (known, known[:, :, ::-1].copy(), noisy):
        found = alarm.look(copies)
        assert [seen.copied for seen in found] == list(range(6))
        assert [seen.nearest["pixels"][0] for seen in found] == list(range(6))
    found = alarm.look(fresh)
    assert sum(seen.copied is not None for seen in found) == 0
    # Either measure alone would ring here: other pictures of the same things.
    assert any(seen.nearest["embedding"][1] < alarm.limits["embedding"] for seen in found)
    likeness = alarm.likeness(fresh)
    others = stilllife.render([s for s in scenes(400, 1) if s.a.shape != "cone"][:12], 64)
    far = alarm.likeness(others)
    assert likeness is not None
    assert far is not None
    assert likeness > far


def test_a_run_that_copies_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_model(tmp_path / "micro")
    pictures = write_pictures(tmp_path / "subject")
    made = recipe(tmp_path / "run", folder, pictures, validation_prompts=[PROMPT, "a dog"])
    (tmp_path / "run").mkdir()
    copied = Image.open(pictures / "001.png").crop((2, 0, 18, 16))

    def memorised(model: Any, prompts: Any, seeds: Any) -> Any:
        other = np.random.default_rng(9).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return [copied if p == PROMPT else Image.fromarray(other) for p in prompts]

    mine = PersonalObjective(made, memorised)
    with caplog.at_level(logging.WARNING):
        numbers = mine.validate(mine.module)
    assert numbers["copies"] == 2
    assert numbers["nearest_pixels"] == pytest.approx(0, abs=1e-3)
    assert "2 of 4 samples copy a training picture" in caplog.text
    record = json.loads((tmp_path / "run" / "copying.json").read_text())
    assert record["samples"][0]["copies"] == "001.png"
    assert record["samples"][0]["pixels"] == {
        "nearest": "001.png", "distance": pytest.approx(0, abs=1e-3)
    }  # fmt: skip
    assert record["samples"][2]["copies"] is None
    assert all(PROMPT not in r.getMessage() for r in caplog.records), "prompts are not logged"
    caplog.clear()
    mine.render = lambda model, prompts, seeds: [  # type: ignore[assignment]
        Image.fromarray(np.random.default_rng(s).integers(0, 256, (16, 16, 3), dtype=np.uint8))
        for s in seeds
    ]
    assert mine.validate(mine.module)["copies"] == 0
    assert "copy" not in caplog.text
