"""``safelight evaluate metrics``: folders in, numbers out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from safelight.cli.main import main
from safelight.data import stilllife
from safelight.data.clip import load_clip
from safelight.data.sources import StillLife, open_source
from safelight.errors import InvalidRequest
from safelight.evaluate import metrics, sets
from safelight.evaluate.features import clip_extractor


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *arguments])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Renders with captions, other renders, and the first ones worn."""
    root = tmp_path_factory.mktemp("sets")
    for name, seed in (("one", 1), ("other", 2), ("worn", 1)):
        source = StillLife("val", seed, 48)
        (root / name).mkdir()
        for i in range(48):
            picture = source.picture(i)
            if name == "worn":
                picture = picture.resize((6, 6)).resize((64, 64))
            picture.save(root / name / f"{i:03d}.png")
            (root / name / f"{i:03d}.txt").write_text(source.captions(i)[0])
    return {p.name: p for p in root.iterdir()}


def test_every_metric_sees_that_worn_pictures_are_worse(folders: dict[str, Path]) -> None:
    clip = load_clip(device="cpu")
    found = {}
    for name in ("one", "worn"):
        rows, bad = sets.compare(open_source(folders[name]), open_source(folders["other"]), clip)
        found[name] = {m.metric: m for m in rows}
        assert [b.count for b in bad] == [0, 0]
    good, worse = found["one"], found["worn"]
    assert list(good) == ["frechet", "kid", "cmmd", "precision", "recall", "clip_score"]
    for name in ("frechet", "kid", "cmmd"):
        assert worse[name].value > 2 * abs(good[name].value), name
    for name in ("precision", "recall", "clip_score"):
        assert worse[name].value < good[name].value, name
    assert len({m.features for m in good.values()}) == 1
    one, other = (clip_extractor(clip)(map(Image.open, sorted(folders[n].glob("*.png"))))
                  for n in ("one", "other"))  # fmt: skip
    assert good["kid"].value == pytest.approx(metrics.kid(one, other, "").value)
    assert good["frechet"].interval is not None


class Means(nn.Module):
    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        return img.float().mean([2, 3]).repeat(1, 683)[:, :2048]


def test_the_command_names_features_and_lists_what_it_could_not_read(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "inception.pt"
    torch.jit.script(Means()).save(str(file))
    made = tmp_path / "made"
    made.mkdir()
    for i in range(12):
        made.joinpath(f"{i}.png").write_bytes((folders["one"] / f"{i:03d}.png").read_bytes())
    (made / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "numbers.json"
    code = run("metrics", str(made), str(folders["other"]), "--inception", str(file),
               "--metric", "kid,cmmd", "-o", str(out), "--json")  # fmt: skip
    assert code == 0
    printed = capsys.readouterr()
    numbers = json.loads(out.read_text())
    assert json.loads(printed.out) == numbers
    assert numbers["unreadable"] == [1, 0]
    assert "1 could not be read" in printed.err
    kid, cmmd = numbers["metrics"]
    assert kid["features"].startswith("inception:inception.pt@")
    assert cmmd["features"].startswith("clip:tiny@")
    assert (kid["pictures"], kid["reference"]) == (12, 48)
    assert kid["interval"] is None  # a single block
    assert np.isfinite(cmmd["interval"]).all()


def test_what_cannot_be_measured_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    clip = load_clip(device="cpu")
    source = open_source(folders["one"])
    with pytest.raises(InvalidRequest, match="no metric 'fid'"):
        sets.compare(source, source, clip, names=["fid"])
    with pytest.raises(InvalidRequest, match="two pictures"):
        sets.compare(source, source, clip, names=["cmmd"], limit=1)
    for i, picture in enumerate(stilllife.render([stilllife.scene(1, i) for i in range(4)], 16)):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    with pytest.raises(InvalidRequest, match="caption"):
        sets.compare(open_source(tmp_path), source, clip, names=["clip-score"])
    rows, _ = sets.compare(open_source(tmp_path), source, clip)
    assert "clip_score" not in [m.metric for m in rows]
    rows, _ = sets.compare(source, source, clip, limit=3)
    assert [m.metric for m in rows] == ["frechet", "kid", "cmmd", "clip_score"]


def test_options_of_the_lists_do_not_slip_through(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--limit", "3", "metrics", str(folders["one"]), str(folders["one"])) == 2
    assert "limit" in capsys.readouterr().err
    assert run("metrics", str(folders["one"]), "nowhere") == 2
    assert run("metrics", str(folders["one"]), str(folders["one"]), "-o", "x.txt") == 2
