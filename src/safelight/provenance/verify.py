"""Every mark in a picture's file, and what each one proves and does not.

No mark is stronger than its weakest reader thinks: text can be written, changed and removed by
anyone. Only a signature shows that a file is unchanged, and only a known signer shows by whom.
A missing mark never shows that a person made a picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelight.errors import InvalidRequest
from safelight.provenance import signing
from safelight.provenance.again import LOSSY
from safelight.provenance.record import KIND, SCHEMA, parse_parameters, pixel_digest
from safelight.store import manifests, pictures, xmp

INSTALL = "pip install 'safelight[sign]'"


@dataclass(frozen=True)
class Finding:
    """One kind of mark.

    Args:
        mark: ``xmp``, ``settings``, ``parameters``, ``c2pa`` or ``watermark``.
        found: it is there; None: not looked for, or unreadable.
        checked: True or False where something in it could be checked, None where nothing could.
        says: what it says.
        proves: what follows from it.
        not_proven: what does not.
        details: for programs.
    """

    mark: str
    found: bool | None
    says: str
    checked: bool | None = None
    proves: str = "nothing."
    not_proven: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a file says about where it comes from."""

    picture: str
    format: str
    size: tuple[int, int]
    findings: tuple[Finding, ...]

    def __getitem__(self, mark: str) -> Finding:
        return next(finding for finding in self.findings if finding.mark == mark)

    @property
    def declared(self) -> bool:
        """Some mark in the file says that a machine made it."""
        return any(f.found and f.details.get("machine_made") for f in self.findings)

    @property
    def failed(self) -> tuple[str, ...]:
        """Marks whose check failed: pixels or bytes were changed after they were written."""
        return tuple(f.mark for f in self.findings if f.checked is False)

    @property
    def summary(self) -> str:
        """One sentence."""
        if self.failed:
            return (
                "The file was changed after it was marked "
                f"({', '.join(self.failed)}): do not rely on what it says."
            )
        if not self.declared:
            return (
                "Nothing in the file says that a machine made it. That proves nothing: marks are "
                "easily removed."
            )
        signed = self["c2pa"].details.get("state")
        if signed == "trusted":
            return "The file says that a machine made it, signed by someone you trust."
        if signed == "valid":
            return "The file says that a machine made it, signed by someone unknown."
        return "The file says that a machine made it. Nothing in it is signed."


def verify(picture: str | Path, *, authorities: bytes = b"") -> Report:
    """Read all marks of a picture.

    Args:
        authorities: PEM certificates of those whose signatures count as known.

    Raises:
        InvalidRequest: no such file, or not a picture.
    """
    path = Path(picture)
    image = pictures.open_picture(path, field="picture", background=None)
    found = pictures.read_metadata(path)
    data = path.read_bytes()
    format = _format(data)
    return Report(
        str(picture),
        format,
        image.size,
        (
            _xmp(found.xmp),
            _settings(found.json, "" if format in LOSSY else pixel_digest(image)),
            _parameters(found),
            _c2pa(data, authorities),
            Finding(
                "watermark",
                None,
                "not looked for: this version writes and reads no invisible watermark.",
                not_proven="docs/provenance.md has the measurements behind that.",
            ),
        ),
    )


def _format(data: bytes) -> str:
    if data.startswith(b"\xff\xd8"):
        return "JPEG"
    if data[:4] == b"RIFF":
        return "WEBP"
    return "PNG" if data.startswith(b"\x89PNG") else "other"


def _xmp(packet: str | None) -> Finding:
    if packet is None:
        return Finding("xmp", False, "no XMP packet.")
    address = xmp.source_type(packet)
    if address is None:
        return Finding("xmp", False, "an XMP packet without a digital source type.")
    code = address.rstrip("/").rsplit("/", 1)[-1]
    tool = xmp.creator_tool(packet)
    meaning = xmp.MACHINE_MADE.get(code, "not a code that speaks of machines")
    return Finding(
        "xmp",
        True,
        f"digital source type {code}: {meaning}" + (f"; written by {tool}." if tool else "."),
        proves="that whoever wrote the file declares this, in a way other programs understand.",
        not_proven="that it is true, or who wrote it: the text is not signed.",
        details={"source_type": address, "machine_made": code in xmp.MACHINE_MADE, "tool": tool},
    )


def _settings(text: str | None, pixels: str) -> Finding:
    if text is None:
        return Finding("settings", False, "no settings of Safelight's.")
    try:
        record = json.loads(text)
        known = record["kind"] == KIND
    except (ValueError, KeyError, TypeError):
        known, record = False, {}
    if not known:
        return Finding("settings", None, "a text under Safelight's name that it did not write.")
    if record.get("schema") != SCHEMA:
        says = f"settings of schema {record.get('schema')}; this version reads {SCHEMA}."
        return Finding("settings", None, says, details={"machine_made": True})
    model = record.get("model") or {}
    made = f"made by safelight {record.get('safelight')} with {model.get('name')}"
    seed = (record.get("request") or {}).get("seed")
    same = None if not (pixels and record.get("pixels")) else record["pixels"] == pixels
    details = {"machine_made": True, "record": record}
    doubt = (
        "that they made this picture: the text is not signed. safelight replay makes it again; "
        "the same pixels are strong evidence."
    )
    if same is False:
        return Finding(
            "settings", True, f"{made}, seed {seed}; the pixels are others.", False,
            "that the pixels were changed after the settings were written, or the settings are "
            "another picture's.", doubt, details,
        )  # fmt: skip
    if same:
        return Finding(
            "settings", True, f"{made}, seed {seed}; the pixels are those it names.", True,
            "that pixels and settings were written together and neither has changed alone.",
            doubt, details,
        )  # fmt: skip
    return Finding(
        "settings", True, f"{made}, seed {seed}; pixels cannot be compared in this format.",
        None, "that whoever wrote the file declares these settings.", doubt, details,
    )  # fmt: skip


def _parameters(found: pictures.Metadata) -> Finding:
    others = sorted(found.other)
    if not found.parameters:
        says = "no A1111 text" + (
            f"; other programs' texts: {', '.join(others)}." if others else "."
        )
        return Finding("parameters", False, says, details={"other": others})
    prompt, _, options = parse_parameters(found.parameters)
    version = options.get("Version", "an unnamed program")
    return Finding(
        "parameters",
        True,
        f"A1111's text, by {version}: {_short(prompt)!r}.",
        proves="that whoever wrote the file declares this prompt and these settings.",
        not_proven="that they made the picture: the text is not signed.",
        details={"machine_made": True, "text": found.parameters, "other": others},
    )


def _short(text: str, length: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def _c2pa(data: bytes, authorities: bytes) -> Finding:
    if not signing.available():
        if not manifests.has_manifest(data):
            return Finding("c2pa", False, "no C2PA manifest.")
        return Finding("c2pa", None, f"a C2PA manifest, not checked: {INSTALL}.")
    signed = signing.check(data, authorities)
    if signed is None:
        return Finding("c2pa", False, "no C2PA manifest.")
    codes = {kind.rsplit("/", 1)[-1] for kind in signed.source_types}
    details = {
        "state": signed.state,
        "signer": signed.signer,
        "source_types": list(signed.source_types),
        "problems": list(signed.problems),
        "machine_made": bool(codes & set(xmp.MACHINE_MADE)),
        "manifest": dict(signed.manifest),
    }
    declares = f"declares {', '.join(sorted(codes)) or 'no digital source type'}"
    truth = "that what it declares is true"
    if signed.state == "trusted":
        return Finding(
            "c2pa", True, f"signed by {signed.signer}; {declares}.", True,
            "that the holder of that certificate, which an authority you named vouches for, signed "
            "exactly this file.", f"{truth}; nor when it was signed.", details,
        )  # fmt: skip
    if signed.state == "valid":
        return Finding(
            "c2pa", True, f"signed in the name of {signed.signer}; {declares}.", True,
            "that the file has not changed since it was signed.",
            f"by whom: anyone can make a certificate in any name; nor {truth}.", details,
        )  # fmt: skip
    return Finding(
        "c2pa", True, f"a broken signature: {', '.join(signed.problems) or 'invalid'}.", False,
        "that the file or its manifest was changed after it was signed.",
        "what was changed, or by whom.", details,
    )  # fmt: skip


def read_authorities(path: str | Path) -> bytes:
    """PEM certificates from a file.

    Raises:
        InvalidRequest: unreadable, or it holds none.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequest("trust", f"cannot read {path}: {error.strerror}.") from error
    if b"-----BEGIN CERTIFICATE-----" not in data:
        raise InvalidRequest("trust", f"{path} holds no PEM certificate.")
    return data
