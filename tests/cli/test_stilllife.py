"""``safelight stilllife sheet``."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from safelight.cli.main import main


def sheet(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(["stilllife", "sheet", *arguments])
    return int(leaving.value.code or 0)


def test_the_same_series_gives_the_same_sheet(tmp_path: Path) -> None:
    options = ["--count", "7", "--size", "32", "--seed", "3", "--split", "combo", "--varied"]
    for name in ("a.png", "b.png"):
        assert sheet("-o", str(tmp_path / "new" / name), *options) == 0
    a, b = (Image.open(tmp_path / "new" / name) for name in ("a.png", "b.png"))
    assert a.width == 5 * (32 + 8) + 8
    assert a.tobytes() == b.tobytes()
    assert sheet("-o", str(tmp_path / "c.png"), *options, "--start", "1") == 0
    assert Image.open(tmp_path / "c.png").tobytes() != a.tobytes()


def test_an_unknown_format_is_refused_before_drawing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sheet("-o", str(tmp_path / "sheet.xyz")) == 2
    assert capsys.readouterr().err.startswith("Error: output: cannot tell the format")
