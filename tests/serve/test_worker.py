"""Continuous batching: what shares a call, what it must not change, what stops."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from micro_models import toy_model
from safelight.generate import Generator, Progress
from safelight.request import GenerateRequest, ImageResult
from safelight.serve.jobs import Busy, Draining, Job, Late, Status
from safelight.serve.worker import Meter, Worker, units

CUBE = "a red cube on top of a blue sphere"


def job(worker: Worker, **fields: Any) -> Job:
    how = {name: fields.pop(name) for name in ("priority", "deadline") if name in fields}
    request = GenerateRequest.from_kwargs(**{"prompt": CUBE, "steps": 5, "seed": 3, **fields})
    return Job("toy", [request.resolved(worker.generator.model.spec)], **how)


def wait(*jobs: Job, timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while not all(each.status.final for each in jobs):
        assert time.monotonic() < end, [each.status for each in jobs]
        time.sleep(0.005)


@pytest.fixture
def worker() -> Any:
    made = Worker(Generator(toy_model()))
    yield made
    made.close()


def pixels(result: ImageResult) -> np.ndarray:
    assert result.image is not None
    return np.asarray(result.image, np.int16)


def held(worker: Worker) -> threading.Event:
    """Keeps the worker's thread in its first network call until the event is set."""
    go, call = threading.Event(), worker.generator.engine._call

    def waiting(rows: Any) -> Any:
        assert go.wait(30)
        return call(rows)

    worker.generator.engine._call = waiting  # type: ignore[method-assign]
    return go


def test_different_requests_share_calls_and_keep_their_pictures(worker: Worker) -> None:
    asked: list[dict[str, Any]] = [
        {"seed": 1, "steps": 4, "sampler": "euler"},
        {"seed": 2, "steps": 7, "sampler": "dpm++2m", "guidance_scale": 3.0},
        {"seed": 3, "steps": 5, "sampler": "euler-a", "guidance_scale": 1.0},
        {"seed": 4, "steps": 6, "sampler": "dpm++2m-sde", "prompt": "a blue cone", "count": 2},
    ]
    alone = Generator(toy_model())
    expected = [alone.generate(**{"prompt": CUBE, **fields}) for fields in asked]
    go = held(worker)
    jobs = [job(worker, **fields) for fields in asked]
    for each in jobs:
        worker.submit(each)
    go.set()
    wait(*jobs)
    for each, right in zip(jobs, expected, strict=True):
        assert each.status is Status.completed
        assert [r.seed for r in each.pictures] == [r.seed for r in right]
        for ours, theirs in zip(each.pictures, right, strict=True):
            assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1
    # One request alone takes a call a step: together they take little more than the longest.
    assert worker.generator.engine.calls <= 9


def test_one_that_comes_later_joins(worker: Worker) -> None:
    first, late = job(worker, steps=200, sampler="euler"), job(worker, steps=3, sampler="euler")
    joined = threading.Event()

    def hear(changed: Job) -> None:
        if changed.progress is not None and not joined.is_set():
            joined.set()
            worker.submit(late)

    first.listen(hear)
    worker.submit(first)
    wait(first, late)
    assert late.completed is not None
    assert first.completed is not None
    assert late.completed < first.completed


def test_cancelling_one_leaves_the_others(worker: Worker) -> None:
    alone = Generator(toy_model()).generate(CUBE, seed=5, steps=30, sampler="euler")
    long, other = (
        job(worker, steps=1000, sampler="euler"),
        job(worker, seed=5, steps=30, sampler="euler"),
    )
    long.listen(lambda changed: changed.cancel() if changed.progress else None)
    for each in (long, other):
        worker.submit(each)
    wait(long, other)
    assert long.status is Status.cancelled
    assert worker.generator.engine.calls < 200
    assert np.abs(pixels(other.pictures[0]) - pixels(alone[0])).max() <= 1


def test_a_failure_is_one_jobs_alone(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = worker.generator.stream

    def broken(**arguments: Any) -> Any:
        if arguments["request"][0].seed == 13:
            raise RuntimeError("planted")
        return stream(**arguments)

    monkeypatch.setattr(worker.generator, "stream", broken)
    bad, good = job(worker, seed=13), job(worker, seed=14)
    for each in (bad, good):
        worker.submit(each)
    wait(bad, good)
    assert bad.status is Status.failed
    assert "planted" in str(bad.error)
    assert good.status is Status.completed


def test_the_queue_is_bounded_in_seconds_and_an_empty_one_takes_anything() -> None:
    worker = Worker(Generator(toy_model()), limit=1.0)
    try:
        go = held(worker)
        worker.meter = Meter(1.0)  # a second for every unit
        first = job(worker)
        worker.submit(first)
        with pytest.raises(Busy, match="try again"):
            worker.submit(job(worker))
        go.set()
        wait(first)
        assert worker.meter.per_unit < 1.0, "it has learnt"
    finally:
        worker.close()


def test_priority_then_arrival_and_a_deadline() -> None:
    worker = Worker(Generator(toy_model()), live=1)
    try:
        go = held(worker)
        first = job(worker)
        worker.submit(first)
        while worker.depth != (0, 1):
            time.sleep(0.005)
        plain, urgent = job(worker), job(worker, priority=5)
        late = job(worker, deadline=time.monotonic() - 1)
        for each in (plain, urgent, late):
            worker.submit(each)
        assert worker.position(urgent) == 0
        assert worker.position(plain) == 1
        assert (worker.eta(plain) or 0) >= plain.cost
        go.set()
        wait(first, plain, urgent, late)
        assert (urgent.started or 0) <= (plain.started or 0)
        assert isinstance(late.error, Late)
    finally:
        worker.close()


def test_closing_finishes_what_was_accepted() -> None:
    worker = Worker(Generator(toy_model()))
    accepted = [job(worker, seed=k, steps=20) for k in range(12)]
    for each in accepted:
        worker.submit(each)
    worker.close(drain=30)
    assert {each.status for each in accepted} == {Status.completed}
    with pytest.raises(Draining):
        worker.submit(job(worker))


def test_closing_without_patience_cancels() -> None:
    worker = Worker(Generator(toy_model()))
    endless = job(worker, steps=1000, sampler="euler", count=8)
    worker.submit(endless)
    worker.close()
    assert endless.status is Status.cancelled


def test_progress_and_units(worker: Worker) -> None:
    one = job(worker, steps=4, sampler="euler", guidance_scale=2.0)
    seen: list[Progress] = []
    one.listen(lambda changed: seen.append(changed.progress) if changed.progress else None)
    worker.submit(one)
    wait(one)
    assert seen[-1].done == 1.0
    cells = (one.requests[0].width or 0) * (one.requests[0].height or 0) / 64
    assert units(one.requests[0], 8) == 4 * 2 * cells
    assert worker.generator.engine.work == units(one.requests[0], 8)
