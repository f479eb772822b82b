"""A run is the same however often it was stopped, and by what."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_micro import (
    ROWS,
    Killed,
    contents,
    dying,
    full,
    generator,
    manifest,
    options,
    run,
    write,
)
from PIL import Image

from micro_models import ToyUNet, toy_model
from safelight import provenance
from safelight.batch import keeper, ledger, runner, window
from safelight.batch.rows import seed_of
from safelight.errors import InvalidRequest, ModelNotFound, SafelightError
from safelight.generate import Cancel, Generator
from safelight.request import GenerateRequest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(write(folder / "rows.jsonl"), folder / "out")
    return folder / "out"


def same(folder: Path, whole: Path) -> None:
    assert manifest(folder) == manifest(whole)
    assert contents(folder) == contents(whole)


def stops(cancel: Cancel) -> Any:
    """Stop when the first row is done."""
    return lambda row: cancel.set() if row["status"] == "done" else None


def test_a_row_of_the_manifest_for_each_row_of_the_file_in_order(whole: Path) -> None:
    rows = manifest(whole)
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["line"] for row in rows] == [f"line {k}" for k in range(1, 8)]
    assert [row["status"] for row in rows] == [*["done"] * 4, "failed", "done", "done"]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS]
    assert rows[3]["seeds"] == [40, 41, 42]
    assert rows[3]["files"] == ["000004-40.png", "000004-41.png", "000004-42.png"]
    assert rows[0]["seeds"] == [seed_of(1, 1)]
    assert rows[4]["error"]["field"] == "steps"
    assert "whole number" in rows[4]["error"]["problem"]
    assert set(contents(whole)) == {"batch.json", *(n for row in rows for n in row["files"])}


def test_pictures_are_those_of_generate_and_carry_their_settings(whole: Path) -> None:
    lone = generator()
    for row in manifest(whole):
        for name in row["files"]:
            read = provenance.read(whole / name)
            (result,) = lone.generate(request=read.request)
            assert result.image is not None
            with Image.open(whole / name) as image:
                assert np.array_equal(np.asarray(image), np.asarray(result.image))
            assert read.parameters.startswith(row["prompt"])
            # The row's own request, as the manifest has it, is that of its first picture.
            asked = GenerateRequest.from_json(row["request"])
            assert asked.picture(row["files"].index(name)) == read.request


def test_without_deterministic_pictures_share_calls_and_are_within_one(
    tmp_path: Path, whole: Path
) -> None:
    toy = toy_model()
    file = write(tmp_path / "rows.jsonl")
    run(
        file,
        tmp_path / "out",
        fields={"deterministic": False},
        loader=lambda *_, **__: Generator(toy),
    )
    assert isinstance(toy.unet, ToyUNet)
    assert max(toy.unet.calls) > 8  # pictures of different rows, two branches each
    for row in manifest(whole):
        for name in row["files"]:
            with Image.open(whole / name) as a, Image.open(tmp_path / "out" / name) as b:
                gap = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))
            assert gap.max() <= 1


def test_killed_anywhere_it_goes_on(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "rows.jsonl")
    for at in itertools.count(1):
        folder = tmp_path / f"killed-{at}"
        try:
            with dying(at, monkeypatch):
                run(file, folder)
            break  # it ended before its death
        except Killed:
            run(file, folder)
            same(folder, whole)
    assert at > 20


def test_killed_again_and_again_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(
        tmp_path / "rows.jsonl", [{"prompt": f"a cube {k}", "steps": 1} for k in range(30)]
    )
    whole = tmp_path / "whole"
    run(file, whole)
    for every in (20, 24, 31):  # more than one sync of the manifest takes
        folder = tmp_path / f"every-{every}"
        for lives in itertools.count():
            assert lives < 40
            try:
                with dying(every, monkeypatch):
                    run(file, folder)
                break
            except Killed:
                continue
        assert lives > 1
        same(folder, whole)


def test_finished_pictures_of_an_unfinished_row_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "a cube", "count": 20, "steps": 3, "seed": 5, "sampler": "ddim"}]
    file = write(tmp_path / "rows.jsonl", rows)
    with dying(30, monkeypatch), pytest.raises(Killed):
        run(file, tmp_path / "out", live=1)
    toy = toy_model()
    kept = runner.Run(options(file, tmp_path / "out"))
    have = len(kept.book.partial[1])
    assert 2 <= have < 20
    kept.finish(runner.Local(loader=lambda *_, **__: Generator(toy)))
    assert isinstance(toy.unet, ToyUNet)
    assert len(toy.unet.calls) == (20 - have) * 3
    assert manifest(tmp_path / "out")[0]["seeds"] == list(range(5, 25))


@pytest.mark.parametrize("at", [4, 5, 7, 9])
def test_a_full_disk_stops_it_and_keeps_what_is_made(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    file = write(tmp_path / "rows.jsonl")
    with full(at, monkeypatch), pytest.raises(ledger.DiskFull, match="Make room, and run the same"):
        run(file, tmp_path / "out")
    for row in manifest(tmp_path / "out"):
        assert all((tmp_path / "out" / name).stat().st_size for name in row["files"])
    run(file, tmp_path / "out")
    same(tmp_path / "out", whole)


def test_a_folder_of_another_run_is_refused(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    file = write(tmp_path / "rows.jsonl")
    for changes, words in [
        ({"seed": 2}, "seed was 1, now 2"),
        ({"fields": {"steps": 3}}, "steps was not given, now 3"),
        ({"model": "other"}, "model was tiny, now other"),
        ({"saving": window.Saving("JPEG")}, "format was PNG, now JPEG"),
        ({"ignore": True}, "ignore_columns was False, now True"),
    ]:
        with pytest.raises(InvalidRequest, match=words):
            run(file, folder, **changes)
    run(file, folder, seed=None)  # taken from the folder
    same(folder, whole)
    write(file, ROWS[:-1])
    with pytest.raises(InvalidRequest, match=r"rows\.jsonl has changed.*--restart"):
        run(file, folder)
    other = write(tmp_path / "other.jsonl", ROWS[:-1])
    with pytest.raises(InvalidRequest, match=r"its file was rows\.jsonl"):
        run(other, folder)
    assert contents(folder) == contents(whole)  # nothing was touched


def test_restart_forgets_the_pictures_too(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    (folder / "mine.txt").write_text("not the run's")
    run(write(tmp_path / "rows.jsonl", ROWS[:2]), folder, restart=True, seed=9)
    assert len(manifest(folder)) == 2
    assert set(contents(folder)) == {
        *("batch.json", "mine.txt"),
        *(f"{k:06d}-{seed_of(9, k)}.png" for k in (1, 2)),
    }


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures do not run ahead of their files: a slow disk must not let all rows end first."""
    monkeypatch.setattr(keeper, "_WAITING", 1)


@pytest.mark.usefixtures("hasty")
def test_other_weights_are_noticed(tmp_path: Path) -> None:
    file, cancel = write(tmp_path / "rows.jsonl"), Cancel()
    one, other = toy_model(), toy_model()
    one.digest, other.digest = "1" * 64, "2" * 64
    run(
        *(file, tmp_path / "out", stops(cancel), cancel),
        loader=lambda *_, **__: Generator(one),
        live=1,
    )
    state = json.loads((tmp_path / "out" / "batch.json").read_text())
    assert state["models"] == {"tiny": "1" * 64}
    with pytest.raises(SafelightError, match="its weights have changed"):
        run(file, tmp_path / "out", loader=lambda *_, **__: Generator(other))


@pytest.mark.usefixtures("hasty")
def test_cancelled_it_ends_at_once_and_goes_on(tmp_path: Path, whole: Path) -> None:
    file = write(tmp_path / "rows.jsonl")
    cancel = Cancel()

    summary = run(file, tmp_path / "out", stops(cancel), cancel, live=1)
    assert summary.cancelled
    assert 0 < summary.finished < 7
    assert 0 < summary.pictures <= len([*(tmp_path / "out").glob("*.png")])
    again = run(file, tmp_path / "out")
    assert again.before == summary.finished
    assert not again.cancelled
    same(tmp_path / "out", whole)


def test_a_folder_is_one_run_s_at_a_time(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl")
    first = runner.Run(options(file, tmp_path / "out"))
    with pytest.raises(InvalidRequest, match="in use by another run"):
        runner.Run(options(file, tmp_path / "out"))
    first.finish(runner.Local(loader=lambda *_, **__: generator()))


def test_a_damaged_manifest_is_not_built_on(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    file, path = write(tmp_path / "rows.jsonl"), folder / ledger.MANIFEST
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{broken\n", *lines[2:]]))
    with pytest.raises(SafelightError, match="is damaged"):
        run(file, folder)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(SafelightError, match="has row 3 where 2 belongs"):
        run(file, folder)
    run(file, folder, restart=True)
    assert manifest(folder) == manifest(whole)


def test_rows_of_several_models_in_one_file(tmp_path: Path) -> None:
    names = ["one", "two", "one", "none", "two", "none", "one"]
    rows = [{"prompt": "a cube", "steps": 1, "model": name} for name in names]
    rows[2]["prompt"], rows[2]["steps"] = "a cone", 0
    file, loaded = write(tmp_path / "rows.jsonl", rows), []

    def loader(name: str, **_: Any) -> Generator:
        loaded.append(name)
        if name == "none":
            raise ModelNotFound(f"no model {name!r}")
        return generator()

    run(file, tmp_path / "out", loader=loader, model="one")
    assert loaded == ["one", "two", "none"]  # each once
    rows = manifest(tmp_path / "out")
    assert [row["model"] for row in rows] == names
    failed = {row["row"]: row["error"]["field"] for row in rows if row["status"] == "failed"}
    assert failed == {3: "steps", 4: "model", 6: "model"}
    with pytest.raises(ModelNotFound):
        run(file, tmp_path / "other", loader=loader, model="none")


def test_what_the_model_cannot_do_is_its_row_s_fault(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a cube", "noise_level": 5, "count": 3},
        {"prompt": "a cube", "width": 40 + 8192 // 2},
        {"prompt": "a cube", "steps": 1},
    ]
    run(write(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    made = manifest(tmp_path / "out")
    assert [row["status"] for row in made][::2] == ["failed", "done"]
    assert made[0]["error"]["field"] == "noise_level"


def test_one_picture_s_numbers_cost_no_other(tmp_path: Path) -> None:
    toy = toy_model()
    assert isinstance(toy.unet, ToyUNet)
    calls = itertools.count()
    toy.unet.poison = lambda answer: answer * float("nan") if next(calls) == 3 else answer
    rows = [{"prompt": "a cube", "steps": 2, "count": 2, "seed": 1}] * 2
    summary = run(
        write(tmp_path / "rows.jsonl", rows),
        tmp_path / "out",
        loader=lambda *_, **__: Generator(toy),
        live=1,
    )
    made = manifest(tmp_path / "out")
    assert [row["status"] for row in made] == ["partial", "done"]
    assert made[0]["outcomes"] == ["ok", "nan"]
    assert made[0]["error"]["problem"]
    assert summary.failed == 1


def test_failed_rows_are_tried_again_when_asked_for(tmp_path: Path) -> None:
    rows = [{"prompt": f"a cube {k}", "steps": 2, "count": 2, "seed": 10 * k} for k in range(5)]
    file, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    sick = toy_model()
    assert isinstance(sick.unet, ToyUNet)
    calls = itertools.count()
    sick.unet.poison = lambda answer: answer * float("nan") if next(calls) in (7, 14) else answer
    run(file, out, loader=lambda *_, **__: Generator(sick), live=1)
    before = manifest(out)
    failed = [row["row"] for row in before if row["status"] == "partial"]
    assert len(failed) == 2
    run(file, out)
    assert manifest(out) == before  # not without being asked
    run(file, out, again=True)
    run(file, tmp_path / "whole")
    same(out, tmp_path / "whole")
    after = manifest(out)
    assert all(a == b for a, b in zip(before, after, strict=True) if a["row"] not in failed)


def test_parquet_makes_the_same_pictures(tmp_path: Path, whole: Path) -> None:
    names = ("prompt", "steps", "count", "seed", "width", "height")
    rows = [{**row, "steps": None} if row["steps"] == "many" else row for row in ROWS]
    pq.write_table(
        pa.table({name: [row.get(name) for row in rows] for name in names}),
        tmp_path / "rows.parquet",
    )
    run(tmp_path / "rows.parquet", tmp_path / "out")
    for row in manifest(whole):
        for name in row["files"]:
            assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


def test_the_page_and_the_sheet_show_what_was_made(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "<script>alert(1)</script>", "steps": 1}]
    summary = run(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", page=True, csv=True)
    page = (tmp_path / "out" / "index.html").read_text()
    assert summary.page == tmp_path / "out" / "index.html"
    assert "<script>" not in page
    for row in manifest(tmp_path / "out"):
        for name in row["files"]:
            assert f'src="{name}"' in page
    assert "steps must be a whole number" in page
    lines = (tmp_path / "out" / "manifest.csv").read_text().splitlines()
    assert len(lines) == 9
    assert lines[4].startswith("4,line 4,done,tiny,a blue sphere,000004-40.png 000004-41.png")


def calls_of(folder: Path, sides: tuple[int, ...]) -> tuple[list[int], int]:
    """Pictures in each network call of 64 rows of different steps, and how many were asked for."""
    toy = toy_model()
    rows = [
        {"prompt": "a cube", "steps": 4 + k % 5, "width": sides[k % len(sides)], "height": 16}
        for k in range(64)
    ]
    run(
        write(folder / "rows.jsonl", rows),
        folder / "out",
        loader=lambda *_, **__: Generator(toy),
        live=8,
        fields={"deterministic": False, "guidance_scale": 1, "sampler": "ddim"},
    )
    assert [row["row"] for row in manifest(folder / "out")] == list(range(1, 65))
    assert isinstance(toy.unet, ToyUNet)
    return toy.unet.calls, sum(row["steps"] for row in rows)


def test_the_engine_is_full_whatever_steps_rows_take(tmp_path: Path) -> None:
    calls, asked = calls_of(tmp_path, (16,))
    assert sum(calls) == asked
    assert calls.count(8) >= 0.85 * len(calls), calls


def test_rows_of_one_shape_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, asked = calls_of(tmp_path / "together", (16, 32))
    monkeypatch.setattr(window, "_PATIENCE", 0)
    apart, _ = calls_of(tmp_path / "apart", (16, 32))
    assert sum(together) == sum(apart) == asked
    assert len(together) <= 0.75 * len(apart), (len(together), len(apart))


def test_memory_is_bounded_by_the_window_not_by_the_file(tmp_path: Path) -> None:
    """No more rows are read than the window and the keeper can hold."""
    rows = [{"prompt": "a cube", "steps": 1} for _ in range(400)]
    file = write(tmp_path / "rows.jsonl", rows)
    made = runner.Run(options(file, tmp_path / "out"))
    read, done, most = 0, 0, 0
    lock = threading.Lock()

    class Counting(runner.Local):
        def make(self, model: str, tasks: Any, cancel: Cancel) -> Any:
            def counted() -> Any:
                nonlocal read, most
                for task in tasks:
                    with lock:
                        read += 1
                        most = max(most, read - done)
                    yield task

            return super().make(model, counted(), cancel)

    def heard(_: Any) -> None:
        nonlocal done
        with lock:
            done += 1

    made.finish(Counting(loader=lambda *_, **__: generator()), None, heard)
    assert done == 400
    assert most <= window.LOOK_AHEAD + 16 + 2 * 64 + 2


def test_the_state_is_readable(whole: Path) -> None:
    state = json.loads((whole / "batch.json").read_text())
    assert state["schema"] == 1
    assert state["input"]["rows"] == 7
    assert state["seed"] == 1
