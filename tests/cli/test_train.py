"""``safelight train``."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safelight.cli import train
from safelight.cli.main import main

RECIPE = """
name = "micro"
output = "{output}"
images = 32
[optim]
batch = 8
[vae.vae]
channels = [8, 8, 16, 16]
layers_per_block = 1
norm_groups = 4
sample_size = 64
"""


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(a) for a in arguments])
    return int(leaving.value.code or 0)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "micro.toml"
    path.write_text(RECIPE.format(output=(tmp_path / "run").as_posix()))
    return path


class FakeRun:
    """Stands for the loop, which has tests of its own."""

    def __init__(self, recipe: Any, loss: Any = None) -> None:
        self.recipe, self.seen, self.seconds = recipe, 0, 1.5
        self.progress: Any = None
        self.stop_after: float | None = None
        self.loss = loss or (lambda: 0.5)

    def go(self) -> dict[str, float]:
        while self.seen < self.recipe.images and self.stop_after != 0.0:
            self.seen += 8
            self.progress(self.seen, self.recipe.images, {"loss": self.loss()})
        return {"psnr": 30.0}


def test_a_dry_run_prints_the_whole_recipe(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", recipe, "--dry-run", "--threads", 3) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "vae"
    assert document["recipe"]["threads"] == 3
    assert document["recipe"]["optim"]["betas"] == [0.9, 0.999]
    assert not (recipe.parent / "run").exists()


def test_wrong_recipes_are_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", tmp_path / "none.toml") == 2
    recipe.write_text(recipe.read_text().replace("batch = 8", "batch = 0"))
    assert run("train", recipe) == 2
    err = capsys.readouterr().err
    assert "no file" in err
    assert "optim.batch" in err


def test_a_run_ends_with_its_numbers(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "_prepare", lambda recipe, *_: FakeRun(recipe))
    assert run("train", recipe) == 0
    assert "32 of 32 pictures seen" in capsys.readouterr().out
    assert run("train", recipe, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["seen"], document["validation"]) == (32, {"psnr": 30.0})


def test_ctrl_c_saves_and_says_how_to_go_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return 0.5

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "_prepare", lambda recipe, *_: FakeRun(recipe, interrupt))
    assert run("train", recipe) == 130
    out, err = capsys.readouterr()
    assert "8 of 32 pictures seen" in out
    assert "the same command resumes" in err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_loss_that_is_not_finite_is_an_error(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge() -> float:
        raise FloatingPointError("the loss is nan. Lower optim.lr.")

    monkeypatch.setattr(train, "_prepare", lambda recipe, *_: FakeRun(recipe, diverge))
    assert run("train", recipe) == 1
    assert "Lower optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "source", "module", "name"),
    [
        ("clip", "stilllife", "contrastive", "ContrastiveObjective"),
        ("clip", "pictures/", "pairs", "PairsObjective"),
        ("vae", "stilllife", "autoencoder", "AutoencoderObjective"),
        ("diffusion", "stilllife", "latent", "LatentDiffusionObjective"),
    ],
)
def test_every_kind_of_recipe_has_its_objective(
    kind: str, source: str, module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safelight.train.objectives import objective

    monkeypatch.setattr(f"safelight.train.{module}.{name}", lambda recipe: (name, recipe))
    recipe: Any = SimpleNamespace(kind=kind, data=SimpleNamespace(source=source))
    assert objective(recipe) == (name, recipe)
