"""Safelight and every peer that is installed, side by side, on the same weights.

    python -m benchmarks.compare --plan
    python -m benchmarks.compare --budget 120
    python -m benchmarks.compare --against benchmarks/results/FILE.json --tolerance 0.1
    python -m benchmarks.compare --smoke --force

Sides take turns; a killed run goes on with the same command. Docs: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks import measure
from benchmarks.compare import cases, driver, report
from benchmarks.compare.cases import EAGER, KINDS, MODELS, OURS, SIDES, Case

NEEDS = {
    EAGER: "diffusers",
    "diffusers-compile": "diffusers",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
    "sd.cpp": "stable_diffusion_cpp",
    "sd.cpp-q8": "stable_diffusion_cpp",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a ratio fell, 2 where nothing could be compared, 3 where the
    machine is busy."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.plots:
        from benchmarks.compare import plots

        return plots.draw(options.result)
    if options.result is not None:
        if options.against is None:
            parser.error("--result goes with --against or --plots")
        return gate(report.read(options.result), options.against, options.tolerance)
    try:
        chosen = _cases(options)
    except ValueError as error:
        parser.error(str(error))
    sides = [side for side in SIDES if side == OURS or side in options.peers]
    kept, dropped = planned(chosen, sides, options)
    if options.plan:
        return 0
    if not kept:
        parser.error("no case is left: choose others, or a larger budget")
    return _measure(kept, sides, options, dropped)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=[m for m in MODELS if m != "micro"], default=[])
    add("--kinds", nargs="+", choices=KINDS, default=[])
    add("--sizes", nargs="+", type=int, default=[], help="pixels a side")
    add("--batches", nargs="+", type=int, default=[], help="pictures")
    add("--cases", nargs="+", default=[], help="by key, also ones not listed: sd15-step-384-x2")
    peers = [side for side in SIDES if side != OURS]
    add("--peers", nargs="*", choices=peers, default=peers, help="default: all")
    add("--rounds", type=int, default=5, help="runs of each side that count")
    add("--threads", type=int, default=os.cpu_count(), help="of every side")
    add("--budget", type=float, help="minutes: the most telling cases that fit")
    add("--plan", action="store_true", help="show what would be done, and stop")
    add("--smoke", action="store_true", help="a rehearsal at micro size, in a minute or two")
    add("--force", action="store_true", help="beside a busy process too; the result says so")
    add("--cache", type=Path, default=cache_place(), help="weights, exports, unfinished runs")
    add("--drop", action="store_true", help="delete weights and exports at the end")
    add("--patience", type=float, default=3600, help="seconds that one answer may take")
    add("--nice", type=int, default=0, help="of the sides' processes")
    add("--output", type=Path, default=measure.RESULTS, help="folder of the result")
    add("--no-write", action="store_true", help="print the table only")
    add("--again", action="store_true", help="forget an unfinished run with these options")
    add("--against", type=Path, help="an earlier result: exit with 1 where a ratio fell")
    add("--tolerance", type=float, default=0.1, help="by how much a ratio may fall (0.1: a tenth)")
    add("--result", type=Path, help="with --against or --plots: measure nothing, take this file")
    add("--plots", action="store_true", help="draw the newest results for the docs")
    return parser


def cache_place() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "safelight" / "compare"


def _cases(options: argparse.Namespace) -> list[Case]:
    return cases.choose(
        models=options.models,
        kinds=options.kinds,
        sizes=options.sizes,
        batches=options.batches,
        keys=options.cases,
        rehearsal=options.smoke,
    )


def planned(
    chosen: Sequence[Case], sides: Sequence[str], options: argparse.Namespace
) -> tuple[list[Case], list[Case]]:
    """Print what will be done and what it takes; leave out what the budget has no room for."""
    rate, installed = _rate(), [side for side in sides if absent(side) is None]
    room = driver.available_gib()
    kept: list[Case] = []
    dropped: list[Case] = []
    total = 0.0
    print(f"{'case':26} {'minutes':>8} {'GFLOP':>8} {'GiB':>6}  groups (estimates)")
    for case in chosen:
        takes = sum(
            cases.seconds(case, side, rate=rate, rounds=options.rounds) for side in installed
        )
        if options.budget is not None and total + takes > 60 * options.budget:
            dropped.append(case)
            continue
        kept.append(case)
        total += takes
        groups = driver.groups(case, installed, room)
        most = max(sum(cases.memory_gib(case, side) for side in group) for group in groups)
        print(
            f"{case.key:26} {takes / 60:8.1f} {cases.flops(case) / 1e9:8.0f} {most:6.1f}  "
            f"{len(groups)}"
        )
    print(
        f"About {total / 60:.0f} minutes in all, at {rate / 1e9:.0f} GFLOP/s just now; "
        f"{room:.1f} GiB of memory are free, and up to {_disk(kept):.0f} GiB of disk are used in "
        f"{options.cache}."
    )
    for side in sides:
        if (reason := absent(side)) is not None:
            print(f"{side}: {reason}")
    if dropped:
        print(f"Beyond the budget: {', '.join(case.key for case in dropped)}")
    return kept, dropped


def absent(side: str) -> str | None:
    """Why a side cannot be measured here; None where nothing is missing."""
    needs = NEEDS.get(side)
    if needs is None or find_spec(needs) is not None:
        return None
    return f"not installed: {needs} (pip install -e '.[peers]')"


def _rate() -> float:
    """FLOP/s of a matrix product just now."""
    import numpy as np

    a = np.ones((1024, 1024), np.float32)
    _ = a @ a
    began = time.perf_counter()
    for _k in range(4):
        _ = a @ a
    return 4 * 2 * 1024**3 / (time.perf_counter() - began)


def _disk(kept: Sequence[Case]) -> float:
    return 4.5 * sum(cases.weights_gib(model) for model in {case.model for case in kept})


def _measure(
    kept: Sequence[Case],
    sides: Sequence[str],
    options: argparse.Namespace,
    dropped: Sequence[Case],
) -> int:
    options.cache.mkdir(parents=True, exist_ok=True)
    settings = driver.Settings(
        cache=options.cache.resolve(),
        threads=options.threads,
        rounds=options.rounds,
        force=options.force,
        patience=options.patience,
        nice=options.nice,
    )
    record = options.cache / f"run-{_name(kept, sides, options)}.jsonl"
    if options.again:
        record.unlink(missing_ok=True)
    if record.is_file():
        print(f"Going on with {record}.", file=sys.stderr)
    else:
        for old in options.cache.glob("answer-*.npy"):
            old.unlink()
    here = [side for side in sides if absent(side) is None]
    try:
        lines = driver.run(
            kept, here, settings, record, lambda text: print(text, file=sys.stderr, flush=True)
        )
    except driver.Busy as busy:
        print(f"{busy} What is measured so far is kept; the same command goes on.", file=sys.stderr)
        return 3
    missing = {side: {"failed": absent(side)} for side in sides if side not in here}
    lines = [{**line, "sides": {**line["sides"], **missing}} for line in lines]
    found = report.rows(lines)
    if options.no_write or options.smoke:
        print(report.markdown(found, report.versions() | {"Threads": str(options.threads)}))
    else:
        stem = measure.file_stem("compare")
        file = report.write(lines, options.output, stem, threads=options.threads)
        print(file.with_suffix(".md").read_text(encoding="utf-8"))
    if not options.smoke or not any(row.failed for row in found):
        record.unlink()
    if options.drop:
        shutil.rmtree(options.cache)
    if dropped:
        print(f"Beyond the budget: {', '.join(case.key for case in dropped)}")
    return gate(found, options.against, options.tolerance) if options.against else 0


def _name(kept: Sequence[Case], sides: Sequence[str], options: argparse.Namespace) -> str:
    """Of the same run again: what its numbers hang on."""
    hangs = [list(sides), options.rounds, options.threads, options.smoke, options.budget]
    if options.budget is None:  # with one, the cases hang on how fast the machine was
        hangs.append([case.key for case in kept])
    return hashlib.sha256(json.dumps(hangs).encode()).hexdigest()[:12]


def gate(found: Sequence[report.Row], against: Path, tolerance: float) -> int:
    """Compare by ratio with an earlier result."""
    worse, apart, compared = report.fallen(found, report.read(against), tolerance)
    for line in apart:
        print(f"not compared: {line}")
    for line in worse:
        print(f"FELL: {line}")
    print(f"{compared} ratios compared, {len(worse)} fell by more than {100 * tolerance:.0f} %.")
    if worse:
        return 1
    return 0 if compared else 2


if __name__ == "__main__":
    raise SystemExit(main())
