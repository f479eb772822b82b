"""The cards' figure on micro models: briefs, points that are kept, the front, the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import safelight
from micro_models import MICRO, toy_model
from safelight import presets
from safelight.cli import evaluate
from safelight.data.clip import load_clip
from safelight.errors import InvalidRequest, MissingExtra, SafelightError
from safelight.evaluate import briefs, pareto
from safelight.evaluate.drawing import card_sampler, drawn, unguarded
from safelight.evaluate.metrics import Measured
from safelight.generate import Generator

WORDS = [
    "A red cube.",
    "a  blue\nsphere",
    "two cones",
    "a cyan cylinder",
    "a green torus",
    "a cube",
]


@pytest.fixture
def coco(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny COCO: four pictures of other shapes, six captions."""
    folder = tmp_path / "val2017"
    folder.mkdir()
    for i in range(4):
        rng = np.random.default_rng(i)
        values = rng.integers(0, 256, (20 + 4 * i, 40, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{i:012d}.jpg")
    file = tmp_path / "captions_val2017.json"
    document = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(4)],
        "annotations": [
            {"id": 90 - k, "image_id": k % 4, "caption": words} for k, words in enumerate(WORDS)
        ],
    }
    file.write_text(json.dumps(document))
    return file, folder


# -- briefs -------------------------------------------------------------------------------------


def test_captions_are_drawn_by_a_seed_and_compared_with_every_picture(
    coco: tuple[Path, Path],
) -> None:
    brief = briefs.coco(*coco, 4, seed=3, size=16)
    assert len(set(brief.prompts)) == 4
    assert set(brief.prompts) <= {" ".join(w.split()) for w in WORDS}
    assert brief.seeds == (3, 4, 5, 6)
    assert [p.shape for p in brief.reference(16)] == [(16, 16, 3)] * 4
    assert briefs.coco(*coco, 4, seed=3).digest == brief.digest
    assert briefs.coco(*coco, 4, seed=3).size == 512
    assert briefs.coco(*coco, 4, seed=4).digest != brief.digest


def test_a_coco_that_is_not_whole_is_refused_before_the_work(coco: tuple[Path, Path]) -> None:
    file, folder = coco
    with pytest.raises(InvalidRequest, match="10000 of 6 captions"):
        briefs.coco(file, folder)
    (folder / "000000000002.jpg").unlink()
    with pytest.raises(InvalidRequest, match=r"lacks 1 of 4 pictures, as 000000000002\.jpg"):
        briefs.coco(file, folder, 4)
    with pytest.raises(InvalidRequest, match="no folder"):
        briefs.coco(file, folder / "none", 4)
    with pytest.raises(InvalidRequest, match="no file"):
        briefs.coco(folder / "none.json", folder, 4)
    file.write_text('{"images": []}')
    with pytest.raises(InvalidRequest, match="no COCO captions file"):
        briefs.coco(file, folder, 4)


def test_a_list_of_still_life_is_a_brief() -> None:
    brief = briefs.still_life("single", 3)
    assert brief.size is None
    assert len(list(brief.reference(16))) == 12
    with pytest.raises(InvalidRequest, match="no list"):
        briefs.still_life("horses")


def test_samplers_are_the_cards() -> None:
    models = (presets.SD_V1, presets.SD_SMALL, presets.TINY, presets.SD_V2_BASE, presets.SD_V2_768)
    assert [card_sampler(m) for m in models] == ["pndm", "pndm", "pndm", "ddim", "ddim"]
    assert card_sampler(presets.TINY_V) == "ddim"
    assert pareto.SCALES == (1.5, 2, 3, 4, 5, 6, 7, 8)
    assert pareto.STEPS == 50


# -- pictures for measuring ---------------------------------------------------------------------


def test_a_missing_picture_is_an_error_not_a_gap() -> None:
    result = SimpleNamespace(image=None, message="no memory", seed=7)
    broken = SimpleNamespace(generate=lambda *_, **__: [result])
    with pytest.raises(SafelightError, match="no memory"):
        drawn(broken)(["a cube"], [7])  # type: ignore[arg-type]


def test_a_checker_does_not_black_out_what_is_measured() -> None:
    generator = Generator(toy_model())
    assert unguarded(generator) == {}
    guarded = SimpleNamespace(model=SimpleNamespace(checker=object()))
    assert unguarded(guarded) == {"safety": "off"}  # type: ignore[arg-type]


# -- points -------------------------------------------------------------------------------------


def measured(value: float, half: float = 0.1, metric: str = "frechet") -> Measured:
    return Measured(metric=metric, value=value, interval=(value - half, value + half), how="x",
                    features="f", pictures=9)  # fmt: skip


def point(far: float, near: float, scale: float = 1.0, model: str = "m") -> pareto.Point:
    settings = pareto.Settings(
        model=model, weights="w" + model, guidance_scale=scale, steps=2, sampler="ddim", size=8,
        prompts="p", prompts_digest="d", features=("f",),
    )  # fmt: skip
    return pareto.Point(settings=settings, distances=(measured(far),),
                        clip_score=measured(near, metric="clip_score"))  # fmt: skip


def test_the_front_is_what_nothing_beats() -> None:
    points = [point(9, 20, 1.5), point(5, 22, 3), point(6, 25, 5), point(7, 24, 8), point(5, 22, 4)]
    best = [p.settings.guidance_scale for p in pareto.front(points, "frechet", "f")]
    assert best == [3, 5, 4]
    table = pareto.table(points, "frechet", "f")
    assert table.count("| * |") == 3
    assert "| m | 5 | 6 (5.9 to 6.1) | 25 (24.9 to 25.1) | * |" in table


def test_points_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    file = tmp_path / "points.jsonl"
    book = pareto.Notebook(file)
    book.add(point(1, 2, 1.5))
    book.add(point(1, 2, 3))
    file.write_text(file.read_text()[:-30])  # cut off
    again = pareto.Notebook(file)
    assert list(again.points) == [point(1, 2, 1.5).settings.key]
    again.add(point(4, 2, 3))
    assert len(pareto.Notebook(file).points) == 2


def test_a_point_hangs_on_everything_but_the_models_name() -> None:
    one = point(1, 2).settings
    assert one.replace(model="other").key == one.key
    unknown = one.replace(weights="")
    assert unknown.replace(model="other").key != unknown.key
    changes = {"weights": "v", "guidance_scale": 2.0, "steps": 3, "sampler": "pndm", "size": 16,
               "prompts_digest": "e", "features": ("g",)}  # fmt: skip
    for name, value in changes.items():
        assert one.replace(**{name: value}).key != one.key, name


# -- the command --------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    calls: list[tuple[str, dict]] = []

    class Counting(Generator):
        def generate(self, *arguments, **wishes):  # type: ignore[no-untyped-def]
            calls.append((self.model.spec.name, wishes))
            return super().generate(*arguments, **wishes)

    def load(name: str) -> Generator:
        prediction = "v" if name == "two" else "epsilon"
        schedule = MICRO.schedule.replace(prediction_type=prediction)
        model = toy_model(MICRO.replace(name=name, schedule=schedule))
        model.digest = name
        return Counting(model)

    monkeypatch.setattr(safelight, "load", load, raising=False)

    def run(*arguments: str):  # type: ignore[no-untyped-def]
        calls.clear()
        return CliRunner().invoke(evaluate.app, ["pareto", *arguments]), calls

    return run


def test_the_figure_of_two_models_is_made_and_goes_on(  # type: ignore[no-untyped-def]
    command, coco: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "figure"
    basics = ["--coco", str(coco[0]), "--images", str(coco[1]), "--count", "5", "--size", "32",
              "--steps", "2", "--batch", "3", "-o", str(out)]  # fmt: skip
    result, calls = command(*basics, "-m", "one", "--scales", "1.5,3")
    assert result.exit_code == 0, result.output
    assert len(calls) == 4  # two points of two batches
    assert {c[1]["sampler"] for c in calls} == {"pndm"}
    assert Image.open(out / "pareto.png").size[0] > 100
    assert len((out / "points.jsonl").read_text().splitlines()) == 2

    result, calls = command(*basics, "-m", "one", "-m", "two", "--scales", "1.5,3,8")
    assert result.exit_code == 0, result.output
    new = {(name, wishes["guidance_scale"]) for name, wishes in calls}
    assert new == {("one", 8.0), ("two", 1.5), ("two", 3.0), ("two", 8.0)}
    assert {w["sampler"] for n, w in calls if n == "two"} == {"ddim"}
    assert len((out / "points.jsonl").read_text().splitlines()) == 6
    words = (out / "pareto.md").read_text()
    assert words.count("\n| one |") == words.count("\n| two |") == 3
    assert "clip:tiny@" in words

    result, calls = command(*basics, "-m", "one", "-m", "two", "--distance", "cmmd")
    assert result.exit_code == 0, result.output
    assert {w["guidance_scale"] for _, w in calls} == {2.0, 4.0, 5.0, 6.0, 7.0}  # of the cards'
    assert "| model | guidance | cmmd" in (out / "pareto.md").read_text()


def test_a_point_is_what_the_metrics_say_of_its_pictures(tmp_path: Path) -> None:
    clip = load_clip(device="cpu")
    brief = briefs.still_life("single", 6, size=32)
    generator = Generator(toy_model())
    sweep = pareto.Sweep(brief, clip, folder=tmp_path, batch=4)
    settings = sweep.settings("micro", generator, 2.0, 2, None)
    found = sweep.measure(settings, generator)
    pictures = drawn(generator, steps=2, guidance_scale=2.0, sampler="pndm", width=32, height=32)(
        brief.prompts, brief.seeds
    )
    embedded = clip.pictures(map(Image.fromarray, pictures))
    score = 100 * np.maximum((embedded * clip.words(list(brief.prompts))).sum(1), 0).mean()
    assert found.clip_score.value == pytest.approx(score, abs=0.05)
    assert found.distance("frechet", sweep.extractors[0].name).reference == 24
    assert sweep.measure(settings, None) is found  # type: ignore[arg-type]


@pytest.mark.parametrize("bytes_lost", [0, 3, 700])
def test_a_point_that_was_cut_off_goes_on_in_its_middle(tmp_path: Path, bytes_lost: int) -> None:
    clip = load_clip(device="cpu")
    brief = briefs.still_life("single", 6, size=32)
    generator = Generator(toy_model())

    def sweep(folder: str) -> tuple[pareto.Sweep, pareto.Settings]:
        made = pareto.Sweep(brief, clip, folder=tmp_path / folder, batch=2)
        return made, made.settings("micro", generator, 2.0, 2, None)

    whole, settings = sweep("whole")
    expected = whole.measure(settings, generator)
    drawn_ = []

    class Dying:
        model = generator.model

        def generate(self, prompts, **wishes):  # type: ignore[no-untyped-def]
            if len(drawn_) == 4:
                raise KeyboardInterrupt
            drawn_.extend(prompts)
            return generator.generate(prompts, **wishes)

    cut, settings = sweep("cut")
    with pytest.raises(KeyboardInterrupt):
        cut.measure(settings, Dying())  # type: ignore[arg-type]
    (file,) = (tmp_path / "cut").glob("*.rows")
    file.write_bytes(file.read_bytes()[: file.stat().st_size - bytes_lost])
    drawn_[:] = []
    again, settings = sweep("cut")
    found = again.measure(settings, Dying())  # type: ignore[arg-type]
    lost = {0: 0, 3: 1, 700: 2}[bytes_lost]
    assert drawn_ == list(brief.prompts[4 - lost :])
    assert found.clip_score.value == pytest.approx(expected.clip_score.value, abs=1e-3)
    assert not list((tmp_path / "cut").glob("*.rows"))


@pytest.mark.parametrize(
    "arguments",
    [["--scales", "a"], ["--scales", "-1"], ["--distance", "is"], ["--images", "x"],
     ["--coco", "x"], ["--sampler", "magic"], ["--list", "horses"], ["--inception", "none.pt"]],
)  # fmt: skip
def test_a_wrong_argument_is_refused_before_anything_is_made(  # type: ignore[no-untyped-def]
    command, arguments: list[str], tmp_path: Path
) -> None:
    result, calls = command(*arguments, "-o", str(tmp_path / "out"))
    assert isinstance(result.exception, InvalidRequest)
    assert not calls
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_extra_is_named(
    command,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result, calls = command()
    assert isinstance(result.exception, MissingExtra)
    assert not calls
