"""Whether memory grows with every picture: ``python -m benchmarks.leak``.

Makes tiny pictures one after the other in one process, every kind of ending among them, and
writes down after each ten what memory is resident and, with glibc, how much of it is in use: the
rest is free and kept for the next picture. There are 64 prompts; each is read once before the
counting begins, because prompts are remembered (up to a bound). Growth is what a straight line
through the second half says. Writes ``benchmarks/results/leak-*.json``. Takes minutes, and is not
part of the test suite.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

import safelight
from benchmarks import measure
from safelight.generate import Cancel, Generator
from safelight.request import Outcome

EVERY = 10
PROMPTS = 64


def resident() -> float:
    """Resident memory of this process, in MiB (its peak, where the system tells no more)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


class _Malloc(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in _names.split()]


def in_use() -> float | None:
    """What the main heap and mapped blocks hold, in MiB; None where the system does not say."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    ask.restype = _Malloc
    found = ask()
    return (found.uordblks + found.hblkhd) / 2**20


def prompt(k: int) -> str:
    """One of 64."""
    colours, shapes = ("red", "green", "blue", "yellow"), ("cube", "sphere", "cone", "cylinder")
    return f"a {colours[k % 4]} {shapes[k // 4 % 4]} on top of a {colours[k // 16 % 4]} sphere"


def make(generator: Generator, k: int, steps: int) -> str:
    """Picture ``k``: other words and another seed each; some are cancelled, some run dry."""
    words = prompt(k)
    if k % 10 == 7:
        cancel = Cancel()
        cancel.set()
        return str(generator.generate(words, seed=k, steps=steps, cancel=cancel)[0].outcome)
    if k % 10 == 8:
        return _dry(generator, words, k, steps)
    (result,) = generator.generate(words, seed=k, steps=steps)
    assert result.outcome == Outcome.ok, result.message
    return str(result.outcome)


def _dry(generator: Generator, words: str, seed: int, steps: int) -> str:
    """Once memory runs out in the middle, and the cheaper plan takes over."""
    runtime, first = generator.model.runtime, iter([True])
    predict = runtime.predict

    def fail_once(rows: object) -> torch.Tensor:
        held = torch.zeros(2**20)  # must not be kept alive by the error
        if next(first, False):
            raise torch.OutOfMemoryError(f"planted, holding {held.numel()} numbers")
        return predict(rows)  # type: ignore[arg-type]

    runtime.predict = fail_once  # type: ignore[method-assign]
    try:
        (result,) = generator.generate(words, seed=seed, steps=steps)
    finally:
        del runtime.predict
    assert result.outcome == Outcome.ok, result.message
    assert result.notices, "the shortage was not told"
    return "ok on the cheaper plan"


def look(count: int) -> tuple[int, float, float | None]:
    """Pictures made, memory resident, and memory in use; printed too."""
    gc.collect()
    used = in_use()
    row = (count, round(resident(), 2), None if used is None else round(used, 2))
    print(f"{row[0]:5} pictures  {row[1]:8.2f} MiB resident, {row[2]} in use", flush=True)
    return row


def main() -> None:
    """Run, print, and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.count < 8 * EVERY:
        parser.error(f"--count: at least {8 * EVERY}")
    generator = safelight.load("tiny", device="cpu")
    loaded = round(resident(), 2)
    for k in range(PROMPTS):
        generator.generate(prompt(k), seed=k, steps=1)
    began, endings = time.monotonic(), {}
    memory = [look(0)]
    for k in range(options.count):
        ending = make(generator, k, options.steps)
        endings[ending] = endings.get(ending, 0) + 1
        if (k + 1) % EVERY == 0:
            memory.append(look(k + 1))
    late = np.array([row[:2] for row in memory if row[0] >= options.count / 2])
    slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0])
    machine = measure.machine()
    record = {
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "machine": machine,
        "pictures": options.count,
        "steps": options.steps,
        "endings": endings,
        "seconds": round(time.monotonic() - began, 1),
        "resident_mib_when_loaded": loaded,
        "pictures_resident_in_use_mib": memory,
        "second_half_kib_a_picture": round(slope * 1024, 2),
        "second_half_growth_mib": round(float(late[-1, 1] - late[0, 1]), 2),
    }
    print(
        json.dumps(
            {k: v for k, v in record.items() if k != "pictures_resident_in_use_mib"}, indent=1
        )
    )
    slug = re.sub(r"[^a-z0-9]+", "-", machine["Processor"].lower()).strip("-")
    output = options.output or measure.RESULTS / f"leak-{slug}-{record['date']}.json"
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
