"""One side in a process of its own, told what to do by lines of JSON on its standard input.

    python -m benchmarks.compare.worker SIDE MODEL CACHE THREADS

``load``, then for each case ``prepare`` (answers once and keeps the result in a file) and ``run``;
``export`` alone, in a process that ends, so that its memory is not counted. Every answer has the
seconds it took and the largest resident memory since the case began. Without torch where the side
needs none.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.compare.cases import EAGER, OURS, Case

MODULES = {
    OURS: "torch_sides:Ours",
    EAGER: "torch_sides:Diffusers",
    "diffusers-compile": "torch_sides:Compiled",
    "openvino": "exported:OpenVINO",
    "onnxruntime": "exported:OnnxRuntime",
    "sd.cpp": "cpp:Plain",
    "sd.cpp-q8": "cpp:Quantised",
    "sgemm": "torch_sides:Sgemm",
}


class Side(Protocol):
    """What a side can do. Each method raises whatever goes wrong; the message is the reason."""

    def __init__(self, model: str, cache: Path, threads: int) -> None: ...

    def export(self, case: Case) -> None:
        """Write the files that a case needs, where they are not there yet."""
        ...

    def load(self, case: Case) -> None:
        """Read the weights; ``case`` is the first that will be asked for."""
        ...

    def prepare(self, case: Case) -> None:
        """Whatever hangs on the shape."""
        ...

    def run(self, first: bool) -> np.ndarray | float | None:
        """The case once: its result when it is the first time, or its seconds, where the side
        keeps a clock of its own."""
        ...


def main() -> None:
    _die_with_parent()
    name, model, cache, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # tells nobody
    module, _, kind = MODULES[name].partition(":")
    side: Any = None  # a Side
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        try:
            if side is None:
                found = getattr(importlib.import_module(f"benchmarks.compare.{module}"), kind)
                side = found(model, Path(cache), int(threads))
            reply: dict[str, Any] = _done(side, asked)
        except BaseException as error:
            traceback.print_exc()
            reply = {"failed": _reason(error)}
        reply.setdefault("seconds", time.perf_counter() - began)
        answers.write(json.dumps(reply | {"peak_mib": _peak()}) + "\n")


def _done(side: Side, asked: dict[str, Any]) -> dict[str, Any]:
    verb = asked["do"]
    if verb == "run":
        began = time.perf_counter()
        own = side.run(False)
        spent = time.perf_counter() - began
        return {"seconds": own if isinstance(own, float) else spent}
    case = Case(**asked["case"])
    if verb == "export":
        side.export(case)
    elif verb == "load":
        side.load(case)
    elif verb == "prepare":
        _forget_peak()
        side.prepare(case)
        answer = side.run(True)
        if isinstance(answer, np.ndarray) and asked.get("keep"):
            np.save(asked["keep"], answer)
    else:
        raise ValueError(f"cannot {verb}")
    return {}


def _die_with_parent() -> None:
    """A killed run must not leave a process computing (Linux; elsewhere it ends at its next
    line)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _reason(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"[:300]


def _forget_peak() -> None:
    """Let the largest resident memory be counted anew from here (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> float:
    """Largest resident memory in MiB, mapped pages included."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
