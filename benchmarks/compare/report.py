"""Lines of a run as a table, as files, and as a gate for the next run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measure
from benchmarks.compare.cases import MODELS, OURS, SIDES, TITLES, Case, flops, parse
from benchmarks.compare.driver import Line

PACKAGES = {
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
    "stable-diffusion.cpp": "stable-diffusion-cpp-python",
}


class Row(NamedTuple):
    """One side of one case."""

    case: str
    side: str
    seconds: float | None
    """Median."""
    ratio: float | None
    """Median over rounds of its seconds / ours in the same round: above 1 we are faster."""
    low: float | None
    high: float | None
    share: float | None
    """Of the machine's matrix rate, by the plain networks' arithmetic; None for a cold start."""
    peak_mib: float | None
    max_abs: float | None
    relative: float | None
    """``max_abs`` in standard deviations of the reference."""
    psnr: float | None
    failed: str
    clean: bool


def rows(lines: Sequence[Line]) -> list[Row]:
    """Every side of every case once, in the order of the tables. A case that ran in several groups
    has ours several times: the first is shown, each ratio is of its own group."""
    found: dict[tuple[str, str], Row] = {}
    for line in lines:
        case = parse_line(line)
        sides = line["sides"]
        rate = _rate(case, sides.get("sgemm", {}))
        ours = sides.get(OURS, {}).get("seconds")
        for side, row in sides.items():
            key = (line["case"], side)
            if side != "sgemm" and (key not in found or found[key].failed):
                found[key] = _row(line, case, side, row, ours, rate)
    order = list(SIDES)
    cases = list(dict.fromkeys(line["case"] for line in lines))
    return sorted(found.values(), key=lambda r: (cases.index(r.case), order.index(r.side)))


def parse_line(line: Line) -> Case:
    """A line's case, with its steps."""
    case = parse(line["case"])
    return case if case.model != "micro" else Case(case.model, case.kind, case.size, case.batch, 3)


def _rate(case: Case, row: Mapping[str, Any]) -> float | None:
    """FLOP/s of the machine's matrix product in the same rounds."""
    if not row.get("seconds"):
        return None
    side = 256 if case.model == "micro" else 4096
    return 2 * side**3 / statistics.median(row["seconds"])


def _row(
    line: Line,
    case: Case,
    side: str,
    row: Mapping[str, Any],
    ours: Sequence[float] | None,
    rate: float | None,
) -> Row:
    seconds = row.get("seconds") if "failed" not in row else None
    median = statistics.median(seconds) if seconds else None
    ratios = []
    if seconds and ours and side != OURS:
        ratios = [theirs / own for theirs, own in zip(seconds, ours, strict=False)]
    share = None
    if median and rate and case.kind != "start":
        share = flops(case) / median / rate
    return Row(
        case=line["case"],
        side=side,
        seconds=median,
        ratio=statistics.median(ratios) if ratios else None,
        low=min(ratios, default=None),
        high=max(ratios, default=None),
        share=share,
        peak_mib=row.get("peak_mib"),
        max_abs=row.get("max_abs"),
        relative=row.get("relative"),
        psnr=row.get("psnr"),
        failed=row.get("failed", ""),
        clean=line["clean"],
    )


# -- words ----------------------------------------------------------------------------------------

HEAD = (
    "| case | side | seconds | ratio | range | of sgemm | peak MiB | max abs | in std | PSNR |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
LEGEND = """\
Ratio: the side's seconds / ours, median over the rounds of one run, in which the sides took
turns; above 1 Safelight is faster. Of sgemm: arithmetic of the networks as they are written over
the seconds, as a share of this machine's 4096³ float32 matrix product measured in the same
rounds; a side that needs less arithmetic shows more. Peak: resident memory of the side's process
during the case, mapped pages included. Max abs, in std, PSNR: against diffusers in float32,
eager. A cold start is from the command to the first guided step, exports and disk caches warm."""


def table(found: Sequence[Row]) -> str:
    """All rows as Markdown, a table a model."""
    parts = []
    for model in MODELS:
        mine = [row for row in found if row.case.split("-")[0] == model]
        if not mine:
            continue
        parts += [f"## {TITLES[model]}", "", HEAD]
        last = ""
        for row in mine:
            title = "" if row.case == last else parse_line({"case": row.case}).title
            last = row.case
            parts.append(_line(row, title))
        parts.append("")
    return "\n".join(parts)


def _line(row: Row, title: str) -> str:
    unclean = "" if row.clean else " (unclean)"
    start = f"| {title}{unclean if title else ''} | {SIDES[row.side]} |"
    if row.failed or row.seconds is None:
        return f"{start} {_cell(row.failed or 'not measured')} | | | | | | | |"
    if row.side == OURS:
        ratio, span = "1", ""
    elif row.ratio is None:
        ratio, span = "", ""
    else:
        ratio, span = f"**{row.ratio:.2f}**", f"{row.low:.2f}–{row.high:.2f}"
    share = "" if row.share is None else f"{100 * row.share:.0f} %"
    gap = "" if row.max_abs is None else f"{row.max_abs:.1e}"
    spread = "" if row.relative is None else f"{row.relative:.1e}"
    psnr = "" if row.psnr is None else f"{min(row.psnr, 200):.0f} dB"
    peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    return (
        f"{start} {measure.seconds_text(row.seconds)} | {ratio} | {span} | {share} | {peak} "
        f"| {gap} | {spread} | {psnr} |"
    )


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def versions() -> dict[str, str]:
    """The machine and the packages."""
    facts = measure.machine()
    for name, package in PACKAGES.items():
        try:
            facts[name] = version(package)
        except PackageNotFoundError:
            facts[name] = "not installed"
    return facts


def markdown(found: Sequence[Row], facts: Mapping[str, str]) -> str:
    """The page of a run."""
    notes = [f"{key}: {value}." for key, value in facts.items()]
    if not all(row.clean for row in found):
        notes.append("**Not clean**: something else used the processor in the cases marked so.")
    head = "# Safelight and its peers, side by side"
    return "\n".join([head, "", table(found), LEGEND, "", *notes]) + "\n"


def write(lines: Sequence[Line], folder: Path, stem: str, *, threads: int) -> Path:
    """Keep a run as Markdown and JSON; returns the JSON."""
    found = rows(lines)
    facts = versions() | {"Threads": str(threads)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.md").write_text(markdown(found, facts), encoding="utf-8")
    record = {
        "schema": 1,
        "machine": facts,
        "clean": all(row.clean for row in found),
        "rows": [row._asdict() for row in found],
        "lines": list(lines),
    }
    file = folder / f"{stem}.json"
    file.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    return file


def read(file: Path) -> list[Row]:
    """The rows that :func:`write` kept."""
    return [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]


# -- the gate -------------------------------------------------------------------------------------


def fallen(
    new: Sequence[Row], old: Sequence[Row], tolerance: float
) -> tuple[list[str], list[str], int]:
    """What fell, by ratio and never by seconds.

    Returns:
        ratios that fell by more than ``tolerance`` (0.1: a tenth) and sides of ours that fail now;
        what could not be compared; how many ratios were.
    """
    now = {(row.case, row.side): row for row in new}
    worse, apart, compared = [], [], 0
    for before in old:
        row = now.get((before.case, before.side))
        name = f"{before.case}, {before.side}"
        if before.side == OURS:
            if row is not None and row.failed and not before.failed:
                worse.append(f"{name}: fails now: {row.failed}")
        elif before.ratio is None:
            continue
        elif row is None or row.ratio is None:
            reason = "not measured" if row is None or not row.failed else row.failed
            apart.append(f"{name}: {reason}")
        else:
            compared += 1
            if row.ratio < before.ratio * (1 - tolerance):
                worse.append(f"{name}: {before.ratio:.2f} before, {row.ratio:.2f} now")
    return worse, apart, compared
