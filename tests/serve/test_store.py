"""Jobs that outlive the process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from micro_systems import system
from safelight.serve.jobs import Job, Status
from safelight.serve.store import Store, StoreError
from serving_micro import serving, toy_house

FEW = {"prompt": "a red cube", "steps": 3, "sampler": "euler"}


def test_finished_jobs_are_there_after_a_restart(tmp_path: Path) -> None:
    with serving(toy_house(data_dir=str(tmp_path))) as client:
        told = client.done(client.post("/v1/jobs", {**FEW, "count": 2}).json["id"])
        first = client.get(told["results"][1]["url"]).data
    with serving(toy_house(data_dir=str(tmp_path))) as client:
        again = client.get(f"/v1/jobs/{told['id']}").json
        assert again == told
        assert client.get(again["results"][1]["url"]).data == first
        assert client.ask("DELETE", f"/v1/jobs/{told['id']}").status == 204
        assert client.get(f"/v1/jobs/{told['id']}").status == 404
    assert not list((tmp_path / "pictures").iterdir())


def test_what_a_crash_leaves_runs_again_with_its_seed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for k in range(3):
        store.add(Job("toy", [], id=f"left-{k}"), {**FEW, "seed": 40 + k})
    store.close()
    with serving(toy_house(data_dir=str(tmp_path))) as client:
        for k in range(3):
            while client.get(f"/v1/jobs/left-{k}").json["status"] == "queued":
                time.sleep(0.02)
            told = client.done(f"left-{k}")
            assert (told["status"], told["results"][0]["seed"]) == ("completed", 40 + k)
            client.get(told["results"][0]["url"])
            path = tmp_path / "pictures" / f"left-{k}" / "0000"
            right = system("sd-v1").generate(**FEW, seed=40 + k)[0].image
            apart = np.asarray(Image.open(path), np.int16) - np.asarray(right, np.int16)
            assert np.abs(apart).max() <= 1


def test_what_was_accepted_runs_whatever_the_queues_limit(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for k in range(3):
        store.add(Job("toy", [], id=f"left-{k}"), {**FEW, "steps": 30, "seed": k})
    store.close()
    house = toy_house(data_dir=str(tmp_path), queue_seconds=1e-6)
    with serving(house) as client:
        for k in range(3):
            while client.get(f"/v1/jobs/left-{k}").json["status"] == "queued":
                time.sleep(0.02)
            assert client.done(f"left-{k}")["status"] == "completed"


def test_what_cannot_run_any_more_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(Job("toy", [], id="left"), {**FEW, "steps": 30, "seed": 1})
    store.add(Job("gone", [], id="other"), {**FEW, "model": "gone", "seed": 1})
    store.close()
    with serving(toy_house(data_dir=str(tmp_path), max_steps=20)) as client:
        for name, said in (("left", "steps"), ("other", "gone")):
            told = client.done(name)
            assert told["status"] == "failed"
            assert said in told["error"]
        assert client.house.store is not None
        assert client.house.store.unfinished() == []


def test_the_same_key_at_once_is_one_job(tmp_path: Path) -> None:
    with serving(toy_house(data_dir=str(tmp_path))) as client, ThreadPoolExecutor(8) as pool:
        key = {"idempotency-key": "mine"}
        answers = list(pool.map(lambda _: client.post("/v1/jobs", FEW, headers=key), range(8)))
        assert {answer.status for answer in answers} == {202}
        assert len({answer.json["id"] for answer in answers}) == 1


def test_a_restored_job_can_be_cancelled_by_its_id(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(Job("toy", [], id="long"), {**FEW, "steps": 500, "count": 8, "seed": 1})
    store.close()
    with serving(toy_house(data_dir=str(tmp_path))) as client:
        end = time.monotonic() + 30
        while client.house.job("long") is None:
            assert time.monotonic() < end, "it is remembered under another id"
            time.sleep(0.005)
        assert client.post("/v1/jobs/long/cancel").status == 200
        assert client.done("long")["status"] == "cancelled"


def test_a_refused_job_does_not_run_after_a_restart(tmp_path: Path) -> None:
    house = toy_house(data_dir=str(tmp_path), queue_seconds=0.001)
    with serving(house) as client:
        first = client.post("/v1/jobs", {**FEW, "steps": 500}).json["id"]
        house.worker(None).meter.per_unit = 1.0
        assert client.post("/v1/jobs", FEW).status == 429
        assert house.store is not None
        assert [kept.id for kept in house.store.unfinished()] == [first]
        client.post(f"/v1/jobs/{first}/cancel")


def test_a_key_makes_a_retry_the_same_job(tmp_path: Path) -> None:
    with serving(toy_house(data_dir=str(tmp_path))) as client:
        key = {"idempotency-key": "mine"}
        first = client.post("/v1/jobs", FEW, headers=key).json["id"]
        assert client.post("/v1/jobs", FEW, headers=key).json["id"] == first
        assert client.post("/v1/jobs", FEW).json["id"] != first
        client.done(first)
    with serving(toy_house(data_dir=str(tmp_path))) as client:
        assert client.post("/v1/jobs", FEW, headers=key).json["id"] == first


def test_a_full_disk_fails_the_job_and_not_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with serving(toy_house(data_dir=str(tmp_path))) as client:
        with monkeypatch.context() as patch:
            patch.setattr("safelight.serve.store.write", full)
            told = client.done(client.post("/v1/jobs", FEW).json["id"])
        assert told["status"] == "failed"
        assert "No space left" in told["error"]
        assert client.done(client.post("/v1/jobs", FEW).json["id"])["status"] == "completed"


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match="cannot be used"):
        Store(tmp_path / "file")
    (tmp_path / "jobs.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match="cannot be used"):
        Store(tmp_path)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store._execute("PRAGMA user_version=99", ())
    store.close()
    with pytest.raises(StoreError, match="schema 99"):
        Store(tmp_path)


def test_killed_under_load_every_accepted_job_completes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "safelight"]
    command += ["serve", "--port", str(port), "--data", "jobs", "--no-measure"]
    url = f"http://127.0.0.1:{port}"

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, env=os.environ)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                    return process
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def ask(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url + path, data), timeout=60) as answer:
            return json.loads(answer.read())

    process = start()
    asked = [ask("/v1/jobs", {**FEW, "steps": 12, "seed": k})["id"] for k in range(6)]
    while not any(ask(f"/v1/jobs/{job}")["status"] != "queued" for job in asked):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = start()
    try:
        end = time.monotonic() + 120
        while any(ask(f"/v1/jobs/{job}")["status"] != Status.completed for job in asked):
            assert time.monotonic() < end
            time.sleep(0.1)
        seeds = [ask(f"/v1/jobs/{job}")["results"][0]["seed"] for job in asked]
        assert seeds == list(range(6))
    finally:
        process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM)
