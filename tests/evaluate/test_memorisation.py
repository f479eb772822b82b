"""Copies of training pictures, on a set with planted duplicates and stand-ins that memorise."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import safelight
from micro_models import toy_model
from safelight.cli import evaluate
from safelight.data.clip import load_clip
from safelight.data.index import build_index
from safelight.data.sources import Folder, StillLife, open_source
from safelight.errors import InvalidRequest
from safelight.evaluate import memorisation as m
from safelight.generate import Generator

PLANTED = 3
ALONE = 17


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes four times each, in other sizes and formats, and seventeen scenes once."""
    root = tmp_path_factory.mktemp("training")
    source = StillLife("train", 11, PLANTED + ALONE)
    for i in range(PLANTED + ALONE):
        picture, words = source.picture(i), source.captions(i)[0]
        copies = [("a.png", picture)]
        if i < PLANTED:
            large = picture.resize((96, 96), Image.Resampling.LANCZOS)
            copies += [("b.png", picture), ("c.png", large), ("d.jpg", large)]
        for name, image in copies:
            image.save(root / f"{i:02d}{name}", quality=95)
            (root / f"{i:02d}{name}").with_suffix(".txt").write_text(words)
    return root


@pytest.fixture(scope="module")
def studied(training: Path) -> m.Training:
    return m.study(open_source(training), load_clip(device="cpu"))


def test_the_planted_duplicates_are_known(studied: m.Training) -> None:
    assert len(studied.index) == 4 * PLANTED + ALONE
    assert studied.duplicated == 4 * PLANTED
    assert studied.often("00c.png") == 4
    assert studied.often("05a.png") == 1
    assert len({studied.groups[f"00{c}"] for c in ("a.png", "b.png", "c.png", "d.jpg")}) == 1


def test_distance_is_the_worst_tiles_root_mean_square() -> None:
    rng = np.random.default_rng(0)
    one, two = (rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2))
    worst = max(
        np.sqrt(
            np.mean((one[y : y + 8, x : x + 8] / 255.0 - two[y : y + 8, x : x + 8] / 255.0) ** 2)
        )
        for y in range(0, 32, 8)
        for x in range(0, 32, 8)
    )
    a, b = (m.tiled(Image.fromarray(p)) for p in (one, two))
    assert m.pixel_distance(a, b) == pytest.approx(worst, rel=1e-5)
    # An equal background does not make a copy.
    other = one.copy()
    other[:8, :8] = 255 - other[:8, :8]
    assert m.pixel_distance(a, m.tiled(Image.fromarray(other))) > m.PIXELS


def test_nearest_rows_are_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    queries, table = (rng.random((n, 16, 12)).astype(np.float32) for n in (5, 23))
    expected = [int(np.argmin([m.pixel_distance(q, t) for t in table])) for q in queries]
    assert m.nearest_pixels(queries, table).tolist() == expected
    monkeypatch.setattr(m, "_ROWS", 4)
    assert m.nearest_pixels(queries, table).tolist() == expected


def test_copies_are_found_and_other_scenes_are_not(studied: m.Training) -> None:
    clip = load_clip(device="cpu")
    worn = StillLife("train", 11, 20).picture(7).resize((48, 48))
    fresh = [("fresh", StillLife("val", 3, 9).picture(i)) for i in range(9)]
    rows = [near for near, _ in m.nearest(studied, clip, [("worn", worn), *fresh])]
    assert [r.name for r in rows] == ["worn"] + ["fresh"] * 9
    assert rows[0].pixel_key == rows[0].cosine_key == "07a.png"
    assert rows[0].pixel_distance < 0.1
    assert min(r.pixel_distance for r in rows[1:]) > m.PIXELS
    rates = m.copying(rows)
    assert (rates["pixels"].all.right, rates["pixels"].all.total) == (1, 10)
    assert rates["pixels"].once.right == rates["pixels"].extracted == 1


def test_an_index_is_taken_over_or_refused(studied: m.Training, training: Path) -> None:
    clip = load_clip(device="cpu")
    other, _ = build_index(StillLife("val", 1, 4), clip)
    with pytest.raises(InvalidRequest, match="is not of"):
        m.study(open_source(training), clip, index=other)
    again = m.study(open_source(training), clip, index=studied.index)
    assert again.index is studied.index
    assert np.array_equal(again.tiles, studied.tiles)
    with pytest.raises(InvalidRequest, match="magic"):
        m.study(open_source(training), clip, methods=["magic"])  # type: ignore[list-item]


class Memoriser:
    """Gives back what it saw three times or more under a caption; else a fresh scene."""

    def __init__(self, source: Folder) -> None:
        self.model = SimpleNamespace(checker=None)
        self.seen: dict[str, list[Image.Image]] = {}
        for i in range(len(source)):
            self.seen.setdefault(source.captions(i)[0], []).append(source.picture(i))
        self.fresh = StillLife("val", 77, 10_000)

    def generate(self, prompts: list[str], *, seed: list[int], count: int, **_: Any) -> list:
        results = []
        for words, number in zip(prompts, seed, strict=True):
            often = self.seen.get(words, [])
            image = often[0] if len(often) >= 3 else self.fresh.picture(number)
            results.append(SimpleNamespace(image=image, nsfw=number == 5, message=""))
        return results


@pytest.fixture
def run(training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    from safelight.data.duplicates import find_duplicates, save_drop_list

    drop = tmp_path / "drop.txt"
    save_drop_list(find_duplicates(open_source(training)), drop)
    sources = {"all": open_source(training), "few": open_source(training, exclude=drop)}

    def load(name: str) -> Any:
        if name == "micro":
            return Generator(toy_model())
        return Memoriser(sources[name])  # type: ignore[arg-type]

    monkeypatch.setattr(safelight, "load", load, raising=False)

    def call(*arguments: str):  # type: ignore[no-untyped-def]
        return CliRunner().invoke(evaluate.app, ["memorisation", *arguments])

    return call


def test_the_rate_with_and_without_duplicates(  # type: ignore[no-untyped-def]
    run, training: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run(str(training), "-m", "all", "--deduplicated", "few", "--control",
                 "stilllife:val:123:20", "--count", "20", "--batch", "7",
                 "-o", str(out))  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((out / "memorisation.json").read_text())
    assert found["training"] == {
        "source": str(training), "pictures": 29, "duplicated": 12, "clip": "tiny",
    }  # fmt: skip
    rates = {name: one["copying"]["pixels"] for name, one in found["sets"].items()}
    with_, without = rates["generated"], rates["without duplicates"]
    asked = m.captions_of(open_source(training), 20, 0)
    planted = {StillLife("train", 11, PLANTED).captions(i)[0] for i in range(PLANTED)}
    expected = sum(words in planted for words, seed in asked if seed != 5)
    assert expected >= 5
    assert with_["all"]["copies"] == with_["often"]["copies"] == expected
    assert with_["once"]["copies"] == 0
    assert 1 <= with_["extracted"] <= PLANTED
    assert without["all"]["copies"] == 0
    assert rates["control"]["all"] == {
        "copies": 0, "pictures": 20, "wilson95": pytest.approx([0, 0.16113], abs=1e-4),
    }  # fmt: skip
    assert found["sets"]["generated"]["flagged"] == 1
    assert with_["all"]["pictures"] == 19
    assert "29 training pictures, 12 of them" in result.output
    assert Image.open(out / "nearest-generated.png").width > 6 * 160
    assert (out / "nearest-without-duplicates.png").exists()


def test_a_real_generator_and_pictures_from_files(  # type: ignore[no-untyped-def]
    run, training: Path, tmp_path: Path
) -> None:
    result = run(str(training), "-m", "micro", "--count", "3", "--steps", "2",
                 "-o", str(tmp_path / "a"))  # fmt: skip
    assert result.exit_code == 0, result.output
    result = run(str(training), "--pictures", str(training), "--count", "100", "--method", "exact",
                 "-o", str(tmp_path / "b"))  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "b" / "memorisation.json").read_text())
    assert found["training"]["duplicated"] == 2 * PLANTED  # the equal files alone
    pixels = found["sets"]["generated"]["copying"]["pixels"]
    assert pixels["all"]["copies"] == pixels["all"]["pictures"] == 29
    groups = {n["pixel_group"] for n in found["sets"]["generated"]["nearest"]}
    assert pixels["extracted"] == len(groups)
    assert all(n["pixel_distance"] == 0 for n in found["sets"]["generated"]["nearest"])


@pytest.mark.parametrize(
    "arguments",
    [[], ["-m", "all", "--pictures", "x"], ["--pictures", "nowhere"],
     ["-m", "all", "--count", "999"], ["-m", "all", "--index", "none.npz"]],
)  # fmt: skip
def test_a_wrong_argument_is_refused(run, training: Path, arguments: list[str]) -> None:  # type: ignore[no-untyped-def]
    assert isinstance(run(str(training), *arguments).exception, InvalidRequest)
