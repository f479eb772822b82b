"""What every benchmark shares: alternating runs, medians, ratios, the machine, the files.

Times move with the machine and the hour; ratios measured side by side do not. So both sides run
in turns, each round gives one ratio, and the median of the ratios is what is reported, with its
spread. A benchmark refuses to start while something else uses the processor.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BUSY = 0.1
"""Share of one core that others may use."""

Timed = Mapping[str, list[float]]
"""Seconds of every round, by side."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    name: str
    ours: float
    """Median seconds."""
    peer: float
    """Median seconds of the peer's fastest way."""
    peer_name: str
    ratio: float
    """Median over rounds of peer / ours: above 1 we are faster."""
    low: float
    high: float
    """The smallest and the largest ratio of a round."""
    rounds: int
    target: float | None = None
    difference: str = ""
    """How far the two results are apart."""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        return None if self.target is None else self.ratio >= self.target


@dataclass
class Report:
    """One benchmark's rows, and what a reader must know to believe them."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    clean: bool = True
    """False: run with ``--force`` while something else used the processor."""

    def markdown(self) -> str:
        """The table and the notes."""
        facts = machine()
        lines = [
            f"# {self.title}",
            "",
            "| | ours | peer | peer is | ratio | range | target | difference |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            target = "" if row.target is None else f"{row.target:g} {'✓' if row.met else '✗'}"
            lines.append(
                f"| {row.name} | {seconds_text(row.ours)} | {seconds_text(row.peer)} "
                f"| {row.peer_name} | **{row.ratio:.2f}** | {row.low:.2f}–{row.high:.2f} "
                f"| {target} | {row.difference} |"
            )
        lines += ["", "Ratio: peer / ours, median over rounds run in turns; above 1 we are faster."]
        lines += [f"{key}: {value}." for key, value in facts.items()]
        lines += self.notes
        if not self.clean:
            lines.append("**Not clean**: something else used the processor meanwhile.")
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        """Print the table; keep it, and the same as JSON, in ``benchmarks/results/``."""
        text = self.markdown()
        print(text)
        stem = file_stem(self.name)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{stem}.md").write_text(text, encoding="utf-8")
        record = {**asdict(self), "schema": 1, "machine": machine()}
        (RESULTS / f"{stem}.json").write_text(json.dumps(record, indent=2, ensure_ascii=False))


def options(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """The command line that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="runs of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both sides")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--no-write", action="store_true", help="keep no files")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count this process's seconds on a processor instead: for a busy machine, with "
        "--threads 1",
    )
    return parser


def clock(options: argparse.Namespace, report: Report) -> Callable[[], float]:
    """The clock that the command line asks for."""
    if not options.processor_time:
        return time.perf_counter
    report.notes.append("Times are seconds on a processor, all threads together.")
    return time.process_time


def quiet(*, force: bool = False, seconds: float = 2.0) -> bool:
    """Whether nothing else uses the processor.

    Raises:
        SystemExit: something does, and ``force`` was not given.
    """
    share = _others(seconds)
    if share is None or share <= BUSY:
        return True
    if not force:
        raise SystemExit(
            f"Something else uses {share:.1f} cores: the numbers would mean little. "
            "Wait, or give --force."
        )
    print(f"warning: something else uses {share:.1f} cores", file=sys.stderr)
    return False


def in_turns(
    sides: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Timed:
    """Run every side once a round, the order turning, and time each call.

    Args:
        warm_up: rounds before, not timed.
    """
    names, times = list(sides), {name: [] for name in sides}
    for k in range(-warm_up, rounds):
        turned = names[k % len(names) :] + names[: k % len(names)]
        for name in turned:
            began = clock()
            sides[name]()
            if k >= 0:
                times[name].append(clock() - began)
    return times


def compare(
    name: str,
    times: Timed,
    *,
    ours: str = "safelight",
    target: float | None = None,
    difference: str = "",
) -> Row:
    """Our side against the fastest of the others."""
    peers = [side for side in times if side != ours]
    best = min(peers, key=lambda side: statistics.median(times[side]))
    ratios = [b / a for a, b in zip(times[ours], times[best], strict=True)]
    return Row(
        name=name,
        ours=statistics.median(times[ours]),
        peer=statistics.median(times[best]),
        peer_name=best,
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        rounds=len(ratios),
        target=target,
        difference=difference,
    )


def machine() -> dict[str, str]:
    """What the numbers hang on, without the machine's name or anybody's."""
    facts = {
        "Processor": f"{_chip()}, {os.cpu_count()} cores",
        "System": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
    }
    for package in ("torch", "diffusers", "transformers", "safelight"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    if "torch" in sys.modules:
        import torch

        facts["Threads"] = str(torch.get_num_threads())
    return facts


def file_stem(name: str) -> str:
    """Of a result's files: the benchmark, the processor and today."""
    chip = re.sub(r"[^a-z0-9]+", "-", f"{_chip()} {os.cpu_count()} cores".lower()).strip("-")
    return f"{name}-{chip}-{datetime.date.today().isoformat()}"


def _chip() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return re.sub(r"\((R|TM)\)", "", found[1]).strip() if found else platform.machine()


def _others(seconds: float) -> float | None:
    """Cores that other processes use just now; None where the system does not say."""
    try:
        before = busy_ticks()
        time.sleep(seconds)
        return (busy_ticks() - before) / seconds / os.sysconf("SC_CLK_TCK")
    except OSError:
        return None


def busy_ticks() -> int:
    """Clock ticks that all processors have worked since the start."""
    user, nice, system, _idle, _wait, interrupts, soft, *_ = (
        int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return user + nice + system + interrupts + soft


def seconds_text(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def median_text(times: Sequence[float]) -> str:
    """Median and range of seconds, for a note."""
    low, high = seconds_text(min(times)), seconds_text(max(times))
    return f"{seconds_text(statistics.median(times))} ({low}–{high})"
