"""``safelight verify``: the marks in a picture's file, and what each one proves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli import show
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from safelight.provenance import Finding, Report

_TITLES = {
    "xmp": "XMP mark",
    "settings": "settings",
    "parameters": "A1111 text",
    "c2pa": "C2PA",
    "watermark": "watermark",
}


def command(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="A PNG, JPEG or WebP file.")],
    trust: Annotated[
        Path | None,
        typer.Option("--trust", help="PEM certificates of the authorities whose word counts."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Read every mark in a picture's file, and say what it proves and what it does not.

    The exit code is 1 where a check fails: the file was changed after it was marked or signed.
    """
    from safelight import provenance
    from safelight.provenance.verify import read_authorities

    authorities = b"" if trust is None else read_authorities(trust)
    report = provenance.verify(picture, authorities=authorities)
    if as_json:
        show.document(_document(report))
    else:
        typer.echo(_words(report))
    if report.failed:
        raise SafelightError(f"{picture} was changed after it was marked.")


def _document(report: Report) -> dict[str, Any]:
    return {
        "schema": 1,
        "picture": report.picture,
        "format": report.format,
        "size": list(report.size),
        "declared": report.declared,
        "failed": list(report.failed),
        "summary": report.summary,
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
    }


def _words(report: Report) -> str:
    width, height = report.size
    lines = [f"{report.picture}: {report.format}, {width}x{height}", report.summary]
    for finding in report.findings:
        lines += ["", *_finding(finding)]
    return "\n".join(lines)


def _finding(finding: Finding) -> list[str]:
    lines = [f"{_TITLES[finding.mark]:11} {finding.says}"]
    if finding.found:
        lines.append(f"{'':11} Proves {finding.proves}")
        lines.append(f"{'':11} Does not prove {finding.not_proven}")
    elif finding.not_proven:
        lines.append(f"{'':11} {finding.not_proven}")
    return lines
