"""Several models: loaded when they are asked for or at the start, unloaded where memory is short;
and what is measured of them."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from micro_models import micro_model, toy_model
from micro_systems import system
from safelight.generate import Generator
from safelight.serve import memory, tuning
from safelight.serve.models import Models
from serving_micro import Client, serving, toy_house

FEW = {"prompt": "a red cube", "steps": 3, "sampler": "euler", "seed": 1}
NAMES = ("a", "b", "c")


class Shelf:
    """Models of a pretended size."""

    def __init__(self, bound: float | None = None, **sizes: int) -> None:
        self.sizes, self.loads = sizes, []
        self.models = Models(NAMES, self.load, bound=bound, used=self.used)

    def load(self, name: str) -> Generator:
        self.loads.append(name)
        return Generator(toy_model())

    def used(self) -> int:
        made = self.models.loaded() if hasattr(self, "models") else {}
        return sum(self.sizes.get(name, 10) for name in made)


def test_the_least_recently_used_goes_first_and_only_when_needed() -> None:
    shelf = Shelf(bound=25)
    try:
        for name in ("a", "b"):
            shelf.models.get(name)
        shelf.models.get("a").used = time.monotonic() + 1
        assert set(shelf.models.loaded()) == {"a", "b"}
        shelf.models.get("c")
        assert set(shelf.models.loaded()) == {"a", "c"}
        shelf.models.get("a").used = 0
        shelf.models.get("b")
        assert set(shelf.models.loaded()) == {"b", "c"}
        assert shelf.loads == ["a", "b", "c", "b"]
    finally:
        shelf.models.close(0)


def test_what_is_used_stays_whatever_the_bound() -> None:
    shelf = Shelf(bound=5)
    try:
        with shelf.models.using("a") as first:
            with shelf.models.using("b"):
                assert set(shelf.models.loaded()) == {"a", "b"}
            assert not shelf.models.unload("a")
            assert first.alive
        assert shelf.models.unload("a")
        assert not shelf.models.unload("a")
    finally:
        shelf.models.close(0)


def test_no_bound_keeps_all() -> None:
    shelf = Shelf()
    try:
        for name in NAMES:
            shelf.models.get(name)
        assert set(shelf.models.loaded()) == set(NAMES)
    finally:
        shelf.models.close(0)


def test_many_threads_load_once_and_lose_no_job() -> None:
    """A bound that makes every model push the other out, under load."""
    house = toy_house(model=toy_model(), models=NAMES)
    house.models.bound = 1
    house.models._used = lambda: 10 * len(house.models._workers)
    with serving(house) as client:
        bodies = [{**FEW, "model": NAMES[k % 3], "seed": k} for k in range(18)]
        answers: list[int] = []
        ask = lambda body: answers.append(client.post("/v1/images/generations", body).status)  # noqa: E731
        threads = [threading.Thread(target=ask, args=(body,)) for body in bodies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert answers == [200] * 18


def test_an_unloaded_model_comes_back_with_the_same_pictures() -> None:
    house = toy_house(model=toy_model())
    with serving(house) as client:
        first = client.post("/v1/images/generations", FEW).json["data"][0]["b64_json"]
        until = time.monotonic() + 10
        while not house.models.unload("toy"):
            assert time.monotonic() < until
        assert house.loaded() == {}
        assert client.get("/readyz").status == 200, "it was ready, and will be again"
        assert client.post("/v1/images/generations", FEW).json["data"][0]["b64_json"] == first


def test_lazily_and_at_the_start() -> None:
    for load, wanted in (("lazy", {"toy"}), ("start", {"toy", "owner/other"})):
        with serving(toy_house(model=toy_model(), load=load)) as client:
            until = time.monotonic() + 10
            while client.get("/readyz").status != 200:
                assert time.monotonic() < until
                time.sleep(0.01)
            assert set(client.get("/readyz").json["loaded"]) == wanted


def test_a_model_that_does_not_load_is_not_ready_and_alive() -> None:
    house = toy_house(model=toy_model(), azureml=False)  # which would not start

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("planted")

    house._loader = broken
    with serving(house) as client:
        assert client.get("/healthz").status == 200
        assert client.get("/readyz").status == 503
        assert client.post("/v1/jobs", FEW).status == 500
        house._loader = lambda *_, **__: Generator(toy_model())
        assert client.post("/v1/images/generations", FEW).status == 200
        assert client.get("/readyz").status == 200


def test_memory_is_read() -> None:
    before = memory.resident_bytes()
    assert 2**20 < before < 2**45
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert memory.resident_bytes() > before + 32 * 2**20
    del block
    memory.give_back()
    assert memory.resident_bytes() < before + 32 * 2**20
    assert memory.device_bytes() >= 0


# -- the size of a call ---------------------------------------------------------------------------


def test_the_smallest_size_that_does_nearly_best() -> None:
    assert tuning.best({2: 1.0, 4: 1.0, 8: 1.9, 16: 4.0}) == 8
    assert tuning.best({2: 1.0, 4: 1.0, 8: 1.999, 16: 4.0}) == 4
    assert tuning.best({2: 1.0, 4: 1.99, 8: 3.97}) == 2
    assert tuning.best({}) == tuning.SIZES[0]


@pytest.mark.parametrize(
    ("seconds", "tried"),
    [
        (lambda rows: 1e-3 * rows, [2, 4, 8, 16, 32]),
        (lambda rows: 1e-3 * rows**2, [2, 4, 8]),  # worse twice
        (lambda rows: 8.0, [2]),  # too slow to try more
    ],
)
def test_measuring_ends(seconds: Any, tried: list[int]) -> None:
    now = [0.0]

    def call(rows: int) -> None:
        now[0] += seconds(rows)

    assert list(tuning.measure(call, clock=lambda: now[0])) == tried


def test_measuring_stops_where_memory_ends() -> None:
    def call(rows: int) -> None:
        if rows > 4:
            raise MemoryError

    assert list(tuning.measure(call)) == [2, 4]


@pytest.mark.parametrize(
    "family", ["sd-v1", "image-variations", "unclip", "depth", "inpaint", "x4-upscaler"]
)
def test_every_system_is_measured_once_and_remembered(tmp_path: Path, family: str) -> None:
    generator = system(family)
    rows = tuning.tune(generator, "toy", tmp_path)
    (key,) = kept = json.loads((tmp_path / "tuning.json").read_text())
    assert kept[key] == rows
    assert rows in tuning.SIZES
    (tmp_path / "tuning.json").write_text(json.dumps({key: 16}))
    calls: list[int] = []
    predict = generator.model.runtime.predict
    generator.model.runtime.predict = lambda given: (calls.append(len(given)), predict(given))[1]  # type: ignore
    assert tuning.tune(generator, "toy", tmp_path) == 16
    assert calls == [16], "warmed up, not measured"
    cells = (generator.model.spec.native_size // generator.model.spec.vae.factor) ** 2
    assert (generator.engine.max_cells, generator.batch_cells) == (16 * cells, 8 * cells)


def test_a_broken_cache_is_measured_again_and_a_locked_one_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "tuning.json").write_text("no json")
    generator = Generator(micro_model())
    assert tuning.tune(generator, "toy", tmp_path) in tuning.SIZES
    blocked = tmp_path / "tuning.json" / "below a file"
    assert tuning.tune(generator, "toy", blocked) in tuning.SIZES


def test_no_picture_hangs_on_the_size() -> None:
    made: list[Any] = []
    for rows in (None, 2, 32):
        generator = Generator(micro_model())
        if rows is not None:
            generator.engine.max_cells = rows * 16
            generator.batch_cells = rows * 8
        results = generator.generate("a red cube", seed=1, count=3, steps=3)
        same = generator.generate("a red cube", seed=1, count=2, steps=3, deterministic=True)
        made.append([np.asarray(each.image, np.int16) for each in (*results, *same)])
    for others in made[1:]:
        for k, (ours, theirs) in enumerate(zip(made[0], others, strict=True)):
            assert np.abs(ours - theirs).max() <= (1 if k < 3 else 0)


# -- metrics --------------------------------------------------------------------------------------


def value(client: Client, name: str) -> float:
    text = client.get("/metrics").data.decode()
    found = re.search(rf"^safelight_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not in\n{text}"
    return float(found[1])


def test_what_is_counted() -> None:
    with serving(toy_house(model=toy_model(), max_steps=20)) as client:
        body = {**FEW, "steps": 5, "preview_every": 1, "count": 2}
        client.done(client.post("/v1/jobs", body).json["id"])
        assert client.post("/v1/jobs", {**FEW, "steps": 21}).status == 400
        assert value(client, 'jobs_total{model="toy",status="completed"}') == 1
        assert value(client, 'pictures_total{model="toy",outcome="ok"}') == 2
        assert value(client, 'queue_seconds_count{model="toy"}') == 1
        assert value(client, 'job_seconds_count{model="toy"}') == 1
        assert value(client, 'first_preview_seconds_count{model="toy"}') == 1
        assert value(client, 'step_seconds_count{model="toy"}') == 5
        assert value(client, 'step_pictures_sum{model="toy"}') == 10
        assert value(client, 'call_rows_sum{model="toy"}') == 20
        assert value(client, 'refused_total{reason="invalid_value"}') == 1
        assert value(client, 'loaded{model="toy"}') == 1
        assert value(client, "resident_bytes") > 2**20
        assert value(client, "device_bytes") >= 0
        assert value(client, 'requests_total{route="/v1/jobs",status="202"}') == 1
