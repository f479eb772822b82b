"""The benchmark of the fast modes: verdicts are kept, taken up again, and told truly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import fast, fast_page

from micro_models import micro_model
from safelight.generate import Generator

REAL = fast._pictures


def record(low: float, ratio: float) -> dict[str, Any]:
    def lever(interval: list[float], psnr: float | None) -> dict[str, Any]:
        return {
            "wishes": {},
            "accuracy": 0.9,
            "difference": 0.0,
            "interval": interval,
            "psnr": psnr,
        }

    def speed(value: float) -> dict[str, Any]:
        return {"seconds": 1.0, "ratio": {fast.PEER: [value, value, value]}}

    return {
        "model": "tiny-v",
        "count": 40,
        "machine": {"Processor": "one", "torch": "2", "diffusers": "0"},
        "clean": True,
        "notes": [],
        "speed": {"1": {fast.REFERENCE: speed(2.0), "x": speed(ratio)}},
        "levers": {fast.REFERENCE: lever([0, 0], None), "x": lever([low, 0.01], 30.0)},
        "target": {"margin": fast.MARGIN, "speed": fast.TARGET},
    }


@pytest.mark.parametrize(
    ("low", "ratio", "met"),
    [(-0.014, 8.0, ["x"]), (-0.016, 9.0, []), (-0.001, 7.9, []), (-0.015, 8.0, [])],
)
def test_the_target_is_both_speed_and_accuracy(low: float, ratio: float, met: list[str]) -> None:
    assert fast_page.met(record(low, ratio)) == met


def test_the_page_keeps_what_people_wrote(tmp_path: Path) -> None:
    page = tmp_path / "fast.md"
    page.write_text(f"before\n{fast_page.BEGIN}\nold\n{fast_page.END}\nafter\n")
    for _ in range(2):
        fast_page.write_page(record(-0.01, 9), tmp_path)
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert "| x | 9.0x | 90.0 % | +0.0 (-1.0 to +1.0) | 30.0 dB |" in text
        assert "reached by x" in text
    assert (tmp_path / fast_page.PLOT).read_text().startswith("<?xml")
    assert fast_page.BEGIN in (fast_page.DOCS / "fast.md").read_text()


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(micro_model())
    sides: dict[str, fast.Player] = {
        fast.REFERENCE: (generator, {"steps": 3}),
        "cached": (generator, {"steps": 3, "block_cache": 2}),
    }
    drawn: list[tuple[int, str]] = []

    def pictures(player: fast.Player, part: Any) -> np.ndarray:
        drawn.append((len(part), str(player[1].get("block_cache"))))
        return REAL(player, part)

    monkeypatch.setattr(fast, "_pictures", pictures)
    monkeypatch.setattr(fast, "CHUNK", 2)
    monkeypatch.setattr(fast.Judge, "load", lambda: None)
    monkeypatch.setattr(fast, "_right", lambda made, part, judge: made.mean((1, 2, 3)) > 110)
    first = fast.quality("micro", sides, 4, tmp_path)
    assert len(drawn) == 4
    assert first["cached"]["psnr"] < 99
    assert first[fast.REFERENCE]["psnr"] is None
    drawn.clear()
    assert fast.quality("micro", sides, 4, tmp_path) == first
    assert drawn == []
    file = tmp_path / "micro.verdicts.jsonl"
    lines = file.read_text().splitlines()
    assert [json.loads(line)["lever"] for line in lines[:2]] == [fast.REFERENCE, "cached"]
    file.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])  # killed while it wrote
    assert fast.quality("micro", sides, 4, tmp_path) == first
    assert drawn == [(2, "None"), (2, "2")]
    drawn.clear()
    assert fast.quality("micro", sides, 4, tmp_path) == first
    assert drawn == [], "what is written behind half a line counts"
    sides["cached"] = (generator, {"steps": 3, "block_cache": 3})  # another request: made again
    fast.quality("micro", sides, 4, tmp_path)
    assert len(drawn) == 4
