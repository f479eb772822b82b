"""Soak: twice as many requests as can be served, then a storm of cancellations.

    python -m benchmarks.soak                                   # about nine minutes
    python -m benchmarks.soak --minutes 0.3 --storm 20 --force  # a look at whether it runs

`safelight serve` in a process of its own, model `tiny`. *Peak*: eight clients, each with its next
request when it has been answered. *Overload*: requests come at twice the peak's rate, whatever has
become of the others; those that are accepted must be answered within the deadline, the excess is
refused with 429 at once. *Storm*: jobs of which half are cancelled at random steps; the others'
pictures are compared with those of a quiet server, by digest where the request is deterministic,
and within 1/255 otherwise. The server's memory is watched all along.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import hashlib
import io
import itertools
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import measure
from benchmarks.serve import CLIENTS, PROMPTS, asked

DEADLINE = 30.0
"""Seconds within which an accepted request must be answered."""
QUEUE = 15.0
"""Expected seconds of work that the server lets wait."""
_WAVE = 24  # jobs of the storm at a time


@dataclass
class Server:
    """The process and its address."""

    url: str
    pid: int

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """The answer's JSON.

        Raises:
            HTTPError: a status of 400 or more.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=600) as answer:
            found = answer.read()
        return json.loads(found) if found[:1] in (b"{", b"[") else found

    @property
    def resident(self) -> float:
        """MiB."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass
class Findings:
    """What was measured, and whether it is what it should be."""

    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, found: str, wanted: str, met: bool) -> None:
        """One line of the table; printed too."""
        self.rows.append((what, found, wanted, met))
        print(f"{'ok ' if met else 'NOT'} {what}: {found} (target: {wanted})", flush=True)

    def markdown(self) -> str:
        """The table and the notes."""
        lines = ["# Soak: overload and a storm of cancellations", ""]
        lines += ["| | measured | target | |", "|---|---|---|---|"]
        lines += [f"| {a} | {b} | {c} | {'✓' if met else '✗'} |" for a, b, c, met in self.rows]
        lines += ["", *(f"{key}: {value}." for key, value in measure.machine().items())]
        return "\n".join([*lines, *self.notes]) + "\n"

    def write(self) -> None:
        """Keep the table, and the same as JSON, in ``benchmarks/results/``."""
        facts = measure.machine()
        chip = re.sub(r"[^a-z0-9]+", "-", facts["Processor"].lower()).strip("-")
        stem = measure.RESULTS / f"soak-{chip}-{datetime.date.today().isoformat()}"
        stem.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")
        names = ("what", "measured", "target", "met")
        record = {
            "schema": 1,
            "machine": facts,
            "rows": [dict(zip(names, row, strict=True)) for row in self.rows],
            "notes": self.notes,
        }
        stem.with_suffix(".json").write_text(json.dumps(record, indent=1, ensure_ascii=False))


@contextmanager
def started(threads: int) -> Iterator[Server]:
    """The command, as it is used."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "safelight", "serve", "-m", "tiny", "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [*command, "--queue-seconds", str(QUEUE)], env=environment, stderr=subprocess.DEVNULL
    )
    server = Server(f"http://127.0.0.1:{port}", process.pid)
    try:
        while True:
            assert process.poll() is None, "the server did not start"
            try:
                server.ask("/readyz")
                break
            except OSError:
                time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(60)


# -- peak and overload ----------------------------------------------------------------------------


def peak(server: Server, seconds: float) -> float:
    """Pictures a second that eight patient clients get."""
    bodies, lock = itertools.cycle(asked()), threading.Lock()
    done, end = list[float](), time.monotonic() + seconds

    def client() -> None:
        while time.monotonic() < end:
            with lock:
                body = next(bodies)
            server.ask("/v1/images/generations", body)
            done.append(time.monotonic())

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    within = [at for at in sorted(done) if at <= end]
    if len(within) < 3:  # a look on a slow machine: all of them, to the last
        return len(done) / (max(done) - end + seconds)
    return (len(within) - 1) / (within[-1] - within[0])


@dataclass
class Load:
    """What became of an overload's requests."""

    began: float
    answered: list[tuple[float, float]] = field(default_factory=list)
    """(when, after how long) of those that were accepted."""
    statuses: Counter[int] = field(default_factory=Counter)
    hurried: list[float] = field(default_factory=list)
    """How long refusals took."""
    memory: list[tuple[int, float]] = field(default_factory=list)
    """(pictures, MiB)."""

    def send(self, server: Server, body: dict[str, Any]) -> None:
        """One request."""
        began = time.monotonic()
        try:
            server.ask("/v1/images/generations", body)
        except urllib.error.HTTPError as error:
            said = error.code != 429 or int(error.headers["retry-after"]) >= 1
            self.statuses[error.code if said else -1] += 1
            self.hurried.append(time.monotonic() - began)
        else:
            self.statuses[200] += 1
            self.answered.append((time.monotonic(), time.monotonic() - began))


def overload(server: Server, rate: float, seconds: float) -> Load:
    """Requests at ``rate`` a second, whatever has become of the others."""
    load, bodies = Load(time.monotonic()), itertools.cycle(asked())
    with ThreadPoolExecutor(int(rate * DEADLINE * 2) + 16) as pool:
        for k in range(int(rate * seconds)):
            time.sleep(max(0.0, load.began + k / rate - time.monotonic()))
            pool.submit(load.send, server, next(bodies))
            if k % max(1, int(rate)) == 0:
                load.memory.append((load.statuses[200], server.resident))
    load.memory.append((load.statuses[200], server.resident))
    return load


def judge(findings: Findings, load: Load, best: float, seconds: float) -> None:
    """The overload against its targets."""
    assert load.answered, "nothing was answered"
    good = [at for at, took in load.answered if took <= DEADLINE]
    # From when the queue has filled to the end of the arrivals: the same stretch as the peak's.
    first = load.began + min(QUEUE, seconds / 4)
    within = sum(first <= at <= load.began + seconds for at in good)
    rate = within / (load.began + seconds - first)
    findings.add(
        "goodput at twice the peak", f"{rate:.2f}/s, {rate / best:.1%}", "95 %", rate >= 0.95 * best
    )
    times = sorted(took for _, took in load.answered)
    late = times[min(len(times) - 1, int(0.99 * len(times)))]
    findings.add("p99 of accepted requests", f"{late:.1f} s", f"{DEADLINE:g} s", late <= DEADLINE)
    others = {code: n for code, n in load.statuses.items() if code not in (200, 429)}
    told = ", ".join(f"{n} of {code}" for code, n in sorted(load.statuses.items()))
    findings.add("answers", told, "200 and 429 alone", not others and load.statuses[429] > 0)
    if load.hurried:
        quick = statistics.median(load.hurried)
        findings.add("a refusal takes", f"{1000 * quick:.0f} ms", "1 s", quick < 1)
    half = load.memory[len(load.memory) // 2 :]
    counts, sizes = (np.array(column, float) for column in zip(*half, strict=True))
    slope = 100 * float(np.polyfit(counts, sizes, 1)[0]) if np.ptp(counts) else 0.0
    findings.add("memory slope, second half", f"{slope:.2f} MiB/100 pictures", "below 1", slope < 1)


# -- the storm ------------------------------------------------------------------------------------


def job(k: int) -> dict[str, Any]:
    """One of twelve, each twice: deterministic and not."""
    return {
        "prompt": PROMPTS[k % len(PROMPTS)],
        "seed": 500 + k % 12,
        "steps": 12 + k % 12,
        "guidance_scale": 2.0 + k % 3,
        "sampler": ("dpm++2m", "euler-a")[k % 2],
        "deterministic": k // 12 % 2 == 0,
    }


def pixels(data: bytes) -> np.ndarray:
    """Of a file."""
    return np.asarray(Image.open(io.BytesIO(data)), np.int16)


def expected(server: Server) -> list[np.ndarray]:
    """The pictures of a quiet server."""
    made = []
    for k in range(24):
        found = server.ask("/v1/images/generations", {**job(k), "response_format": "b64_json"})
        made.append(pixels(base64.b64decode(found["data"][0]["b64_json"])))
    return made


def storm(server: Server, count: int, right: list[np.ndarray], seed: int) -> tuple[int, int, int]:
    """``count`` jobs, every second one cancelled at a random step.

    Returns:
        pictures that are not as they should be; jobs cancelled; jobs completed.
    """
    dice, wrong = random.Random(seed), list[int]()
    plans = [(k, dice.randint(0, job(k)["steps"] - 2) if k % 2 else None) for k in range(count)]
    dice.shuffle(plans)
    ends: Counter[str] = Counter()

    def run(plan: tuple[int, int | None]) -> None:
        k, stop = plan
        made = _accepted(server, job(k))
        told = _watched(server, made, stop)
        ends[told["status"]] += 1
        if told["status"] == "completed":
            data = pixels(server.ask(told["results"][0]["url"]))
            apart = int(np.abs(data - right[k % 24]).max())
            if (job(k)["deterministic"] and _digest(data) != _digest(right[k % 24])) or apart > 1:
                wrong.append(k)
        elif stop is None:
            wrong.append(k)
        server.ask(f"/v1/jobs/{made}", method="DELETE")

    with ThreadPoolExecutor(_WAVE) as pool:
        list(pool.map(run, plans))
    return len(wrong), ends["cancelled"], ends["completed"]


def _accepted(server: Server, body: dict[str, Any]) -> str:
    while True:
        try:
            return server.ask("/v1/jobs", body)["id"]
        except urllib.error.HTTPError as error:
            if error.code != 429:
                raise
            time.sleep(float(error.headers["retry-after"]))


def _watched(server: Server, name: str, stop: int | None) -> dict[str, Any]:
    """Listen to a job's events, and cancel it at a step."""
    with urllib.request.urlopen(f"{server.url}/v1/jobs/{name}/events", timeout=600) as events:
        for line in events:
            if not line.startswith(b"data: "):
                continue
            told = json.loads(line[6:])
            if stop is not None and told["step"] >= stop and told["status"] == "generating":
                server.ask(f"/v1/jobs/{name}/cancel", {})
                stop = None
            if told["status"] in ("completed", "failed", "cancelled"):
                return told
    raise AssertionError(f"{name}: the events ended before the job")


def _digest(data: np.ndarray) -> str:
    return hashlib.sha256(data.tobytes()).hexdigest()


def weather(findings: Findings, server: Server, count: int) -> None:
    """Storms against their targets. The first one warms up what memory is measured from."""
    right = expected(server)
    sizes = []
    for k in range(3):
        wrong, cancelled, completed = storm(server, count, right, seed=k)
        sizes.append(server.resident)
        findings.add(
            f"storm {k + 1}: {cancelled} of {count} cancelled, {completed} completed",
            f"{wrong} wrong",
            "0 wrong",
            wrong == 0 and cancelled > count / 4,
        )
    grown = (sizes[-1] - sizes[0]) / (2 * count) * 100
    findings.add("memory after storms", f"{grown:.2f} MiB/100 jobs", "below 1", grown < 1)
    text = server.ask("/metrics").decode()
    left = re.findall(r"safelight_(?:running|queued)_jobs\{[^}]*\} (\S+)", text)
    findings.add("jobs left behind", f"{sum(map(float, left)):g}", "0", not sum(map(float, left)))
    findings.add("health", str(server.ask("/healthz")["status"]), "ok", True)


def main() -> None:
    """Run, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="of overload")
    parser.add_argument("--storm", type=int, default=200, help="jobs of each storm")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the server")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--no-write", action="store_true", help="keep no files")
    options = parser.parse_args()
    clean, seconds = measure.quiet(force=options.force), 60 * options.minutes
    findings = Findings()
    with started(options.threads) as server:
        peak(server, min(20.0, seconds / 3))  # what is learnt and allocated first
        best = peak(server, min(60.0, seconds / 2))
        findings.notes.append(
            f"Peak: {best:.2f} pictures/s with {CLIENTS} clients. Overload: {options.minutes:g} "
            f"minutes at {2 * best:.2f} requests/s; the queue holds {QUEUE:g} s of work. The "
            "clients run on the same cores."
        )
        judge(findings, overload(server, 2 * best, seconds), best, seconds)
        weather(findings, server, options.storm)
    if not clean:
        findings.notes.append("**Not clean**: something else used the processor meanwhile.")
    if not options.no_write:
        findings.write()
    print(findings.markdown())


if __name__ == "__main__":
    main()
