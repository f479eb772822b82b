"""Faults under load: what fails is what is broken, and nothing that was accepted is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from micro_models import ToyUNet, toy_model
from safelight.generate import Generator
from safelight.request import GenerateRequest
from safelight.serve.jobs import Job, Status
from safelight.serve.store import Store
from safelight.serve.worker import Worker
from serving_micro import Client, serving, toy_house

CUBE = "a red cube"
FEW = {"prompt": CUBE, "steps": 3, "sampler": "euler"}
BAD = 13


def until(true: Any, timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def planted(generator: Generator, fault: str) -> None:
    """Every network call with a picture of seed 13 in it fails, or answers NaN in its rows."""
    bad: set[int] = set()
    make, call = generator._picture, generator.engine._call

    def picture(job: Any, answers: Any) -> Any:
        made = make(job, answers)
        if job.request.seed == BAD:
            bad.add(id(made))
        return made

    def called(rows: Any) -> Any:
        if any(id(row.picture) in bad for row in rows):
            if fault == "exception":
                raise RuntimeError("planted")
            if fault == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
        answer = call(rows)
        for k, row in enumerate(rows):
            if id(row.picture) in bad:
                answer[k] = float("nan")
        return answer

    generator._picture = picture  # type: ignore[method-assign]
    generator.engine._call = called  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [("exception", "error"), ("memory", "out_of_memory"), ("nan", "nan")],
)
def test_a_fault_of_one_request_of_a_batch_is_its_own(
    fault: str, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Generator(toy_model())
    seeds = [BAD - 1, BAD, BAD + 1]
    right = {seed: alone.generate(CUBE, seed=seed, steps=6, sampler="euler")[0] for seed in seeds}
    generator = Generator(toy_model())
    planted(generator, fault)
    if fault == "memory":  # the plan with less has an engine of its own: it runs out too

        def short(*_: Any) -> Any:
            raise MemoryError

        made = generator._submit

        def submit(group: Any, answers: Any, cancelled: Any) -> Any:
            engine = made(group, answers, cancelled)
            if engine is not generator.engine and group.jobs[0].request.seed == BAD:
                monkeypatch.setattr(engine, "_call", short)
            return engine

        monkeypatch.setattr(generator, "_submit", submit)
    worker = Worker(generator)
    try:
        go = threading.Event()
        call = generator.engine._call
        generator.engine._call = lambda rows: (go.wait(30), call(rows))[1]  # type: ignore
        request = GenerateRequest.from_kwargs(**{**FEW, "steps": 6})
        spec = generator.model.spec
        jobs = [Job("toy", [request.replace(seed=seed).resolved(spec)]) for seed in seeds]
        for job in jobs:
            worker.submit(job)
        go.set()
        until(lambda: all(job.status.final for job in jobs))
        assert [str(job.status) for job in jobs] == ["completed", "failed", "completed"]
        assert jobs[1].results[0].outcome == outcome
        assert outcome in str(jobs[1].error)
        for job, seed in zip(jobs, seeds, strict=True):
            if seed != BAD:
                ours, theirs = (
                    np.asarray(each.image, np.int16) for each in (job.results[0], right[seed])
                )
                assert np.abs(ours - theirs).max() <= 1
    finally:
        worker.close()


def test_a_fault_of_the_worker_itself_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    house = toy_house(model=toy_model())
    with serving(house) as client:
        worker = house.worker(None)

        def broken() -> None:
            raise ZeroDivisionError("planted")

        with monkeypatch.context() as patch:
            patch.setattr(worker, "_round", broken)
            told = client.done(client.post("/v1/jobs", FEW).json["id"])
        assert told["status"] == "failed"
        assert "planted" in told["error"]
        assert client.get("/healthz").status == 200
        assert client.done(client.post("/v1/jobs", FEW).json["id"])["status"] == "completed"


def test_a_thread_that_has_ended_is_not_health() -> None:
    house = toy_house(model=toy_model())
    with serving(house) as client:
        worker = house.worker(None)
        assert client.get("/healthz").status == 200
        thread = worker._thread
        worker._thread = threading.Thread()  # never started
        assert client.get("/healthz").status == 500
        worker._thread = thread


# -- clients that leave, and slow ones ------------------------------------------------------------


@contextmanager
def slowly(seconds: float = 0.02, **settings: Any) -> Iterator[tuple[Client, ToyUNet]]:
    """A server whose steps take so long."""
    model = toy_model()
    unet = model.unet
    assert isinstance(unet, ToyUNet)
    unet.before = lambda: time.sleep(seconds)
    with serving(toy_house(model=model, **settings)) as client:
        client.house.worker(None)
        yield client, unet


def sent(client: Client, path: str, body: dict[str, Any]) -> socket.socket:
    """A request whose answer nobody has read yet."""
    host, port = client.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    made = socket.create_connection((host, int(port)), 30)
    made.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return made


LONG: list[tuple[str, dict[str, Any]]] = [
    ("/v1/images/generations", {"prompt": CUBE, "steps": 500}),
    ("/v1/images/generations", {"prompt": CUBE, "steps": 500, "stream": True}),
    (
        "/v1/images/generations",
        {"prompt": CUBE, "steps": 500, "stream": True, "partial_images": 3},
    ),
    ("/v1/inference/toy", {"prompt": CUBE, "num_inference_steps": 500}),
    ("/score", {"input_data": {"data": [CUBE], "parameters": {"num_inference_steps": 500}}}),
    ("/sdapi/v1/txt2img", {"prompt": CUBE, "steps": 500, "width": 32, "height": 32}),
]


@pytest.mark.parametrize(("path", "body"), LONG, ids=["openai", "stream", "partial", "d", "a", "w"])
def test_a_client_that_leaves_cancels_within_a_step(path: str, body: dict[str, Any]) -> None:
    with slowly() as (client, unet):
        other = client.post("/v1/jobs", {**FEW, "steps": 60, "seed": 5}).json["id"]
        gone = sent(client, path, body)
        until(lambda: any(job.id != other and job.progress for job in client.house.jobs()))
        (job,) = [job for job in client.house.jobs() if job.id != other]
        if body.get("stream"):
            assert gone.recv(10)
        gone.close()
        before = len(unet.calls)
        until(lambda: job.status.final)
        assert job.status is Status.cancelled
        assert len(unet.calls) - before <= 4, "a step, and the moment until it is noticed"
        until(lambda: client.house.job(job.id) is None)
        told = client.done(other)
        assert told["status"] == "completed"
        right = Generator(toy_model()).generate(**{**FEW, "steps": 60, "seed": 5})[0]  # type: ignore
        kept = client.house.job(other)
        assert kept is not None
        ours, theirs = (np.asarray(r.image, np.int16) for r in (kept.results[0], right))
        assert np.abs(ours - theirs).max() <= 1


def test_watching_a_job_and_leaving_does_not_cancel_it() -> None:
    with slowly() as (client, _):
        job = client.post("/v1/jobs", {**FEW, "steps": 30}).json["id"]
        host, port = client.url.removeprefix("http://").split(":")
        watching = socket.create_connection((host, int(port)), 30)
        watching.sendall(f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert watching.recv(10)
        watching.close()
        assert client.done(job)["status"] == "completed"


def test_slow_clients_delay_nobody() -> None:
    with slowly(0.005, body_seconds=0.5) as (client, _):
        long = client.post("/v1/jobs", {**FEW, "steps": 200, "preview_every": 1}).json["id"]
        host, port = client.url.removeprefix("http://").split(":")
        # One that never reads its events, and one that never ends its body.
        deaf = socket.create_connection((host, int(port)), 30)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        deaf.sendall(f"GET /v1/jobs/{long}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        slow = socket.create_connection((host, int(port)), 30)
        slow.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        began = time.monotonic()
        assert client.post("/v1/images/generations", FEW).status == 200
        assert time.monotonic() - began < 5
        answer = b""
        while b"too slowly" not in answer:
            part = slow.recv(1000)
            assert part, answer
            answer += part
        assert answer.startswith(b"HTTP/1.1 408")
        assert client.done(long)["status"] == "completed"
        deaf.close()
        slow.close()


# -- the disk -------------------------------------------------------------------------------------


def test_a_full_database_refuses_and_recovers(tmp_path: Path) -> None:
    with serving(toy_house(model=toy_model(), data_dir=str(tmp_path))) as client:
        store = client.house.store
        assert store is not None
        client.done(client.post("/v1/jobs", FEW).json["id"])
        pages = store._execute("PRAGMA page_count", ())[0][0]
        store._execute(f"PRAGMA max_page_count={pages}", ())
        large = {**FEW, "negative_prompt": "x" * 9000}
        answer = client.post("/v1/jobs", large)
        assert answer.status == 507, answer.data
        assert "full" in answer.json["error"]["message"]
        assert len(client.house.jobs()) == 1, "nothing of the refused one is left"
        # What is not kept needs no disk.
        assert client.post("/v1/images/generations", large).status == 200
        assert client.get("/healthz").status == 200
        store._execute("PRAGMA max_page_count=100000", ())
        assert client.done(client.post("/v1/jobs", large).json["id"])["status"] == "completed"


def test_no_half_picture_stays_of_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        if path.name == "0001":
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    with serving(toy_house(model=toy_model(), data_dir=str(tmp_path))) as client:
        with monkeypatch.context() as patch:
            patch.setattr("safelight.serve.store.write", full)
            told = client.done(client.post("/v1/jobs", {**FEW, "count": 3}).json["id"])
        assert told["status"] == "failed"
        assert "No space left" in told["error"]
        again = client.get(f"/v1/jobs/{told['id']}").json
        assert again["status"] == "failed"
        assert not list((tmp_path / "pictures").rglob("0*"))
        assert client.done(client.post("/v1/jobs", FEW).json["id"])["status"] == "completed"


# -- the end --------------------------------------------------------------------------------------


def test_what_the_drain_leaves_runs_after_a_restart(tmp_path: Path) -> None:
    house = toy_house(model=toy_model(), data_dir=str(tmp_path), drain_seconds=0)
    with serving(house) as client:
        asked = [client.post("/v1/jobs", {**FEW, "steps": 500, "seed": k}) for k in range(3)]
        ids = [answer.json["id"] for answer in asked]
        stopped = client.post("/v1/jobs", {**FEW, "steps": 500}).json["id"]
        client.post(f"/v1/jobs/{stopped}/cancel")
        client.done(stopped)
    store = Store(tmp_path)
    assert [kept.id for kept in store.unfinished()] == ids
    store.close()
    with serving(toy_house(model=toy_model(), data_dir=str(tmp_path))) as client:
        until(lambda: all(client.get(f"/v1/jobs/{k}").json["status"] != "queued" for k in ids))
        assert [client.done(k)["status"] for k in ids] == ["completed"] * 3


def test_terminated_under_load_accepted_work_finishes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "safelight", "serve", "--port", str(port), "--no-measure"]
    process = subprocess.Popen(
        [*command, "--data", "jobs", "--log-json"],
        cwd=tmp_path,
        stderr=(tmp_path / "log").open("wb"),
        env=os.environ,
    )
    url = f"http://127.0.0.1:{port}"

    def ask(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url + path, data), timeout=60) as answer:
            return json.loads(answer.read())

    def ready() -> bool:
        assert process.poll() is None
        try:
            return ask("/readyz")["ready"]
        except OSError:
            return False

    try:
        until(ready, 120)
        jobs = [ask("/v1/jobs", {**FEW, "steps": 8, "seed": k})["id"] for k in range(4)]
        with ThreadPoolExecutor(2) as pool:
            body = {"prompt": CUBE, "steps": 8}
            waiting = [pool.submit(ask, "/v1/images/generations", body) for _ in range(2)]
            until(lambda: len(ask("/v1/jobs")["jobs"]) == 6)
            process.send_signal(signal.SIGTERM)
            assert all(each.result()["data"][0]["b64_json"] for each in waiting)
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
    store = Store(tmp_path / "jobs")
    kept = [store.job(name) for name in jobs]
    assert [each and each.status for each in kept] == [Status.completed] * 4
    assert all(store.picture(name, 0).exists() for name in jobs)
    store.close()
    log = (tmp_path / "log").read_text()
    told = [json.loads(line) for line in log.splitlines()]
    ended = [line for line in told if line["message"] == "job"]
    assert {line["outcome"] for line in ended} == {"completed"}
    assert len(ended) == 6
    assert CUBE not in log
