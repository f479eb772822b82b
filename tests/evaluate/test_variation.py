"""What variations keep, on micro models and on stand-ins that keep everything or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import safelight
from micro_systems import system
from safelight.cli import evaluate
from safelight.data import stilllife
from safelight.data.clip import load_clip
from safelight.errors import InvalidRequest
from safelight.evaluate import prompts, variation
from safelight.evaluate.features import clip_extractor
from safelight.evaluate.judge import Judge


def same(pictures: list[Image.Image], seeds: list[int]) -> np.ndarray:
    return np.stack([np.asarray(p) for p in pictures])


def other(pictures: list[Image.Image], seeds: list[int]) -> np.ndarray:
    scenes = [stilllife.scene(5, seed % 1000, "val") for seed in seeds]
    return stilllife.render(scenes, pictures[0].width)


def worn(pictures: list[Image.Image], seeds: list[int]) -> np.ndarray:
    return np.stack([np.asarray(p.resize((8, 8)).resize(p.size)) for p in pictures])


def test_fidelity_and_attributes_go_with_what_is_kept() -> None:
    extractor, judge = clip_extractor(load_clip(device="cpu")), Judge.load()
    chosen = prompts.load("held_out", 12)
    rows = {
        vary.__name__: variation.kept_of_list(
            "held_out",
            chosen,
            vary,
            extractor,
            judge,
            size=64,
            batch=5,  # type: ignore[arg-type]
        )
        for vary in (same, worn, other)
    }
    assert rows["same"].fidelity.value == pytest.approx(1, abs=1e-6)
    assert 1 > rows["worn"].fidelity.value > rows["other"].fidelity.value
    for row in rows.values():
        assert row.outputs is not None
        assert row.inputs is not None
        assert row.inputs.cells["all"].value > 0.8
        assert row.fidelity.pictures == 12
    assert rows["same"].outputs.cells == rows["same"].inputs.cells  # type: ignore[union-attr]
    assert rows["other"].outputs.cells["all"].value < 0.3  # type: ignore[union-attr]


def test_pictures_are_varied_each_with_its_seed() -> None:
    generator = system("image-variations")
    pictures = [Image.fromarray(p) for p in
                stilllife.render([stilllife.scene(1, i) for i in range(3)], 32)]  # fmt: skip
    vary = variation.varied(generator, steps=2)
    together = vary(pictures, [4, 5, 6])
    alone = vary(pictures[1:2], [5])
    assert together.shape == (3, 32, 32, 3)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    direct = generator.generate(image=pictures[1], seed=5, steps=2)[0].image
    assert np.array_equal(alone[0], np.asarray(direct))


def test_who_can_be_asked() -> None:
    assert variation.must_vary(system("image-variations"))
    assert not variation.must_vary(system("sd-v1"))
    with pytest.raises(InvalidRequest, match="no variations"):
        variation.check(system("sd-v1"))
    with pytest.raises(InvalidRequest, match="noise_levels"):
        variation.check(system("image-variations"), [100])
    variation.check(system("unclip"), [0, 100])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def load(name: str):  # type: ignore[no-untyped-def]
        return system(name)

    monkeypatch.setattr(safelight, "load", load, raising=False)

    def call(*arguments: str):  # type: ignore[no-untyped-def]
        return CliRunner().invoke(evaluate.app, list(arguments))

    return call


def test_evaluate_varies_what_only_varies(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    result = run("-m", "image-variations", "--list", "single,pair", "--limit", "3", "--steps", "2",
                 "-o", str(tmp_path))  # fmt: skip
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "variations.json").read_text())
    assert [row["name"] for row in numbers["inputs"]] == ["single", "pair"]
    assert numbers["inputs"][0]["fidelity"]["features"].startswith("clip:image-variations@")
    assert numbers["inputs"][0]["outputs"]["all"]["total"] == 3
    assert (tmp_path / "pair.png").exists()
    assert "CLIP cosine" in result.output
    refused = run("-m", "image-variations", "--sweep", "1,2")
    assert isinstance(refused.exception, InvalidRequest)


def test_noise_levels_of_any_pictures_are_rows(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "in"
    folder.mkdir()
    for i, size in enumerate((32, 40, 24)):
        Image.effect_noise((size, 32), 40).convert("RGB").save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"none")
    result = run("variations", "-m", "unclip", "--images", str(folder), "--noise-levels", "0,900",
                 "--steps", "2", "--clip", "tiny", "-o", str(tmp_path / "out"))  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "variations.json").read_text())["inputs"]
    assert [r["noise_level"] for r in rows] == [0, 900]
    assert rows[0]["fidelity"]["pictures"] == 3
    assert rows[0]["fidelity"]["features"].startswith("clip:tiny@")
    assert rows[0]["outputs"] is None
    assert (tmp_path / "out" / "in-noise-900.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--noise-levels", "a"], ["--images", "nowhere"], ["-m", "sd-v1"], ["--list", "horses"]],
)
def test_a_wrong_argument_is_refused(run, arguments: list[str]) -> None:  # type: ignore[no-untyped-def]
    assert isinstance(run("variations", *arguments).exception, InvalidRequest)
