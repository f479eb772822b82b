"""Seeds survive whatever company, for every sampler; and decoding holds nobody up."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micro_models import ToyUNet, micro_model, toy_model
from safelight import names, runtime
from safelight.generate import Generator
from safelight.request import GenerateRequest
from safelight.runtime.plan import PLAIN
from safelight.serve.jobs import Job, Status
from safelight.serve.worker import Worker

SAMPLERS = [sampler.name for sampler in names.SAMPLERS]
PROMPTS = ("a red cube", "a green cone to the left of a blue sphere")

Asked = tuple[tuple[str, Any], ...]


@functools.cache
def by_itself() -> Generator:
    return Generator(micro_model())


@functools.cache
def alone(fields: Asked) -> list[np.ndarray]:
    made = by_itself().generate(request=GenerateRequest.from_kwargs(**dict(fields)))
    return [np.asarray(result.image, np.int16) for result in made]


def requests(sampler: str | None = None) -> st.SearchStrategy[Asked]:
    return st.fixed_dictionaries(
        {
            "prompt": st.sampled_from(PROMPTS),
            "sampler": st.just(sampler) if sampler else st.sampled_from(SAMPLERS),
            "steps": st.integers(2, 3),
            "seed": st.integers(0, 2),
            "guidance_scale": st.sampled_from([1.0, 4.0]),
            "count": st.sampled_from([1, 1, 2]),
            "width": st.sampled_from([32, 32, 40]),
            "height": st.just(32),
            "deterministic": st.booleans(),
        }
    ).map(lambda fields: tuple(fields.items()))


class Arrivals:
    """A worker to which jobs come at given ticks of its engine."""

    def __init__(self) -> None:
        self.worker = Worker(Generator(micro_model()), live=6)
        self.due: list[tuple[int, Job]] = []
        self.ticks = 0
        tick = self.worker.generator.engine._tick

        def ticked(live: Any) -> None:
            self.ticks += 1
            self.come()
            tick(live)

        self.worker.generator.engine._tick = ticked  # type: ignore[method-assign]

    def come(self) -> None:
        for at, job in list(self.due):
            if at <= self.ticks:
                self.due.remove((at, job))
                self.worker.submit(job)

    def run(self, asked: list[tuple[int, Asked]]) -> list[Job]:
        spec = self.worker.generator.model.spec
        made = [
            (at, Job("toy", [GenerateRequest.from_kwargs(**dict(fields)).resolved(spec)]))
            for at, fields in asked
        ]
        self.ticks, self.due = 0, list(made[1:])
        self.worker.submit(made[0][1])
        end = time.monotonic() + 30
        while not all(job.status.final for _, job in made):
            if not any(self.worker.depth) and self.due:  # all have gone before it came
                self.ticks = 10**6
                self.come()
            assert time.monotonic() < end
            time.sleep(0.001)
        return [job for _, job in made]


@pytest.fixture(scope="module")
def arrivals() -> Iterator[Arrivals]:
    made = Arrivals()
    yield made
    made.worker.close()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seeds_survive_any_company(arrivals: Arrivals, sampler: str) -> None:
    @settings(max_examples=3)
    @given(
        requests(sampler),
        st.lists(st.tuples(st.integers(0, 6), requests()), min_size=1, max_size=3),
    )
    def probe(first: Asked, others: list[tuple[int, Asked]]) -> None:
        asked = [(0, first), *others]
        for job, (_, fields) in zip(arrivals.run(asked), asked, strict=True):
            assert job.status is Status.completed
            for result, right in zip(job.pictures, alone(fields), strict=True):
                apart = np.abs(np.asarray(result.image, np.int16) - right).max()
                assert apart <= (0 if dict(fields)["deterministic"] else 1), dict(fields)

    probe()


def test_company_that_shows_would_be_noticed(
    arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = arrivals.worker.generator.engine
    call = engine._call
    monkeypatch.setattr(engine, "_call", lambda rows: call(rows) + 0.05 * (len(rows) > 2))
    fields = {"prompt": PROMPTS[0], "sampler": "euler", "steps": 3, "guidance_scale": 4.0}
    asked = [(0, (*fields.items(), ("seed", seed))) for seed in range(3)]
    apart = [
        np.abs(np.asarray(job.pictures[0].image, np.int16) - alone(what)[0]).max()
        for job, (_, what) in zip(arrivals.run(asked), asked, strict=True)
    ]
    assert max(apart) > 1


# -- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [None, PLAIN], ids=["fused", "plain"])
def test_a_decoder_in_pieces_gives_the_same_pixels(plan: Any) -> None:
    model = micro_model()
    model.runtime = runtime.prepare(model, plan)  # type: ignore[misc]
    latents = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    pieces, count = model.runtime.decoding(latents), 0
    while True:
        try:
            next(pieces)
            count += 1
        except StopIteration as stop:
            pixels = stop.value
            break
    assert count >= 4
    assert torch.equal(pixels, model.runtime.decode(latents))


def pauses(
    monkeypatch: pytest.MonkeyPatch, *, step: float, piece: float, whole: bool = False
) -> tuple[list[float], int]:
    """Pretended seconds without a tick while somebody is live, and ticks during the decoding.

    One picture ends after two steps and is decoded in twenty pieces; another has forty steps.
    """
    now, model = [0.0], toy_model()
    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic)
    monkeypatch.setattr("safelight.engine.time", clock)
    unet = model.unet
    assert isinstance(unet, ToyUNet)

    def passed(seconds: float) -> None:
        now[0] += seconds

    unet.before = lambda: passed(step)
    plain, decoded = model.vae.decode, list[float]()

    def decoding(latents: Any) -> Any:
        decoded.append(now[0])
        for _ in range(20):
            passed(piece)
            yield
        decoded.append(now[0])
        return plain(latents)

    monkeypatch.setattr(model.runtime, "decoding", decoding)
    generator = Generator(model)
    ticks = list[float]()
    worker = Worker(generator)
    if whole:
        generator.breathe = lambda: None
    try:
        go, tick = threading.Event(), generator.engine._tick

        def ticked(live: Any) -> None:
            go.wait(30)
            began = now[0]
            tick(live)
            ticks.extend((began, now[0]))

        generator.engine._tick = ticked  # type: ignore[method-assign]
        spec = model.spec
        how = {"prompt": "a cube", "sampler": "euler", "guidance_scale": 1.0}
        jobs = [
            Job("toy", [GenerateRequest.from_kwargs(**how, seed=k, steps=steps).resolved(spec)])
            for k, steps in enumerate((40, 2))
        ]
        for job in jobs:
            worker.submit(job)
        time.sleep(0.05)
        go.set()
        end = time.monotonic() + 30
        while not all(job.status.final for job in jobs):
            assert time.monotonic() < end
            time.sleep(0.002)
        assert all(job.status is Status.completed for job in jobs)
    finally:
        worker.close()
    gaps = [after - before for before, after in zip(ticks[1::2], ticks[2::2], strict=False)]
    during = sum(decoded[0] < tick < decoded[1] for tick in ticks[::2])
    return gaps, during


@pytest.mark.parametrize(("step", "piece"), [(10.0, 1.0), (10.0, 4.0), (10.0, 10.0), (3.0, 0.5)])
def test_decoding_delays_a_step_by_one_steps_time_at_most(
    monkeypatch: pytest.MonkeyPatch, step: float, piece: float
) -> None:
    gaps, during = pauses(monkeypatch, step=step, piece=piece)
    assert max(gaps) <= step + 1e-9
    assert during >= 20 * piece / step - 1


def test_a_piece_longer_than_a_step_delays_by_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps, _ = pauses(monkeypatch, step=1.0, piece=5.0)
    assert max(gaps) <= 5.0 + 1e-9


def test_decoding_at_once_would_hold_everybody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps, during = pauses(monkeypatch, step=10.0, piece=4.0, whole=True)
    assert max(gaps) >= 80
    assert during == 0


def test_a_cancelled_one_is_not_carried_on_by_anothers_decoding() -> None:
    """Ticks that a decoding makes ask every picture first whether it is wanted."""
    model = toy_model()
    generator = Generator(model)
    worker = Worker(generator)
    try:
        spec = model.spec
        how = {"prompt": "a cube", "sampler": "euler"}
        long, short = (
            Job("toy", [GenerateRequest.from_kwargs(**how, seed=k, steps=n).resolved(spec)])
            for k, n in enumerate((500, 3))
        )
        steps, plain = list[int](), model.vae.decode

        def decoding(latents: Any) -> Any:
            long.cancel()
            unet = model.unet
            assert isinstance(unet, ToyUNet)
            before = len(unet.calls)
            for _ in range(20):
                generator.engine._ended = 0.0  # a tick is due after every piece
                yield
            steps.append(len(unet.calls) - before)
            return plain(latents)

        model.runtime.decoding = decoding  # type: ignore[method-assign]
        for job in (long, short):
            worker.submit(job)
        end = time.monotonic() + 30
        while not (long.status.final and short.status.final):
            assert time.monotonic() < end
            time.sleep(0.002)
        assert long.status is Status.cancelled
        assert steps[0] == 0
    finally:
        worker.close()
