"""Pictures on the command line: ``generate --image``, ``vary``, ``upscale``, ``replay``."""

from __future__ import annotations

import io
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from micro_models import toy_model
from micro_systems import half_mask, photo, system
from safelight.cli.main import main
from safelight.model import Model
from safelight.names import DEFAULT_MODEL

CUBE = "a red cube on top of a blue sphere"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(a) for a in arguments])
    return int(leaving.value.code or 0)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder with a picture, a mask, and a model for every name."""
    made: dict[str, Model] = {}

    def load(name: str = DEFAULT_MODEL, **options: Any) -> Model:
        if name not in made:
            made[name] = toy_model() if name == DEFAULT_MODEL else system(name).model
            made[name].source = name
        return made[name]

    monkeypatch.setattr(Model, "load", load)
    monkeypatch.chdir(tmp_path)
    photo(64, 64).save("in.png")
    half_mask(64, 64).save("mask.png")
    return tmp_path


@pytest.mark.usefixtures("place")
def test_a_picture_by_path_on_standard_input_and_by_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path("in.png").read_bytes()

    class Input:
        buffer = io.BytesIO(data)

    asked: list[str] = []

    def answer(request: Any, timeout: float) -> io.BytesIO:
        asked.append(request.full_url)
        assert timeout <= 60
        return io.BytesIO(data)

    monkeypatch.setattr(sys, "stdin", Input())
    monkeypatch.setattr(urllib.request, "urlopen", answer)
    for given in ("in.png", "-", "https://example.org/in.png"):
        out = ["--image", given, "--strength", 0, "--size", 32, "-o", "out.png"]
        assert run("generate", CUBE, *out) == 0
        wanted = photo(64, 64).resize((32, 32), Image.Resampling.LANCZOS)
        with Image.open("out.png") as made:
            assert np.array_equal(np.asarray(made), np.asarray(wanted))
        Path("out.png").unlink()
    assert asked == ["https://example.org/in.png"]
    capsys.readouterr()
    assert run("generate", CUBE, "--image", "-", "--mask", "-") == 2
    assert "standard input holds one" in capsys.readouterr().err
    assert run("generate", CUBE, "--image", "none.png") == 2
    assert "image: no file none.png" in capsys.readouterr().err
    assert run("generate", CUBE, "--depth", "in.png", "--steps", 1) == 2
    assert "Systems that have: depth" in capsys.readouterr().err
    assert run("generate") == 2


@pytest.mark.usefixtures("place")
def test_inpainting_and_replay(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--image", "in.png", "--mask", "mask.png"]
    out = ["-m", "inpaint", "--steps", 1, "-s", 1, "--size", 32, "-o", "out.png"]
    assert run("generate", CUBE, *given, *out) == 0
    assert "strength 1" in capsys.readouterr().err
    assert run("replay", "out.png", "-m", "inpaint", *given) == 0
    assert "largest difference 0/255" in capsys.readouterr().out
    assert run("replay", "out.png", "-m", "inpaint") == 2
    assert "Give the file again" in capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_vary_and_upscale(capsys: pytest.CaptureFixture[str]) -> None:
    some = ["--steps", 1, "-s", 1]
    assert run("vary", "in.png", "-b", 2, "-o", "varied", *some) == 0
    assert len(list(Path("varied").iterdir())) == 2
    mixed = ["in.png", "mask.png", "--weights", "3,1", "-m", "unclip", "--noise-level", 1000]
    capsys.readouterr()
    assert run("vary", *mixed, "-p", CUBE, "--json", *some) == 0
    document = json.loads(capsys.readouterr().out)
    request = document["pictures"][0]["metadata"]["request"]
    assert [each[:7] for each in request["images"]] == ["sha256:"] * 2
    assert request["image_weights"] == [3, 1]
    assert "read as 999" in document["pictures"][0]["notices"][0]
    photo(8, 16).save("small.png")
    assert run("upscale", "small.png", "-p", CUBE, "-o", "large.png", *some) == 0
    with Image.open("large.png") as made:
        assert made.size == (32, 64)
    capsys.readouterr()
    assert run("vary", "in.png", "--weights", "x") == 2
    assert run("upscale", "small.png", "--noise-level", 400, *some) == 2
    assert "noise_level: 400 is more" in capsys.readouterr().err
    assert run("vary", "in.png", "-p", "a cone", *some) == 2
    assert "reads no text" in capsys.readouterr().err
