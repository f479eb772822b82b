"""The sides take turns. One finished case is one line of JSON, so that a killed run goes on.

Sides stay in their processes while others compute. As many as fit into memory share a group; ours
is in every group, since ratios are of one round of one group.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.compare import weights
from benchmarks.compare.cases import EAGER, OURS, Case, memory_gib
from benchmarks.compare.exported import exported_parts
from benchmarks.compare.process import Failed, Process

REST = 0.1
"""Seconds between two sides, in which the workers of the last one fall asleep."""


class Busy(Exception):
    """Something else began to use the processor."""


@dataclass(frozen=True)
class Settings:
    """What a result hangs on; another run with the same goes on where this one stopped."""

    cache: Path
    threads: int
    rounds: int
    force: bool = False
    patience: float = 3600.0
    nice: int = 0
    keep: bool = True
    """Keep exports for other runs."""


ONCE = ("sd.cpp", "sd.cpp-q8")
"""Sides whose process is good for one case: it ends in the middle of a picture."""

IN_TORCH = (OURS, EAGER, "diffusers-compile")
"""Sides that read the model's folder as it is."""

Workers = dict[str, Process]
Line = dict[str, Any]


def groups(case: Case, sides: Sequence[str], available: float) -> list[list[str]]:
    """Sides that are measured together: ours and as many others as memory has room for.

    Args:
        available: GiB. A side that fits in no group gets one with ours alone.
    """
    others = [side for side in sides if side != OURS]
    ours = memory_gib(case, OURS) if OURS in sides else 0.0
    room = available - 1 - ours
    found: list[list[str]] = []
    left = 0.0
    for side in others:
        needs = memory_gib(case, side)
        if not found or needs > left:
            found.append([])
            left = room
        found[-1].append(side)
        left -= needs
    first = [OURS] if OURS in sides else []
    return [first + group for group in found] or [first]


def available_gib() -> float:
    """Memory that is free for us."""
    try:
        text = Path("/proc/meminfo").read_text()
        return int(text.split("MemAvailable:")[1].split()[0]) / 2**20
    except (OSError, IndexError):
        return 16.0


def run(
    cases: Sequence[Case],
    sides: Sequence[str],
    settings: Settings,
    record: Path,
    tell: Callable[[str], None],
) -> list[Line]:
    """Measure what ``record`` does not have yet, a line a case and group.

    Raises:
        Busy: something else uses the processor, and ``force`` is off. What is done is kept.
    """
    done = read(record)
    if record.is_file():  # without the half line that a kill may have left
        whole = record.with_suffix(".part")
        whole.write_text("".join(json.dumps(line) + "\n" for line in done))
        whole.replace(record)
    for model in dict.fromkeys(case.model for case in cases):
        mine = [case for case in cases if case.model == model]
        # Pictures last: what their loop needs stays in a process.
        mine.sort(key=lambda case: (case.kind == "picture", case.kind == "start"))
        largest = max(mine, key=lambda case: memory_gib(case, OURS))
        for group in groups(largest, sides, available_gib()):
            known = {line["case"]: set(line["sides"]) for line in done}
            todo = [case for case in mine if not _measured(case, group, done)]
            if not todo:
                continue
            tell(f"{model}: {', '.join(group)} ({len(todo)} of {len(mine)} cases; {len(known)})")
            workers: Workers = {}
            try:
                for case in todo:
                    line = measured(case, group, workers, settings, tell)
                    done.append(line)
                    with record.open("a") as file:
                        file.write(json.dumps(line) + "\n")
            finally:
                for worker in workers.values():
                    worker.end()
    return done


def _measured(case: Case, group: Sequence[str], done: Sequence[Line]) -> bool:
    return any(
        line["case"] == case.key and set(group) <= set(line["sides"]) for line in done
    )  # a failed side is measured too: the reason stands there


def read(record: Path) -> list[Line]:
    """The lines so far; one that was cut off by a kill is left out."""
    found = []
    if record.is_file():
        for text in record.read_text().splitlines():
            try:
                found.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return found


def measured(
    case: Case,
    group: Sequence[str],
    workers: Workers,
    settings: Settings,
    tell: Callable[[str], None],
) -> Line:
    """One case on every side of a group, in turns."""
    sides: dict[str, dict[str, Any]] = {side: {} for side in ["sgemm", *group]}
    for side in sides:
        attempt(sides[side], lambda side=side: exported(side, case, settings))
    if EAGER not in group:
        referred(case, settings)
    clean = watch(settings)
    if case.kind == "start":
        times, share = started(case, sides, workers, settings)
    else:
        for side, row in sides.items():
            if "failed" not in row:
                attempt(row, lambda s=side, r=row: prepared(s, r, case, workers, settings))
        agreement(case, sides, settings)
        times, share = turns(case, sides, workers, settings)
    for side, row in sides.items():
        if ("failed" in row or side in ONCE) and (old := workers.pop(side, None)) is not None:
            old.end()
        if "failed" not in row:
            row["seconds"] = times[side]
    tell(f"  {case.title}: " + ", ".join(_short(side, row) for side, row in sides.items()))
    return {
        "case": case.key,
        "sides": sides,
        "clean": clean and share <= measure.BUSY,
        "others": round(share, 2),
        "threads": settings.threads,
    }


def attempt(row: dict[str, Any], call: Callable[[], None]) -> None:
    """Keep a failure as the side's row."""
    try:
        call()
    except Failed as error:
        row["failed"] = str(error)


def watch(settings: Settings) -> bool:
    """Whether the machine is quiet.

    Raises:
        Busy: it is not, and that was not allowed.
    """
    try:
        return measure.quiet(force=settings.force, seconds=1.0)
    except SystemExit as error:
        raise Busy(str(error)) from None


def exported(side: str, case: Case, settings: Settings) -> None:
    """Files first, in a process that ends: what exporting takes is no side's memory."""
    if side == "sgemm":
        return
    made = weights.made(case.model, settings.cache)
    if made and (side in IN_TORCH or exported_parts(side, case, settings.cache)):
        return
    worker = _spawn(side, case, settings)
    try:
        worker.ask("export", case)
    finally:
        worker.end()


def referred(case: Case, settings: Settings) -> None:
    """What the others must agree with, where diffusers is in another group or not asked for."""
    keep = _kept(case, EAGER, settings)
    if not keep.is_file():
        worker = _spawn(EAGER, case, settings)
        try:
            for verb in ("export", "load"):
                worker.ask(verb, case)
            worker.ask("prepare", case, keep=str(keep))
        except Failed:
            pass  # then there is nothing to agree with, and the table says so
        finally:
            worker.end()


def prepared(
    side: str, row: dict[str, Any], case: Case, workers: Workers, settings: Settings
) -> None:
    """Load where that has not happened, get ready for the shape, answer once."""
    if side not in workers:
        workers[side] = _spawn(side, case, settings)
        row["load_seconds"] = workers[side].ask("load", case)["seconds"]
    reply = workers[side].ask("prepare", case, keep=str(_kept(case, side, settings)))
    row["prepare_seconds"], row["peak_mib"] = reply["seconds"], reply["peak_mib"]


def turns(
    case: Case, sides: Mapping[str, dict[str, Any]], workers: Workers, settings: Settings
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every round by side, the order turning; and the cores that others used."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    began, before, own = time.perf_counter(), measure.busy_ticks(), _ticks(workers)
    for k in range(settings.rounds):
        alive = [side for side, row in sides.items() if "failed" not in row]
        for side in alive[k % len(alive) :] + alive[: k % len(alive)]:
            row = sides[side]

            def once(side: str = side, row: dict[str, Any] = row) -> None:
                reply = workers[side].ask("run")
                times[side].append(reply["seconds"])
                row["peak_mib"] = max(row["peak_mib"], reply["peak_mib"])

            attempt(row, once)
            time.sleep(REST)
    spent = time.perf_counter() - began
    others = measure.busy_ticks() - before - (_ticks(workers) - own)
    return times, max(0.0, others / os.sysconf("SC_CLK_TCK") / max(spent, 1e-9))


def started(
    case: Case, sides: Mapping[str, dict[str, Any]], workers: Workers, settings: Settings
) -> tuple[dict[str, list[float]], float]:
    """From the command to the first guided step, a process each time; the first round fills the
    caches of the disk and is not counted."""
    for worker in workers.values():
        worker.end()
    workers.clear()
    times: dict[str, list[float]] = {side: [] for side in sides}
    for k in range(-1, settings.rounds):
        alive = [side for side, row in sides.items() if "failed" not in row]
        for side in alive[k % len(alive) :] + alive[: k % len(alive)]:
            row = sides[side]

            def once(side: str = side, row: dict[str, Any] = row, k: int = k) -> None:
                worker = _spawn(side, case, settings)
                try:
                    worker.ask("load", case)
                    keep = str(_kept(case, side, settings)) if k < 0 else None
                    reply = worker.ask("prepare", case, keep=keep)
                    spent = time.perf_counter() - worker.began
                    if side == "sgemm":
                        spent = worker.ask("run")["seconds"]
                finally:
                    worker.end()
                if k >= 0:
                    times[side].append(spent)
                row["peak_mib"] = max(row.get("peak_mib", 0.0), reply["peak_mib"])

            attempt(row, once)
    agreement(case, sides, settings)
    return times, 0.0  # children that have ended cannot be told from others


def agreement(case: Case, sides: Mapping[str, dict[str, Any]], settings: Settings) -> None:
    """How far every result is from diffusers' in float32, eager; that one is kept for the groups
    that come later."""
    reference = _kept(case, EAGER, settings)
    for side, row in sides.items():
        file = _kept(case, side, settings)
        if "failed" in row or side in ("sgemm", EAGER) or not file.is_file():
            continue
        if reference.is_file():
            row |= apart(np.load(file), np.load(reference))
        file.unlink()


def apart(answer: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Largest difference, absolutely and by the expected spread; PSNR of pictures (of 255, or of
    pixels in [-1, 1])."""
    if answer.shape != expected.shape:
        return {"max_abs": float("inf")}
    peak = 255.0 if expected.dtype == np.uint8 else 2.0
    a, b = answer.astype(np.float64), expected.astype(np.float64)
    gap = np.abs(a - b)
    found = {"max_abs": float(gap.max()), "relative": float(gap.max() / max(b.std(), 1e-30))}
    if b.ndim == 4 and 3 in (b.shape[1], b.shape[-1]):
        error = float(np.mean(gap**2))
        found["psnr"] = 10 * float(np.log10(peak**2 / max(error, 1e-30)))
    return found


def _spawn(side: str, case: Case, settings: Settings) -> Process:
    return Process(
        side,
        case.model,
        settings.cache,
        threads=settings.threads,
        patience=settings.patience,
        nice=settings.nice,
    )


def _kept(case: Case, side: str, settings: Settings) -> Path:
    return settings.cache / f"answer-{case.key}-{side}.npy"


def _ticks(workers: Workers) -> int:
    return sum(worker.ticks() for worker in workers.values()) + int(
        sum(os.times()[:2]) * os.sysconf("SC_CLK_TCK")
    )


def _short(side: str, row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return f"{side} failed ({row['failed'][:60]})"
    return f"{side} {measure.median_text(row['seconds'])}" if row.get("seconds") else side
