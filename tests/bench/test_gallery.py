"""docs/gallery.md is what its sheets say, and a sheet is made by the lines that it shows."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
from benchmarks import gallery
from PIL import Image

from micro_models import micro_model
from safelight.model import Model

DATA = tomllib.loads((gallery.HERE / "gallery.toml").read_text(encoding="utf-8"))


def test_the_page_is_what_the_sheets_say() -> None:
    page = gallery.PAGE.read_text(encoding="utf-8")
    name, size = re.findall(r"`([\w-]+)`, (\d+) pixels", page)[0]
    assert page == gallery.page(DATA, {"model": name, "size": int(size)})
    pictures = list(gallery.ASSETS.glob("*.webp"))
    assert {path.stem for path in pictures} == {sheet["name"] for sheet in DATA["sheet"]}
    assert sum(path.stat().st_size for path in pictures) < 600 * 1024


@pytest.mark.parametrize("sheet", DATA["sheet"], ids=lambda sheet: sheet["name"])
def test_the_loops_are_the_commands_that_ran(sheet: gallery.Sheet, tmp_path: Path) -> None:
    if "command" not in sheet:
        return
    names = {"model": "tiny", "size": 128}
    script = 'safelight() { printf "%s|" "$@"; echo; }\n' + gallery.loop(sheet, names)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    lines = [gallery.filled(sheet["command"], {**names, **case}) for case in gallery.cases(sheet)]
    words = ["".join(f"{word}|" for word in gallery.shlex.split(line)[1:]) for line in lines]
    assert done.stdout.splitlines() == words


def test_a_sheet_has_its_pictures_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = micro_model()
    monkeypatch.setattr(Model, "load", lambda *_, **__: model)
    sheet = {
        "name": "toy",
        "command": 'safelight generate "{prompt}" -s {seed} --steps 1 -o "{prompt}-{seed}.png"',
        "axes": {"prompt": ["a red cube", "a cone"], "seed": [1, 2, 3]},
    }
    first, made = gallery.pictures(sheet, {})
    assert first == []
    assert [words for words, _ in made] == ["seed 1", "seed 2", "seed 3"] * 2
    whole = gallery.drawn(sheet, first, made)
    side = model.spec.native_size
    last = whole.crop((2 * (side + 4), 16 + side + 36, 2 * (side + 4) + side, 36 + 16 + 2 * side))
    assert np.array_equal(np.asarray(last), np.asarray(Image.open("a cone-3.png")))
    with pytest.raises(RuntimeError, match="steps"):
        gallery.run("safelight generate x --steps 0")
