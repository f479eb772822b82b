"""Ray on this machine: a batch whose worker is killed, and two replicas over HTTP.

    python -m benchmarks.ray_local [--rows 16]

Not a measurement but a trial of the real thing, too slow for the tests: prints what it did, and
fails where a picture is lost, doubled or another one than without Ray. Needs the extras ``serve``
and ``ray``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from safelight.batch import ledger, runner
from safelight.batch.onray import OnRay
from safelight.generate import Generator

FIELDS = {"deterministic": True, "steps": 4, "width": 64, "height": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            batch(Path(scratch), options.rows)
        replicas()
    finally:
        ray.shutdown()


def batch(scratch: Path, count: int) -> None:
    """The same file with and without Ray, and a worker killed."""
    file, pids = scratch / "rows.jsonl", scratch / "pids"
    pids.mkdir()
    lines = [json.dumps({"prompt": f"a red cube, {k}"}) + "\n" for k in range(count)]
    file.write_text("".join(lines))

    def load(model: str, **machine: Any) -> Generator:
        from safelight.generate import load

        (pids / str(os.getpid())).touch()
        return load(model, **machine)

    def options(name: str) -> runner.Options:
        return runner.Options(file, scratch / name, FIELDS, seed=1)

    killed: list[int] = []

    def heard(row: dict[str, Any]) -> None:
        if not killed:
            killed.append(int(next(pids.iterdir()).name))
            os.kill(killed[0], signal.SIGKILL)

    began = time.monotonic()
    summary = runner.Run(options("ray")).finish(OnRay(workers=2, loader=load), None, heard)
    seconds = time.monotonic() - began
    runner.Run(options("here")).finish(runner.Local())
    here, there = (
        [{**row, "seconds": 0} for row in ledger.records(scratch / name)]
        for name in ("here", "ray")
    )
    assert here == there
    for row in here:
        for name in row["files"]:
            one, two = (scratch / place / name for place in ("here", "ray"))
            assert one.read_bytes() == two.read_bytes(), name
    workers = len([*pids.iterdir()])
    print(f"{summary.made} pictures in {seconds:.0f} s on {workers} workers, one of them killed")


def replicas() -> None:
    """Two replicas behind one address answer a client."""
    from ray import serve

    from deploy import ray_serve

    serve.start(http_options={"host": "127.0.0.1", "port": 8123})
    serve.run(ray_serve.app({"model": "tiny", "replicas": 2}), name="safelight")
    body = json.dumps({"prompt": "a red cube", "seed": 7, "num_inference_steps": 4}).encode()
    seen = []
    for _ in range(4):
        request = urllib.request.Request("http://127.0.0.1:8123/v1/images/generations", body)
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=300) as answer:
            seen.append(json.loads(answer.read())["data"][0]["b64_json"])
    assert len(set(seen)) == 1
    print(f"2 replicas: {len(seen)} answers, one picture")
    serve.shutdown()


if __name__ == "__main__":
    main()
