"""Peak memory, measured in processes of their own, against what ``safelight plan`` predicts.

    python -m benchmarks.memory [--models tiny small] [--fit]

Every case is a process that loads the model, makes pictures in two steps and tells the largest
resident memory it had. The table has the prediction beside it. ``--fit`` finds the constants of
:mod:`safelight.runtime.estimate` by least squares and says how far they leave each case.
Memory does not hang on who else uses the processor, so this runs on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measure
from benchmarks.compare import weights
from benchmarks.compare.__main__ import cache_place
from benchmarks.compare.cases import MODELS

WITHIN = 0.15
SIZES = {
    "tiny": ((128, 256, 384, 512), (1, 2, 4, 8)),
    "small": ((256, 512), (1, 2)),
    "sd15": ((256, 512), (1, 2)),
    "sd21": ((256, 512), (1, 2)),
}
"""Sizes and counts of every model: 28 cases."""

CHILD = """
import json, sys
from pathlib import Path
folder, size, count, plain, threads = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
from safelight.generate import Generator
from safelight.model import Model
from safelight.runtime import PLAIN, prepare
model = Model.load(folder, device="cpu")
if plain == "plain":
    model.runtime = prepare(model, PLAIN)
results = Generator(model).generate(
    "a red cube on top of a blue sphere", seed=7, count=int(count), steps=2,
    width=int(size), height=int(size),
)
text = Path("/proc/self/status").read_text()
peak = int(text.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"peak": peak, "pictures": len(results), "fused": model.runtime.plan.fused}))
"""


class Measured(NamedTuple):
    """One case, in bytes."""

    model: str
    size: int
    count: int
    fused: bool
    peak: int
    predicted: int

    @property
    def error(self) -> float:
        """Of the prediction: 0.1 is a tenth too much."""
        return self.predicted / self.peak - 1


def main() -> int:
    """Status 1 where a prediction is further off than 15 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[], help="only these")
    parser.add_argument("--counts", nargs="+", type=int, default=[], help="only these")
    parser.add_argument("--plans", nargs="+", choices=("fast", "plain"), default=["fast", "plain"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cache", type=Path, default=cache_place())
    parser.add_argument("--fit", action="store_true", help="find the constants anew")
    parser.add_argument("--no-write", action="store_true", help="keep no files")
    options = parser.parse_args()
    found = []
    for model in options.models:
        sizes, counts = SIZES[model]
        for plan in options.plans:
            for size in [s for s in sizes if s in (options.sizes or sizes)]:
                for count in [c for c in counts if c in (options.counts or counts)]:
                    found.append(case(model, size, count, plan, options))
                    print(line(found[-1]), flush=True)
    if options.fit:
        for fused in sorted({each.fused for each in found}):
            print(json.dumps({"fused": fused, **fit([e for e in found if e.fused == fused])}))
    off = [each for each in found if abs(each.error) > WITHIN]
    print(f"{len(found) - len(off)} of {len(found)} within {100 * WITHIN:.0f} %.")
    if not options.no_write:
        write(found)
    return 1 if off else 0


def case(model: str, size: int, count: int, plan: str, options: argparse.Namespace) -> Measured:
    """Measure one case in a process, and predict it."""
    options.cache.mkdir(parents=True, exist_ok=True)
    folder = weights.folder(model, options.cache)
    words = [sys.executable, "-c", CHILD, str(folder), str(size), str(count), plan]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*words, str(options.threads)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{model} {size} x{count} failed:\n{done.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Measured(
        model, size, count, told["fused"], told["peak"],
        predicted(model, size, count, fused=told["fused"]).peak,
    )  # fmt: skip


def predicted(model: str, size: int, count: int, *, fused: bool) -> Any:
    """What the planner says."""
    from types import SimpleNamespace

    import torch

    from safelight.generate.generator import micro_batch
    from safelight.runtime.estimate import estimate
    from safelight.runtime.plan import PLAIN, everything

    spec = MODELS[model]
    stand_in: Any = SimpleNamespace(spec=spec, device=torch.device("cpu"))
    together = micro_batch(stand_in, [SimpleNamespace(width=size, height=size)])  # type: ignore[list-item]
    plan = everything() if fused else PLAIN
    return estimate(spec, width=size, height=size, count=count, together=together, plan=plan)


def fit(found: Sequence[Measured]) -> dict[str, float]:
    """Base, and factors of the UNet's and the decoder's activations, by least squares of the
    relative error over a grid."""
    import itertools

    import numpy as np

    from safelight.runtime.estimate import FUSED, PLAIN

    rows = []
    for each in found:
        now = predicted(each.model, each.size, each.count, fused=each.fused)
        told = FUSED if each.fused else PLAIN
        fixed = now.weights + now.layouts + now.pictures
        rows.append((each.peak, fixed, now.unet / told.unet, now.decoder / told.decoder))
    peak, fixed, unet, decoder = np.array(rows, dtype=float).T
    best: tuple[float, ...] = (float("inf"), 0.0, 0.0, 0.0)
    steps = np.arange(0.5, 4.01, 0.1)
    for a, b in itertools.product(steps, steps):
        turns = fixed + np.maximum(a * unet, b * decoder)
        base = float(np.sum((peak - turns) / peak**2) / np.sum(1 / peak**2))
        error = float(np.mean(((base + turns) / peak - 1) ** 2))
        best = min(best, (error, base, float(a), float(b)))
    error, base, a, b = best
    worst = np.max(np.abs((base + fixed + np.maximum(a * unet, b * decoder)) / peak - 1))
    return {"base_mib": base / 2**20, "unet": a, "decoder": b, "rms": error**0.5,
            "worst": float(worst)}  # fmt: skip


def line(each: Measured) -> str:
    """For people."""
    plan = "fast" if each.fused else "plain"
    return (
        f"{each.model:6} {plan:6} {each.size:4}² x{each.count}  {each.peak / 2**20:8.0f} MiB, "
        f"predicted {each.predicted / 2**20:8.0f} ({100 * each.error:+.0f} %)"
    )


def write(found: Sequence[Measured]) -> None:
    """Keep the table and the numbers."""
    head = ["# Peak memory, predicted and measured", "",
            "| model | plan | size | pictures | MiB | predicted | off |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    rows = [
        f"| {e.model} | {'fast' if e.fused else 'plain'} | {e.size}² | {e.count} "
        f"| {e.peak / 2**20:.0f} | {e.predicted / 2**20:.0f} | {100 * e.error:+.0f} % |"
        for e in found
    ]
    stem = measure.file_stem("memory")
    (measure.RESULTS / f"{stem}.md").write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
    record = {"schema": 1, "machine": measure.machine(), "rows": [e._asdict() for e in found]}
    (measure.RESULTS / f"{stem}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
