"""The same on a local Ray with two workers, one of which dies."""

from __future__ import annotations

import logging
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from batch_micro import manifest, options, run, write

from safelight.batch import runner
from safelight.batch.onray import OnRay, Worker, _blocks, _told
from safelight.batch.window import Task
from safelight.errors import ModelNotFound
from safelight.generate import Generator
from safelight.request import GenerateRequest

TESTS = Path(__file__).parents[1]
ROWS: list[dict[str, Any]] = [
    *({"prompt": f"a red cube, {k}", "steps": 2} for k in range(10)),
    {"prompt": "a cone", "steps": "many"},
    {"prompt": "a blue sphere", "count": 6, "steps": 2},
]


def loader(pids: Path) -> Callable[..., Generator]:
    """Loads the toy where Ray's workers cannot import tests, and says on which process."""
    folder = str(TESTS)

    def load(model: str, **_: Any) -> Generator:
        import os
        import sys

        sys.path.insert(0, folder)
        from micro_models import toy_model
        from safelight.errors import ModelNotFound
        from safelight.generate import Generator

        if model == "none":
            raise ModelNotFound("no model 'none'")
        (pids / str(os.getpid())).touch()
        return Generator(toy_model())

    return load


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers, and room for nothing else."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # or a busy machine starves them
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_a_worker_dies_and_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS)
    run(file, tmp_path / "here")
    pids = tmp_path / "pids"
    pids.mkdir()
    killed: list[int] = []

    def heard(row: dict[str, Any]) -> None:
        if row["status"] == "done" and not killed:
            killed.append(int(next(pids.iterdir()).name))
            os.kill(killed[0], signal.SIGKILL)

    maker = OnRay(workers=2, loader=loader(pids))
    made = runner.Run(options(file, tmp_path / "there"))
    summary = made.finish(maker, None, heard)
    assert killed
    assert len([*pids.iterdir()]) >= 2
    assert manifest(tmp_path / "there") == manifest(tmp_path / "here")
    names = [name for row in manifest(tmp_path / "here") for name in row["files"]]
    assert summary.pictures == len(names) == 16
    for name in names:
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_a_model_that_is_not_there_is_told_and_not_tried_for_ever(tmp_path: Path) -> None:
    worker = Worker("none", {}, None, None, False, loader(tmp_path))
    (told,) = worker({"tasks": [pickle.dumps(list(tasks(1)))]})["made"]
    with pytest.raises(ModelNotFound, match="no model 'none'"):
        _told(told)


def tasks(*counts: int) -> Iterator[Task]:
    for row, count in enumerate(counts, 1):
        yield Task(row, GenerateRequest(prompt="a cube", count=count, seed=1), frozenset())


def test_blocks_are_of_pictures_not_of_rows() -> None:
    done = Task(9, GenerateRequest(prompt="a", count=4, seed=1), frozenset({0, 2}))
    blocks = list(_blocks([*tasks(1, 30, 2), done], workers=2))
    sizes = [sum(task.request.count - len(task.have) for task in block) for block in blocks]
    assert sizes == [5] * 7
    made = [
        (task.row, k) for b in blocks for task in b for k in range(task.request.count)
        if k not in task.have
    ]  # fmt: skip
    assert len(made) == len(set(made)) == 35
    assert (9, 0) not in made
