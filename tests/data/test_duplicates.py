"""Planted duplicates are found, each by the test meant for it; different scenes are not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from safelight.cli.main import main
from safelight.data.duplicates import DedupReport, find_duplicates, near_embeddings
from safelight.data.hashing import distance, frequencies, mirrored, near_pairs, perceptual_hash
from safelight.data.sources import StillLife, open_source

SCENES = 40


def jpeg(image: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty scenes, and copies of some; copies' names say of which, and how."""
    root = tmp_path_factory.mktemp("planted")
    world = StillLife("train", 5, SCENES)
    scenes = [world.picture(i) for i in range(SCENES)]
    files = {f"{i:02d}.png": png(scene) for i, scene in enumerate(scenes)}
    for i in (0, 1, 2):
        files[f"{i:02d}-exact.png"] = files[f"{i:02d}.png"]
    for i in (2, 3, 4):
        files[f"{i:02d}-quality.jpg"] = jpeg(scenes[i], 85)
    files["05-small.png"] = png(scenes[5].resize((48, 48), Image.Resampling.BICUBIC))
    files["06-large.png"] = png(scenes[6].resize((128, 128), Image.Resampling.BICUBIC))
    files["07-mirror.png"] = png(ImageOps.mirror(scenes[7]))
    files["broken.png"] = files["00.png"][:100]
    files["plain.png"] = png(Image.new("RGB", (64, 64), (9, 90, 190)))
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def test_exact_copies(planted: Path) -> None:
    report = find_duplicates(open_source(planted), ["exact"])
    assert report.drop == ["00.png", "01.png", "02.png"]  # "00-exact.png" comes first
    assert report.found == {"exact": 3}
    assert [Path(e["where"]).name for e in report.bad_listed] == ["broken.png"]
    assert report.kept + len(report.drop) + report.bad == report.samples


def test_copies_of_other_size_format_and_quality(planted: Path) -> None:
    report = find_duplicates(open_source(planted), ["exact", "perceptual"])
    pairs = {tuple(sorted((g.keep, d.key))): d.method for g in report.groups for d in g.drop}
    assert pairs == {
        ("00-exact.png", "00.png"): "exact",
        ("01-exact.png", "01.png"): "exact",
        ("02-exact.png", "02.png"): "exact",
        ("02-exact.png", "02-quality.jpg"): "perceptual",
        ("03-quality.jpg", "03.png"): "perceptual",
        ("04-quality.jpg", "04.png"): "perceptual",
        ("05-small.png", "05.png"): "perceptual",
        ("06-large.png", "06.png"): "perceptual",
    }
    assert {"05-small.png", "06.png"} <= set(report.drop)  # the larger one stays
    assert report.flat == 1


def test_mirror_images_when_asked(planted: Path) -> None:
    report = find_duplicates(open_source(planted), ["perceptual"], mirrored=True)
    groups = [{g.keep, *(d.key for d in g.drop)} for g in report.groups]
    assert {"07-mirror.png", "07.png"} in groups
    assert len(groups) == 8


def test_near_embeddings_find_what_means_the_same(planted: Path) -> None:
    from safelight.data.clip import load_clip

    clip = load_clip(device="cpu")
    source = open_source(planted)
    report = find_duplicates(source, ["embedding"], cosine=0.98, embed=clip.pictures, clip="tiny")
    dropped = {tuple(sorted((g.keep[:2], d.key[:2]))) for g in report.groups for d in g.drop}
    assert {("00", "00"), ("01", "01"), ("02", "02"), ("06", "06")} <= dropped
    assert report.clip == "tiny"
    with pytest.raises(ValueError, match="embed"):
        find_duplicates(source, ["embedding"])


def test_who_stays_is_directly_near_whom_it_replaces() -> None:
    """A chain of three near neighbours, whose ends are far apart: only the middle goes."""
    angles = np.radians([0, 10, 20])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    report = find_duplicates(
        StillLife("train", 5, 3),
        ["embedding"],
        cosine=float(np.cos(np.radians(11))),
        embed=lambda _: vectors,
    )
    assert report.drop == ["train-5-0000001"]
    assert report.kept == 2


def test_the_frequencies_are_those_of_scipy() -> None:
    image = StillLife("train", 5, 1).picture(0)
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    expected = scipy.fft.dctn(grey, norm="ortho")[1:17, 1:17]
    low = frequencies(image)
    np.testing.assert_allclose(low, expected, atol=1e-9)
    turned = frequencies(ImageOps.mirror(image))
    assert low is not None
    np.testing.assert_allclose(mirrored(low), turned, atol=1e-9)
    hashed = perceptual_hash(image)
    assert hashed is not None
    np.testing.assert_array_equal(
        np.unpackbits(hashed).astype(bool).reshape(16, 16), expected > np.median(expected)
    )


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 7, 16, 31]))
def test_near_pairs_are_those_of_the_whole_table(seed: int, limit: int) -> None:
    """Random hashes with planted neighbours at the limit, beyond it, and equal ones."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (12, 32), dtype=np.uint8)
    rows = [base, base[:3]]
    for apart in (limit, limit + 1):
        planes = np.unpackbits(base, axis=1)
        for row in planes:
            row[rng.choice(256, apart, replace=False)] ^= 1
        rows.append(np.packbits(planes, axis=1))
    hashes = rng.permutation(np.concatenate(rows))
    table = distance(hashes[:, None], hashes[None])
    expected = {(i, j, int(table[i, j])) for i, j in np.argwhere(np.triu(table <= limit, 1))}
    found = list(near_pairs(hashes, limit))
    assert set(found) == expected
    assert len(found) == len(expected)


def test_embedding_pairs_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safelight.data.duplicates._BLOCK", 7)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = vectors @ vectors.T
    expected = {(i, j) for i, j in np.argwhere(np.triu(table >= 0.9, 1)).tolist()}
    assert {(i, j) for i, j, _ in near_embeddings(vectors, 0.9)} == expected


def test_the_command_and_its_list(planted: Path, tmp_path: Path, capsys) -> None:
    drop, report, sheet = tmp_path / "drop.txt", tmp_path / "r.json", tmp_path / "sheet.png"
    arguments = ["data", "dedup", str(planted), "--method", "exact", "--method", "perceptual"]
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--drop", str(drop), "--report", str(report), "--sheet", str(sheet)])
    assert not leaving.value.code
    captured = capsys.readouterr()
    assert "8 of 51 pictures are copies" in captured.out
    assert "broken.png" in captured.err
    saved = DedupReport.model_validate_json(report.read_text())
    assert drop.read_text().split() == saved.drop
    assert Image.open(sheet).width > 800
    clean = open_source(planted, exclude=drop)
    assert len(clean) == 43
    assert find_duplicates(clean).drop == []
    with pytest.raises(SystemExit) as leaving:
        main(["data", "dedup", str(planted), "--method", "best"])
    assert leaving.value.code == 2
    assert "method: unknown 'best'" in capsys.readouterr().err
