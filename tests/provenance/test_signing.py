"""C2PA with one's own key. A manifest of ours is read by the C2PA library."""

# pyright: reportMissingImports=false
from __future__ import annotations

import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from micro_models import toy_model
from provenance import signing_toys
from safelight import provenance
from safelight.cli.main import main
from safelight.errors import InvalidRequest, MissingExtra
from safelight.generate import Generator
from safelight.model import Model
from safelight.provenance import Signer, signing
from safelight.request import ImageResult

needs_c2pa = pytest.mark.skipif(not signing.available(), reason="the extra sign is not installed")
ENDINGS = [".png", ".jpg", ".webp"]
TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@pytest.fixture(scope="module")
def result() -> ImageResult:
    return Generator(toy_model()).generate("a cone", seed=7, steps=1)[0]


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> signing_toys.Credentials:
    return signing_toys.make(tmp_path_factory.mktemp("papers"))


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(a) for a in arguments])
    return int(leaving.value.code or 0)


@needs_c2pa
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("metadata", [True, False])
def test_a_signed_picture(
    result: ImageResult,
    papers: signing_toys.Credentials,
    tmp_path: Path,
    ending: str,
    metadata: bool,
) -> None:
    import c2pa

    signer = Signer.from_files(papers.key, papers.certificates)
    path = tmp_path / f"a{ending}"
    provenance.save(result, path, metadata=metadata, signer=signer)
    with c2pa.Reader(None, io.BytesIO(path.read_bytes())) as reader:
        document = json.loads(reader.json())
    assert document["validation_state"] == "Valid"
    (active,) = document["manifests"].values()
    (action,) = active["assertions"][0]["data"]["actions"]
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", TRAINED)
    assert "thumbnail" not in active
    if metadata:  # the settings are still there
        assert provenance.read(path).record == result.metadata
    plain = provenance.save(result, tmp_path / f"b{ending}", metadata=metadata)
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(plain)))

    unknown = provenance.verify(path)
    assert unknown["c2pa"].details["state"] == "valid"
    assert "anyone can make a certificate" in unknown["c2pa"].not_proven
    known = provenance.verify(path, authorities=papers.authority.read_bytes())
    assert known["c2pa"].details["state"] == "trusted"
    assert known["c2pa"].details["signer"] == "A. Signer, Toy"
    assert known["xmp"].found
    assert not known.failed


@needs_c2pa
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_changed_file_is_found(
    result: ImageResult, papers: signing_toys.Credentials, tmp_path: Path, ending: str
) -> None:
    signer = Signer.from_files(papers.key, papers.certificates)
    path = provenance.save(result, tmp_path / f"a{ending}", signer=signer)
    data = bytearray(path.read_bytes())
    place = data.index(b"trainedAlgorithmicMedia</Iptc")
    data[place : place + 7] = b"untrain"
    if ending == ".png":  # with a checksum that fits, as a forger would
        start = data.rindex(b"iTXt", 0, place)
        (length,) = struct.unpack_from(">I", data, start - 4)
        body = bytes(data[start : start + 4 + length])
        struct.pack_into(">I", data, start + 4 + length, zlib.crc32(body))
    path.write_bytes(data)
    report = provenance.verify(path, authorities=papers.authority.read_bytes())
    assert report["c2pa"].details["state"] == "invalid"
    assert "c2pa" in report.failed
    assert "do not rely" in report.summary
    assert run("verify", path) == 1


@needs_c2pa
@pytest.mark.parametrize("kind", ["p384", "ed25519", "rsa"])
def test_every_kind_of_key(result: ImageResult, tmp_path: Path, kind: str) -> None:
    papers = signing_toys.make(tmp_path, kind)
    signer = Signer.from_files(papers.key, papers.certificates)
    path = provenance.save(result, tmp_path / "a.png", signer=signer)
    assert provenance.verify(path)["c2pa"].details["state"] == "valid"
    assert papers.key.read_text() not in repr(signer)


@needs_c2pa
def test_what_cannot_sign_is_refused_before_any_work(
    papers: signing_toys.Credentials, tmp_path: Path
) -> None:
    other = signing_toys.make(tmp_path / "other")
    past = signing_toys.make(tmp_path / "past", days=-1)
    junk = tmp_path / "junk.pem"
    junk.write_text("hello")
    for key, chain, problem in (
        (tmp_path / "none.pem", papers.certificates, "sign-key: cannot read"),
        (junk, papers.certificates, "sign-key: .* not a private key"),
        (papers.key, junk, "sign-cert: .* holds no PEM"),
        (papers.key, other.certificates, "sign-cert: .* not that of the key"),
        (past.key, past.certificates, "sign-cert: cannot sign"),
    ):
        with pytest.raises(InvalidRequest, match=problem):
            Signer.from_files(key, chain)


@needs_c2pa
def test_encrypted_and_self_signed(papers: signing_toys.Credentials, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as pem

    private = pem.load_pem_private_key(papers.key.read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        private.private_bytes(
            pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.BestAvailableEncryption(b"secret")
        )
    )
    with pytest.raises(InvalidRequest, match="encrypted"):
        Signer.from_files(locked, papers.certificates)
    alone = signing_toys.make(tmp_path / "alone", alone=True)
    with pytest.raises(InvalidRequest, match="self-signed"):
        Signer.from_files(alone.key, alone.certificates)


@needs_c2pa
def test_the_commands(
    papers: signing_toys.Credentials,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Model, "load", lambda name="tiny", **options: toy_model())
    monkeypatch.chdir(tmp_path)
    sign = ("--sign-key", papers.key, "--sign-cert", papers.certificates)
    assert run("generate", "a cone", "--steps", 1, "-o", "a.png", *sign) == 0
    assert run("verify", "a.png", "--trust", papers.authority) == 0
    out = capsys.readouterr().out
    assert "signed by someone you trust" in out
    assert "A. Signer" in out


def test_without_the_library_a_manifest_is_named_not_checked(
    result: ImageResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from store.test_xmp import with_manifest

    monkeypatch.setitem(sys.modules, "c2pa", None)
    path = tmp_path / "a.png"
    path.write_bytes(with_manifest("PNG"))
    report = provenance.verify(path)
    assert report["c2pa"].found is None
    assert "safelight[sign]" in report["c2pa"].says
    assert provenance.verify(provenance.save(result, path))["c2pa"].found is False
    with pytest.raises(MissingExtra, match="sign"):
        Signer.from_files("a.pem", "b.pem")


def test_one_half_of_a_pair_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "a cone", "--sign-key", "a.pem") == 2
    assert "sign-cert: is missing" in capsys.readouterr().err
