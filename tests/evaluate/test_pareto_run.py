"""The cards' figure from end to end on the shipped models: killed half-way, gone on, plotted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from safelight.cli import evaluate
from safelight.generate import Generator

DYING = """
import os, signal, sys
from typer.testing import CliRunner
from safelight.cli import evaluate
from safelight.generate import Generator

calls, generate = iter(range(100)), Generator.generate

def mortal(*arguments, **named):
    if next(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(*arguments, **named)

Generator.generate = mortal
CliRunner().invoke(evaluate.app, sys.argv[1:])
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Two shipped models at two scales on four captions of a COCO made here, in two steps."""
    folder, file = tmp_path / "val2017", tmp_path / "captions_val2017.json"
    folder.mkdir()
    images, annotations = [], []
    for k, words in enumerate(("a red cube", "a blue sphere", "a green cone", "a yellow cylinder")):
        name = f"{k:012d}.jpg"
        noise = np.random.default_rng(k).integers(0, 256, (48, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
        images.append({"id": k, "file_name": name, "height": 48, "width": 80})
        annotations.append({"id": 9 - k, "image_id": k, "caption": words})
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return [
        *("pareto", "-m", "tiny", "-m", "tiny-v", "--scales", "1.5,4", "--count", "4"),
        *("--steps", "2", "--size", "64", "--batch", "2", "--distance", "kid"),
        *("--coco", str(file), "--images", str(folder)),
    ]


def test_the_figure_of_two_shipped_models_goes_on_where_it_was_killed(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-c", DYING, *arguments, "-o", str(out)]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    assert len((out / "points.jsonl").read_text().splitlines()) == 2, "both of the first model"
    assert not (out / "pareto.png").exists()

    made: list[tuple[str, int]] = []
    generate = Generator.generate

    def counted(self, prompts, **wishes):  # type: ignore[no-untyped-def]
        made.append((self.model.spec.name, len(prompts)))
        return generate(self, prompts, **wishes)

    monkeypatch.setattr(Generator, "generate", counted)
    result = CliRunner().invoke(evaluate.app, [*arguments, "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert made == [("tiny-v", 2)] * 3, "the half of a point that was drawn is not drawn again"
    lines = [json.loads(line) for line in (out / "points.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    words = (out / "pareto.md").read_text()
    assert words.count("\n| tiny |") == words.count("\n| tiny-v |") == 2
    with Image.open(out / "pareto.png") as figure:
        assert len(figure.convert("L").getcolors(256) or []) > 20, "something is drawn"

    whole = tmp_path / "whole"
    result = CliRunner().invoke(evaluate.app, [*arguments, "-o", str(whole)])
    assert result.exit_code == 0, result.output
    assert len(made) == 3 + 8
    expected = [json.loads(line) for line in (whole / "points.jsonl").read_text().splitlines()]
    scores = [[p["clip_score"]["value"] for p in points] for points in (lines, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=0.01)
    assert len(set(scores[1])) == 4, "each point has pictures of its own"
