"""docs/fast.md's measured part and its plot, from what :mod:`benchmarks.fast` kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PLOT = DOCS / "fast.md", "assets/benchmarks/fast.svg"
BEGIN, END = "<!-- measured: python -m benchmarks.fast -->", "<!-- end of what was measured -->"
PEER = "diffusers, 50 steps"


def write_page(record: Mapping[str, Any], docs: Path = DOCS) -> None:
    """Put the table into the page, and the plot beside it."""
    page = docs / PAGE.name
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    drawn = bool(record["speed"])
    if drawn:
        plot(record, docs / PLOT)
    page.write_text(f"{before}{BEGIN}\n{table(record, drawn)}\n{END}{after}", encoding="utf-8")


def met(record: Mapping[str, Any]) -> list[str]:
    """Levers that reach the target at either batch: how much faster, with the accuracy kept."""
    target = record["target"]
    return [
        name
        for name, lever in record["levers"].items()
        if lever["interval"][0] > target["margin"]
        and any(ratio(record, name, batch) >= target["speed"] for batch in record["speed"])
    ]


def ratio(record: Mapping[str, Any], name: str, batch: str) -> float:
    """How many times faster than diffusers' 50 steps."""
    return record["speed"][batch].get(name, {"ratio": {PEER: [0.0]}})["ratio"][PEER][0]


def table(record: Mapping[str, Any], drawn: bool) -> str:
    """Markdown: every lever with its speed, accuracy and distance."""
    facts, batches = record["machine"], list(record["speed"])
    lines = [
        f"`{record['model']}`, {record['count']} prompts of the list `paired`, "
        f"{facts['Processor']}, torch {facts['torch']}, diffusers {facts['diffusers']}, "
        f"{facts.get('Threads', '?')} threads.",
        "",
        *(["![Speed and accuracy of each fast mode](" + PLOT + ")", ""] if drawn else []),
        "| | " + "".join(f"faster than diffusers, {n} at once | " for n in batches)
        + "accuracy | against 50 steps of PLMS | PSNR |",
        "|---|" + "---|" * (len(batches) + 3),
    ]  # fmt: skip
    for name, lever in record["levers"].items():
        low, high = (100 * v for v in lever["interval"])
        speeds = "".join(f"{ratio(record, name, n):.1f}x | " for n in batches)
        decibels = "" if lever["psnr"] is None else f"{lever['psnr']:.1f} dB"
        lines.append(
            f"| {name} | {speeds}{100 * lever['accuracy']:.1f} % "
            f"| {100 * lever['difference']:+.1f} ({low:+.1f} to {high:+.1f}) | {decibels} |"
        )
    good = met(record)
    said = f"reached by {', '.join(good)}" if good else "**not reached**"
    lines += [
        "",
        f"Target: at least {record['target']['speed']:g} times faster than diffusers' 50 steps "
        f"with the lower end of the interval above {100 * record['target']['margin']:g} points: "
        f"{said}.",
        *record["notes"],
    ]
    if not record["clean"]:
        lines.append("**Not clean**: something else used the processor meanwhile.")
    return "\n".join(lines)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Speed against accuracy, one panel a batch, with the levers that none beats joined."""
    from matplotlib.figure import Figure

    batches, target = list(record["speed"]), record["target"]
    figure = Figure(figsize=(6 * len(batches), 4.5), layout="constrained")
    for axes, batch in zip(
        figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True
    ):
        points = []
        for name, lever in record["levers"].items():
            x, y = ratio(record, name, batch), 100 * lever["difference"]
            if not x:
                continue
            points.append((x, y))
            down = y - 100 * lever["interval"][0]
            axes.errorbar(x, y, yerr=[[down], [100 * lever["interval"][1] - y]], fmt="o", ms=4)
            axes.annotate(name, (x, y), fontsize=6, xytext=(4, 3), textcoords="offset points")
        best = [p for p in points if not any(q[0] >= p[0] and q[1] > p[1] for q in points)]
        axes.plot(*zip(*sorted(best), strict=True), lw=0.8, color="grey")
        axes.axhline(100 * target["margin"], ls=":", lw=0.8, color="grey")
        axes.axvline(target["speed"], ls=":", lw=0.8, color="grey")
        axes.set_title(f"{batch} at once")
        axes.set_xlabel("times faster than diffusers, 50 steps")
        axes.set_ylabel("accuracy against 50 steps of PLMS, points")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
