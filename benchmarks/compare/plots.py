"""Kept results as pictures and tables in the docs: ``python -m benchmarks.compare --plots``."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import measure
from benchmarks.compare import report
from benchmarks.compare.cases import MODELS, OURS, SIDES, TITLES

DOCS = Path(__file__).parents[2] / "docs"
ASSETS = DOCS / "assets" / "benchmarks"
PAGE = DOCS / "benchmarks.md"
BEGIN, END = "<!-- compare: begin -->", "<!-- compare: end -->"
COLOURS = ("#4c6a92", "#7f9c5b", "#b5763a", "#8a5a83", "#5f8f8f", "#9a9a9a")


def draw(result: Path | None = None) -> int:
    """Draw the newest result of each machine, or one; rewrite the page's section.

    Returns:
        the exit status: 2 where there is no result.
    """
    files = [result] if result else newest(measure.RESULTS)
    if not files:
        print(f"no compare-*.json in {measure.RESULTS}: measure first", file=sys.stderr)
        return 2
    parts = []
    for file in files:
        parts += section(file, ASSETS)
    replace_section(PAGE, "\n".join(parts))
    return 0


def newest(folder: Path) -> list[Path]:
    """The last result of every machine."""
    last: dict[str, Path] = {}
    for file in sorted(folder.glob("compare-*.json")):  # dates sort
        last[re.sub(r"-\d{4}-\d\d-\d\d$", "", file.stem)] = file
    return list(last.values())


def section(file: Path, assets: Path) -> list[str]:
    """One result's drawings, and the Markdown that shows them."""
    import json

    found = report.read(file)
    facts = json.loads(file.read_text(encoding="utf-8"))["machine"]
    machine = re.sub(r"-\d{4}-\d\d-\d\d$", "", file.stem)
    assets.mkdir(parents=True, exist_ok=True)
    parts = [f"### {facts['Processor']}", ""]
    for model in MODELS:
        mine = [r for r in found if r.case.split("-")[0] == model and r.ratio is not None]
        if mine:
            target = assets / f"{machine}-{model}.svg"
            bars(mine, TITLES[model], target)
            parts += [f"![{TITLES[model]}](assets/benchmarks/{target.name})", ""]
    table = report.table(found).replace("\n## ", "\n#### ").replace("## ", "#### ", 1)
    notes = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "Processor")
    warning = "" if all(r.clean for r in found) else "\n**Not clean**: the machine was busy.\n"
    return [*parts, table, report.LEGEND, "", f"{notes}.", warning]


def bars(rows: Sequence[report.Row], title: str, target: Path) -> None:
    """Ratios to ours, a group a case, with the range of the rounds; the line at 1 is ours."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "safelight"  # the same file for the same numbers
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys(row.case for row in rows))
    sides = [s for s in SIDES if s != OURS and any(row.side == s for row in rows)]
    tall = 0.8 / max(1, len(sides))
    figure, axes = plt.subplots(
        figsize=(8, 0.9 + 0.26 * len(sides) * len(cases) + 0.2 * len(cases))
    )
    for k, side in enumerate(sides):
        mine = [row for row in rows if row.side == side]
        places = [cases.index(row.case) + (k - (len(sides) - 1) / 2) * tall for row in mine]
        ratios = [row.ratio or 0.0 for row in mine]
        reach = [
            [ratio - (row.low or ratio) for ratio, row in zip(ratios, mine, strict=True)],
            [(row.high or ratio) - ratio for ratio, row in zip(ratios, mine, strict=True)],
        ]
        colour = COLOURS[k % len(COLOURS)]
        axes.barh(places, ratios, tall, xerr=reach, color=colour, label=SIDES[side],
                  error_kw={"lw": 1, "ecolor": "#333333"})  # fmt: skip
        for place, ratio, far in zip(places, ratios, reach[1], strict=True):
            axes.text(ratio + far, place, f" {ratio:.2f}", va="center", fontsize=7)
    axes.axvline(1, color="#333333", lw=1)
    if max(row.high or 1 for row in rows) > 20:
        axes.set_xscale("log")
    titles = [report.parse_line({"case": case}).title for case in cases]
    axes.set_yticks(range(len(cases)), titles, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds / Safelight's: right of 1 Safelight is faster", fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def replace_section(page: Path, text: str) -> None:
    """Put ``text`` between the page's two marks."""
    whole = page.read_text(encoding="utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} lacks {BEGIN} and {END}")
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
