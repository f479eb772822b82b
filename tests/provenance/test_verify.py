"""``safelight verify``: what each mark proves, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import safelight
from micro_models import toy_model
from safelight import provenance
from safelight.cli.main import main
from safelight.errors import InvalidRequest
from safelight.generate import Generator
from safelight.model import Model
from safelight.request import ImageResult
from safelight.store import pictures, xmp

ENDINGS = [".png", ".jpg", ".webp"]
MARKS = ["xmp", "settings", "parameters", "c2pa", "watermark"]


@pytest.fixture(scope="module")
def result() -> ImageResult:
    return Generator(toy_model()).generate("a red cone", seed=7, steps=1)[0]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(a) for a in arguments])
    return int(leaving.value.code or 0)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_picture_of_ours(result: ImageResult, tmp_path: Path, ending: str) -> None:
    report = provenance.verify(provenance.save(result, tmp_path / f"a{ending}"))
    assert [finding.mark for finding in report.findings] == MARKS
    assert report["xmp"].details["source_type"] == xmp.TRAINED
    assert report["settings"].checked is (True if ending == ".png" else None)
    assert report["settings"].details["record"] == result.metadata
    assert "'a red cone'" in report["parameters"].says
    assert report["c2pa"].found is False
    assert report["watermark"].found is None
    assert report.declared
    assert not report.failed
    assert "Nothing in it is signed" in report.summary


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_metadata_keeps_the_mark(result: ImageResult, tmp_path: Path, ending: str) -> None:
    path = safelight.save(result, tmp_path / f"a{ending}", metadata=False)
    found = pictures.read_metadata(path)
    assert (found.parameters, found.json) == (None, None)
    for secret in (b"cone", b"parameters", b"safelight\0"):
        assert secret not in path.read_bytes()
    report = provenance.verify(path)
    assert [f.mark for f in report.findings if f.found] == ["xmp"]
    assert report.declared


def test_a_picture_without_marks_is_not_called_genuine(tmp_path: Path) -> None:
    pictures.save(tmp_path / "a.png", Image.new("RGB", (8, 8)), xmp=b"")
    report = provenance.verify(tmp_path / "a.png")
    assert not any(finding.found for finding in report.findings)
    assert not report.declared
    assert "proves nothing" in report.summary


def test_changed_pixels_are_found(result: ImageResult, tmp_path: Path) -> None:
    assert result.image is not None
    pixels = np.asarray(result.image).copy()
    pixels[0, 0, 0] ^= 1
    changed = result.replace(image=Image.fromarray(pixels))
    report = provenance.verify(provenance.save(changed, tmp_path / "a.png"))
    assert report.failed == ("settings",)
    assert report["settings"].checked is False
    assert "do not rely" in report.summary
    assert run("verify", tmp_path / "a.png") == 1


@pytest.mark.parametrize(
    ("code", "declared"),
    [
        ("trainedAlgorithmicMedia", True),
        ("compositeWithTrainedAlgorithmicMedia", True),
        ("digitalCapture", False),
        ("nonsense", False),
    ],
)
def test_other_source_types(tmp_path: Path, code: str, declared: bool) -> None:
    packet = xmp.packet(f"{xmp.CODES}{code}", "Camera & Co")
    pictures.save(tmp_path / "a.png", Image.new("RGB", (8, 8)), xmp=packet)
    report = provenance.verify(tmp_path / "a.png")
    assert report.declared is declared
    assert code in report["xmp"].says
    assert "Camera & Co" in report["xmp"].says


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ("{broken", None),
        ("[]", None),
        ('{"kind": "other"}', None),
        ('{"kind": "safelight.picture", "schema": 99}', None),
        ('{"kind": "safelight.picture", "schema": 1}', True),
    ],
)
def test_settings_that_cannot_be_read(tmp_path: Path, record: str, found: bool | None) -> None:
    pictures.save(tmp_path / "a.png", Image.new("RGB", (8, 8)), "", record)
    assert provenance.verify(tmp_path / "a.png")["settings"].found is found


def test_other_programs_texts_are_named(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_text("workflow", "{}")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=texts)
    report = provenance.verify(tmp_path / "a.png")
    assert "workflow" in report["parameters"].says
    assert not report.declared


def test_what_is_not_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(InvalidRequest, match="not a picture"):
        provenance.verify(tmp_path / "a.png")
    with pytest.raises(InvalidRequest, match="no file"):
        provenance.verify(tmp_path / "none.png")


# -- the command ----------------------------------------------------------------------------------


def test_words(result: ImageResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = provenance.save(result, tmp_path / "a.png")
    assert run("verify", path) == 0
    out = capsys.readouterr().out
    assert out.count("Does not prove") == 3  # of the three marks that are there
    for words in ("trainedAlgorithmicMedia", "not signed", "no C2PA manifest", "watermark"):
        assert words in out


def test_json(result: ImageResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = provenance.save(result, tmp_path / "a.png")
    assert run("verify", path, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["declared"] is True
    assert document["failed"] == []
    assert [finding["mark"] for finding in document["findings"]] == MARKS
    assert {"found", "checked", "says", "proves", "not_proven"} <= set(document["findings"][0])


def test_authorities_must_be_certificates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", tmp_path / "a.png", "--trust", tmp_path / "none.pem") == 2
    assert "trust: cannot read" in capsys.readouterr().err
    (tmp_path / "a.pem").write_text("hello")
    assert run("verify", tmp_path / "a.png", "--trust", tmp_path / "a.pem") == 2


def test_everything_that_generate_writes_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "load", lambda name="tiny", **options: toy_model())
    monkeypatch.chdir(tmp_path)
    kept: list[Path] = []
    write = pictures.write

    def spy(path: str | Path, data: bytes) -> None:
        write(path, data)
        kept.append(Path(path))
        assert provenance.verify(path)["xmp"].found

    monkeypatch.setattr(pictures, "write", spy)
    arguments = ("--steps", 2, "--count", 2, "--grid", "--preview", 1, "--no-metadata", "-o", "d")
    assert run("generate", "a cone", "-s", 7, *arguments) == 0
    assert {"00001-7.png", "00002-8.png", "00001-7-grid.png"} <= {path.name for path in kept}
    assert any("preview" in path.name for path in kept)
    for path in Path("d").iterdir():
        assert provenance.verify(path)["xmp"].found
        assert provenance.verify(path)["settings"].found is False
