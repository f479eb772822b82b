"""Serving: throughput at concurrency 8 against offline batches and against a pipeline with a lock.

    python -m benchmarks.serve

32 requests of one picture, of different prompts, steps, seeds and guidance scales. *Offline* makes
them with one call of :meth:`Generator.generate`. *Server* is `safelight serve`, a process of its
own, asked over HTTP by eight clients. *Lock* is the pattern of diffusers' example server, one
pipeline behind a lock, on the same exported weights, asked by eight threads without any HTTP. A
lone request is timed too: over HTTP, and by the call that it stands for.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, tiny_model
from safelight import provenance
from safelight.diffusion.noise import initial_noise
from safelight.generate import Generator
from safelight.request import GenerateRequest

COUNT, CLIENTS = 32, 8
PROMPTS = (
    "a red cube on top of a blue sphere",
    "a green cone to the left of a white torus",
    "a yellow cylinder in front of a purple sphere",
    "an orange sphere",
)


def asked(count: int = COUNT, steps_of: Sequence[int] = (12, 16, 20, 25)) -> list[dict[str, Any]]:
    """Requests that differ in everything that may differ at one size."""
    steps, scales = itertools.cycle(steps_of), itertools.cycle((2.0, 3.0, 4.0))
    return [
        {
            "prompt": PROMPTS[k % len(PROMPTS)],
            "seed": 100 + k,
            "steps": next(steps),
            "guidance_scale": next(scales),
            "sampler": "dpm++2m",
        }
        for k in range(count)
    ]


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = measure.Report("serve", f"{COUNT} mixed requests, {CLIENTS} at a time")
    report.clean = measure.quiet(force=options.force)
    clock = measure.clock(options, report)
    model = tiny_model.tiny(report.notes)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tiny"
        tiny_model.export(model, folder)
        pipe = tiny_model.peer(folder, channels_last=True)
    offline = Generator(model)
    many, lone = asked(), [{**asked(1)[0], "steps": 25}]
    with serving(options.threads) as url:
        sides = {
            "server": lambda: over_http(url, many),
            "offline": lambda: by_call(offline, many),
            "a lock": lambda: locked(pipe, model, many),
            "one after the other": lambda: locked(pipe, model, many, clients=1),
        }
        times = measure.in_turns(sides, rounds=options.rounds, clock=clock)
        alone = {
            "server": lambda: over_http(url, lone),
            "the call": lambda: by_call(offline, lone),
        }
        single = measure.in_turns(alone, rounds=3 * options.rounds, clock=clock)
    for peer, target in (("offline", 0.9), ("a lock", 3.0), ("one after the other", None)):
        pair = {"server": times["server"], peer: times[peer]}
        report.rows.append(
            measure.compare(f"throughput, against {peer}", pair, ours="server", target=target)
        )
    report.rows.append(measure.compare("a lone request", single, ours="server", target=0.97))
    if options.no_write:
        print(report.markdown())
    else:
        report.write()


def by_call(generator: Generator, requests: Sequence[dict[str, Any]]) -> None:
    """All of them in one call, each as the file that the server sends too."""
    made = generator.generate(request=[GenerateRequest.from_kwargs(**each) for each in requests])
    assert all(provenance.encode(result) for result in made)


def over_http(url: str, requests: Sequence[dict[str, Any]]) -> None:
    """Eight clients, each with its next request when it has been answered."""

    def ask(body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{url}/v1/images/generations", data)
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=600) as answer:
            assert json.loads(answer.read())["data"][0]["b64_json"]

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(ask, requests))


def locked(
    pipe: Any, model: Any, requests: Sequence[dict[str, Any]], *, clients: int = CLIENTS
) -> None:
    """One pipeline behind a lock. With one client it runs on this thread, which spares it the
    teams of OpenMP workers that every thread of a pool makes."""
    lock, cells = threading.Lock(), model.spec.native_size // model.spec.vae.factor

    def ask(body: dict[str, Any]) -> None:
        with lock:
            pipe(
                body["prompt"],
                latents=initial_noise(body["seed"], (1, 4, cells, cells)),
                num_inference_steps=body["steps"],
                guidance_scale=body["guidance_scale"],
                width=model.spec.native_size,
                height=model.spec.native_size,
            )

    if clients == 1:
        for each in requests:
            ask(each)
        return
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, requests))


@contextmanager
def serving(threads: int) -> Iterator[str]:
    """The command, in a process of its own, as it is used."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "safelight", "serve", "-m", "tiny", "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [*command, "--queue-seconds", "3600"], env=environment, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while not _ready(url):
            assert process.poll() is None, "the server did not start"
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main()
