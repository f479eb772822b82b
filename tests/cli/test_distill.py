"""``safelight distill``, a thin face of ``train``; and rehearsals from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safelight.cli.main import main

RECIPES = Path(__file__).parents[2] / "recipes"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(a) for a in arguments])
    return int(leaving.value.code or 0)


def test_the_teacher_may_be_another(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES / "tiny" / "small.toml"
    assert run("distill", recipe, "--teacher", "runs/other", "--dry-run") == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    teachers = [s["recipe"]["distill"] and s["recipe"]["distill"]["teacher"] for s in stages]
    assert teachers == [None, "runs/other", "runs/other"]


def test_a_recipe_without_a_teacher_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("distill", RECIPES / "tiny" / "v1.toml") == 2
    assert "distill" in capsys.readouterr().err


def test_a_rehearsal_says_its_losses(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES / "tiny" / "fast.toml"
    assert run("distill", recipe, "--rehearse", 2, "--json") == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [s["name"] for s in stages] == ["tiny-fast-guidance", "tiny-fast-consistency"]
    assert all(len(s["losses"]) == 2 for s in stages)
