"""The grid of biases and limits: templates, counts of pictures that are known, the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import safelight
from micro_models import toy_model
from safelight.cli import evaluate
from safelight.data import stilllife
from safelight.data.clip import load_clip
from safelight.errors import InvalidRequest
from safelight.evaluate import limits, limits_report
from safelight.generate import Generator

COLOURS = """
[[section]]
name = "colours"
title = "Colours"
template = "a {} cube"
fill = ["red", "blue"]
choose_own = true

[[section.questions]]
name = "is"
answers = { red = "a red cube", blue = "a blue cube", round = "a {} sphere" }

[[section]]
name = "words"
title = "Words"
cases = [
    { label = "English", prompt = "a red cube", means = "a red cube" },
    { label = "other", prompt = "ein blauer Würfel", means = "a red cube" },
]
"""


class Painter:
    """Draws a red cube for "red", a blue one for anything else; one picture is flagged."""

    def __init__(self) -> None:
        scenes = {"red": stilllife.scene(4, 234, "all"), "blue": stilllife.scene(4, 21, "all")}
        self.cubes = {name: stilllife.render([s], 64)[0] for name, s in scenes.items()}

    def generate(self, prompts: list[str], *, seed: list[int], count: int) -> list:
        return [
            SimpleNamespace(
                image=Image.fromarray(self.cubes["red" if "red" in words else "blue"]),
                nsfw=number == 12 and "red" in words,
            )
            for words, number in zip(prompts, seed, strict=True)
        ]


def test_the_built_in_sections_cover_the_cards_limits() -> None:
    sections = {s.name: s for s in limits.load()}
    assert list(sections) == ["people", "culture", "language", "text", "faces", "composition"]
    assert sections["composition"].all_cases()[0].prompt == "a red cube on top of a blue sphere"
    for case in sections["language"].all_cases():
        assert case.means
        assert case.label == "English" or case.prompt != case.means
    own = sections["text"].all_cases()[0]
    assert own.prompt == 'a photo of a sign that says "OPEN"'
    assert len(own.against) == 3
    assert own.prompt not in own.against
    assert [s.name for s in limits.load(names=["text", "people"])] == ["people", "text"]


def test_counts_are_what_the_pictures_show(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text(COLOURS)
    clip = load_clip(device="cpu")
    colours, words = limits.load(file)
    rows = limits.draw(colours, Painter(), count=4, seed=10, batch=3)  # type: ignore[arg-type]
    limits.count(colours, rows, clip)
    red, blue = rows
    assert red.seeds == blue.seeds == [10, 11, 12, 13]
    assert red.flagged == [False, False, True, False]
    assert red.answers == {"is": {"red": 3, "blue": 0, "round": 0}}
    assert blue.answers == {"is": {"red": 0, "blue": 4, "round": 0}}
    assert red.right is not None
    assert (red.right.right, red.right.total) == (3, 3)

    rows = limits.draw(words, Painter(), count=4, seed=20)  # type: ignore[arg-type]
    limits.count(words, rows, clip)
    english, other = rows
    assert english.score is not None
    assert other.score is not None
    assert english.less is None
    assert other.less is not None
    assert other.less.value == pytest.approx(other.score.value - english.score.value)
    assert other.less.interval is not None
    assert other.less.interval[1] < 0
    table = limits_report.markdown([(words, rows)], "clip:x")
    assert "| other | ein blauer Würfel | 4 |" in table


def test_a_picture_that_failed_leaves_a_gap_and_is_not_counted() -> None:
    (section,) = limits.load(names=["faces"])
    nothing = SimpleNamespace(
        generate=lambda prompts, **_: [SimpleNamespace(image=None, nsfw=None)] * len(prompts)
    )
    rows = limits.draw(section, nothing, count=2)  # type: ignore[arg-type]
    limits.count(section, rows, load_clip(device="cpu"))
    assert rows[0].seen == []
    sheet = np.asarray(limits_report.sheet(rows))
    assert (sheet == 200).all(-1).sum() >= 10 * 160 * 160


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(safelight, "load", lambda name: Generator(toy_model()), raising=False)

    def call(*arguments: str):  # type: ignore[no-untyped-def]
        return CliRunner().invoke(evaluate.app, ["limits", *arguments])

    return call


def test_the_command_draws_every_section(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    result = run("--count", "2", "--steps", "2", "--clip", "tiny", "-o", str(tmp_path))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "limits.json").read_text())
    assert len(found["sections"]) == 6
    for name, rows in found["sections"].items():
        assert Image.open(tmp_path / f"{name}.png").height > len(rows) * 160
        assert f"]({name}.png)" in (tmp_path / "limits.md").read_text()
    person = found["sections"]["people"][0]
    assert sum(person["answers"]["skin"].values()) == person["pictures"] == 2
    assert found["sections"]["language"][0]["against_english"] is None
    assert found["sections"]["language"][1]["against_english"]["pictures"] == 2
    assert found["sections"]["composition"][0]["right"]["total"] == 2
    assert found["sections"]["faces"][0]["answers"] == {}
    assert "clip:tiny@" in result.output


def test_without_a_clip_there_are_sheets_alone(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    result = run("--section", "text", "--count", "1", "--steps", "2", "-o", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "No CLIP was given" in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["limits.json", "limits.md", "text.png"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "no file"),
        ("no toml", "templates"),
        ("[other]", "section"),
        ('[[section]]\nname = "a b"\ntitle = "x"', "name"),
        ('[[section]]\nname = "a"\ntitle = "x"\nfill = ["b"]', "template with fill"),
        ('[[section]]\nname = "a"\ntitle = "x"', "or cases"),
        ('[[section]]\nname = "a"\ntitle = "x"\nsmell = 1', "smell"),
    ],
)
def test_templates_that_are_wrong_are_refused(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, text: str | None, problem: str
) -> None:
    file = tmp_path / "t.toml"
    if text is not None:
        file.write_text(text)
    result = run("--templates", str(file))
    assert isinstance(result.exception, InvalidRequest)
    assert problem in str(result.exception)


def test_an_unknown_section_is_refused(run) -> None:  # type: ignore[no-untyped-def]
    assert "no section 'taste'" in str(run("--section", "taste").exception)
