"""A worker seen from outside: asked by a line, answering by a line, or dead."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.compare.cases import Case

ROOT = Path(__file__).parents[2]


class Failed(Exception):
    """A side cannot do what it was asked for; the message is the reason."""


class Process:
    """One side. What it writes to its standard error goes to ``log``."""

    def __init__(
        self, side: str, model: str, cache: Path, *, threads: int, patience: float, nice: int = 0
    ) -> None:
        self.side, self.patience = side, patience
        self.log = cache / f"log-{side}.txt"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "benchmarks.compare.worker", side, model]
        if nice:
            command = ["nice", "-n", str(nice), *command]
        self.began = time.perf_counter()
        with self.log.open("w") as log:
            self.child = subprocess.Popen(
                [*command, str(cache), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=ROOT,
            )
        assert self.child.stdout is not None
        os.set_blocking(self.child.stdout.fileno(), False)
        self._rest = b""

    def ask(self, verb: str, case: Case | None = None, **more: Any) -> dict[str, Any]:
        """Have something done.

        Raises:
            Failed: it could not, died, or took longer than the patience.
        """
        asked = {"do": verb, **more} | ({} if case is None else {"case": case.json()})
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps(asked).encode() + b"\n")
            self.child.stdin.flush()
        except OSError:
            raise Failed(self._death()) from None
        reply = json.loads(self._line(verb))
        if "failed" in reply:
            raise Failed(reply["failed"])
        return reply

    def ticks(self) -> int:
        """Clock ticks it has worked so far."""
        try:
            words = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
            return int(words[11]) + int(words[12])
        except OSError:
            return 0

    def end(self) -> None:
        """End it, nicely first."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        with contextlib.suppress(OSError):
            self.child.stdin.close()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()

    def _line(self, verb: str) -> bytes:
        assert self.child.stdout is not None
        until = time.monotonic() + self.patience
        with selectors.DefaultSelector() as ready:
            ready.register(self.child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                left = until - time.monotonic()
                if left <= 0 or not ready.select(left):
                    self.child.kill()
                    raise Failed(f"{verb} took more than {self.patience:.0f} s")
                more = os.read(self.child.stdout.fileno(), 65536)
                if not more:
                    raise Failed(self._death())
                self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _death(self) -> str:
        code = self.child.wait()
        said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        killed = " (killed: out of memory?)" if code == -9 else ""
        return f"ended with {code}{killed}: {said[-1][:200] if said else 'without a word'}"
