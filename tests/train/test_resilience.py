"""Runs that are killed, filled up, damaged or shared by processes end where they would have."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.errors import InvalidRequest, SafelightError
from safelight.nets.unet import UNet
from safelight.spec import UNetSpec
from safelight.train import checkpoint, manifest
from safelight.train.loop import Run
from safelight.train.recipe import OptimRecipe
from safelight.train.remember import forget_activations
from train_micro import Line, line_recipe, train_slowly


def whole_run(folder: Path) -> Run:
    run = Run(line_recipe(folder), Line())
    run.go()
    return run


def assert_same(a: Run, b: Run) -> None:
    for mine, other in ((a.plain, b.plain), (a.ema, b.ema)):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_killed_again_and_again_it_ends_the_same(tmp_path: Path) -> None:
    whole = whole_run(tmp_path / "whole")
    folder = tmp_path / "killed"
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    kills = 0
    for moment in random.Random().choices(range(5, 300), k=3):  # anywhere: each run another place
        child = context.Process(target=train_slowly, args=(str(folder),))
        child.start()
        deadline = time.monotonic() + 120
        while not any(folder.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moment / 1000)
        if child.is_alive():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
    assert kills >= 1, "the first is early enough"
    resumed = whole_run(folder)
    assert_same(whole, resumed)
    logged = [json.loads(line)["seen"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert logged == [160, 320], "what was logged after the last checkpoint is not logged twice"


MOMENTS = ("half written", "not synced", "not named", "not pruned", "not described", "in export")


def die_at(folder: str, moment: str, turn: int) -> None:
    """A run that kills itself at a moment of its ``turn``-th save."""
    turns, save, line = iter(range(100)), torch.save, Line()

    def dying(do: Any, before: bool = True) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            last = next(turns) == turn
            if last and before:
                os.kill(os.getpid(), signal.SIGKILL)
            made = do(*arguments, **named)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return made

        return call

    def half(state: Any, file: Any) -> None:
        if next(turns) < turn:
            return save(state, file)
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    patch = pytest.MonkeyPatch()
    match moment:
        case "half written":
            patch.setattr(checkpoint.torch, "save", half)
        case "not synced":
            patch.setattr(checkpoint.os, "fsync", dying(os.fsync))
        case "not named":
            patch.setattr(checkpoint, "_digest", dying(checkpoint._digest, before=False))
        case "not pruned":
            patch.setattr(checkpoint, "_all", dying(checkpoint._all))
        case "not described":
            patch.setattr(manifest, "write", dying(manifest.write))
        case _:
            patch.setattr(line, "export", dying(line.export, before=False))
    Run(line_recipe(Path(folder)), line).go()


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_inside_a_save_it_ends_the_same(moment: str, tmp_path: Path) -> None:
    turn = zlib.crc32(moment.encode()) % 4 if moment != "in export" else 1
    folder = tmp_path / "killed"
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=die_at, args=(str(folder), moment, turn))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    again = Run(line_recipe(folder), Line())
    assert again.seen > 0 or turn < 2
    again.go()
    assert_same(whole_run(tmp_path / "whole"), again)
    assert len(list(folder.glob("checkpoint*"))) == 2, "pruned, and nothing half written stays"


def run_until_full(folder: str) -> None:
    """A run on a disk that takes no more than 2 kB a file from the 100th picture on."""

    def fill(seen: int, total: int, numbers: Any) -> None:
        if seen > 100:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))

    try:
        Run(line_recipe(Path(folder)), Line(), progress=fill).go()
    except SafelightError as error:
        sys.exit(7 if "intact" in str(error) else 1)


def test_a_file_that_may_not_grow_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """The kernel refuses the bytes, in the middle of what torch writes."""
    folder = tmp_path / "full"
    folder.mkdir()
    child = multiprocessing.get_context("fork").Process(target=run_until_full, args=(str(folder),))
    child.start()
    child.join(120)
    assert child.exitcode == 7
    assert not (folder / "checkpoint.part").exists()
    again = Run(line_recipe(folder), Line())
    assert again.seen == 96
    again.go()
    assert_same(whole_run(tmp_path / "whole"), again)


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = whole_run(tmp_path)
    saved = sorted(tmp_path.glob("checkpoint-*.pt"))
    assert len(saved) == 2, "older ones are pruned"
    data = bytearray(saved[-1].read_bytes())
    data[len(data) // 2] ^= 1  # one bit, which torch.load itself would not notice
    saved[-1].write_bytes(bytes(data))
    with caplog.at_level(logging.WARNING):
        again = Run(line_recipe(tmp_path), Line())
    assert again.seen == 288
    assert "damaged" in caplog.text
    again.go()
    assert_same(whole, again)
    for path in tmp_path.glob("checkpoint-*.pt"):
        path.write_bytes(b"nothing")
    with pytest.raises(SafelightError, match="none of its"):
        Run(line_recipe(tmp_path), Line())


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = whole_run(tmp_path / "whole")
    save, calls = torch.save, []

    def full(state: Any, file: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(SafelightError, match="No space left"):
        Run(line_recipe(tmp_path / "part"), Line()).go()
    monkeypatch.undo()
    assert not (tmp_path / "part" / "checkpoint.part").exists()
    resumed = Run(line_recipe(tmp_path / "part"), Line())
    assert resumed.seen == 96
    resumed.go()
    assert_same(whole, resumed)


def test_the_first_versions_checkpoint_still_resumes(tmp_path: Path) -> None:
    whole = whole_run(tmp_path)
    newest = sorted(tmp_path.glob("checkpoint-*.pt"))[-1]
    newest.rename(tmp_path / "checkpoint.pt")
    for path in tmp_path.glob("checkpoint-*.pt"):
        path.unlink()
    assert_same(whole, Run(line_recipe(tmp_path), Line()))


def test_accumulation_and_batch_are_one_thing(tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {"one": [], "two": []}
    for name, optim in (("one", {"batch": 16}), ("two", {"batch": 8, "accumulation": 2})):
        run = Run(
            line_recipe(tmp_path / name, **optim),
            Line(),
            progress=lambda seen, total, n, name=name: losses[name].append(n["loss"]),
        )
        run.go()
    assert losses["one"] == pytest.approx(losses["two"], rel=1e-4)
    assert len(losses["one"]) == 20


def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    losses: list[float] = []
    recipe = line_recipe(tmp_path / "one", batch=8, processes=2)
    one = Run(recipe, Line(), progress=lambda seen, total, n: losses.append(n["loss"]))
    one.go()
    two = tmp_path / "two"
    two.mkdir()
    script = Path(__file__).parents[1] / "train_micro.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([sys.executable, *launch, str(script), str(two)], check=True, timeout=540)
    said = torch.load(two / "said.pt", weights_only=True)
    assert said["losses"] == pytest.approx(losses, rel=1e-4)
    assert said["again"] == 320, "and resume"
    for name, value in one.plain.state_dict().items():
        torch.testing.assert_close(said["module"][name], value, rtol=1e-4, atol=1e-6)


def test_a_step_is_shared_evenly_or_refused() -> None:
    optim = OptimRecipe(batch=4, accumulation=2, processes=256)
    assert optim.step == 2048
    assert optim.share(256) == (4, 2)
    assert optim.share(64) == (4, 8)
    assert optim.share(1024) == (2, 1)
    with pytest.raises(InvalidRequest, match=r"optim\.batch"):
        optim.share(3)
    assert OptimRecipe.model_validate({"batch": 4, "warmup_steps": 10}).warmup == 40


def test_forgotten_activations_give_the_same_gradients() -> None:
    spec = UNetSpec(
        channels=(8, 16),
        attention=(True, True),
        heads=(2, 2),
        only_cross_attention=(False, False),
        layers_per_block=1,
        context_width=8,
        norm_groups=4,
    )
    torch.manual_seed(0)
    unet = UNet(spec)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8)
    kept: list[int] = []

    def gradients() -> list[torch.Tensor]:
        unet.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel()) or t, lambda t: t
        ):
            loss = unet(x, torch.tensor([3, 900]), context).square().mean()
        loss.backward()
        return [p.grad.clone() for p in unet.parameters() if p.grad is not None]

    plain, before = gradients(), sum(kept)
    kept.clear()
    assert forget_activations(unet) == len(unet.down_blocks) * 2 + 3 + 2 * 2 * 2
    again, after = gradients(), sum(kept)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert after < before / 2


def test_a_run_describes_itself(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_text())
    assert (record["images"], record["steps"], record["data_digest"]) == (320, 20, "line")
    assert record["recipe"]["optim"]["batch"] == 16
    assert record["energy_kwh"] == pytest.approx(
        run.seconds / 3600 * record["hardware"]["watts"] / 1000, rel=0.5
    )
    assert len(record["code"]["digest"]) == 16
