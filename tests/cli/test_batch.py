"""``safelight batch`` as people use it, and as they end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from batch_micro import manifest, write

from micro_models import micro_model, toy_model
from safelight.cli.main import main
from safelight.model import Model
from safelight.store.folder import write_folder

ROWS = [{"prompt": f"a red cube {k}", "steps": 12 + k % 5} for k in range(12)]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(a) for a in arguments])
    return int(leaving.value.code or 0)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Model:
    """The model that every command loads, in an empty working folder."""
    model = toy_model()
    monkeypatch.setattr(Model, "load", lambda name="tiny", **options: model)
    monkeypatch.chdir(tmp_path)
    return model


@pytest.mark.usefixtures("toy")
def test_a_csv_and_options_behind_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,CFG scale,Steps\na cube,2.5,\na cone,,3\n")
    given = ("batch", "a.csv", "-o", "out", "--steps", 2, "--seed", 1, "--set", "clip-skip=1")
    assert run(*given, "--csv") == 0
    out, err = capsys.readouterr()
    assert out == f"{Path('out/manifest.jsonl')}\n"
    assert "2 of 2 rows (2 done), 2 pictures, 2 of them now" in err
    one, two = (row["request"] for row in manifest(tmp_path / "out"))
    assert (one["steps"], one["guidance_scale"]) == (2, 2.5)
    assert (two["steps"], two["clip_skip"]) == (3, 1)
    assert run(*given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["this_run"]["pictures"] == 0
    assert found["pictures"] == 2
    assert found["statuses"] == {"done": 2}
    assert run(*given, "--steps", 3) == 2
    assert "steps was 2, now 3" in capsys.readouterr().err


@pytest.mark.usefixtures("toy")
def test_a_failed_row_is_told_and_the_exit_code_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a cube --steps 2\na cone --steps none\n")
    assert run("batch", "a.txt", "-o", "out", "--dry-run") == 1
    said = capsys.readouterr()
    assert "row 2, line 2: steps: must be a whole number" in said.out
    assert "1 of 2 rows are right" in said.out
    assert not (tmp_path / "out").exists()
    assert run("batch", "a.txt", "-o", "out") == 1
    err = capsys.readouterr().err
    assert "row 2, line 2: steps: must be a whole number" in err
    assert "1 of 2 rows failed" in err
    assert (tmp_path / "out" / "index.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.csv"], "no file none.csv"),
        (["a.csv", "--steps", "0"], "steps: must be at least 1"),
        (["a.csv", "--set", "stepps=2"], "Did you mean steps?"),
        (["a.csv", "--steps", "2", "--set", "steps=2"], "is given twice"),
        (["a.csv", "--format", "gif"], "png, jpeg or webp"),
        (["a.csv", "--engine", "spark"], "local or ray"),
        (["a.csv", "--workers", "2"], "is for --engine ray"),
        (["a.csv", "--device", "gpu"], "cpu, cuda, mps"),
        (["b.csv"], "promt: is no column that is known in b.csv. Did you mean prompt?"),
        (["a.csv", "-o", "a.csv"], "is a file, not a folder"),
        (["a.csv", "-o", "a.csv/out"], "lies in a file"),
    ],
)
def test_wrong_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Model, "load", None)  # nothing is loaded
    (tmp_path / "a.csv").write_text("prompt\na\n")
    (tmp_path / "b.csv").write_text("promt\na\n")
    output = () if "-o" in arguments else ("-o", "out")
    assert run("batch", *arguments, *output) == 2
    assert words in capsys.readouterr().err


# -- a process of its own, ended by signals --------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder of random weights, a file of rows, and what an unharmed run makes."""
    at = tmp_path_factory.mktemp("batch")
    model = micro_model()
    states = {part: net.state_dict() for part, net in model.networks.items()}
    write_folder(at / "model", model.spec, states, model.tokenizer)
    write(at / "rows.jsonl", ROWS)
    assert start(at, at / "whole").wait(120) == 0
    return at


def start(folder: Path, output: Path, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "safelight", "batch", str(folder / "rows.jsonl")]
    command += ["-o", str(output), "-m", str(folder / "model"), "--seed", "1", "--deterministic"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def wait_for(output: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until so many pictures are there."""
    while process.poll() is None and len([*output.glob("*.png")]) < count:
        time.sleep(0.002)


def test_killed_without_a_word_it_goes_on(folder: Path) -> None:
    output = folder / "killed"
    process = start(folder, output)
    wait_for(output, 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGKILL, 0)  # it may have been faster
    assert start(folder, output).wait(120) == 0
    assert manifest(output) == manifest(folder / "whole")
    assert pictures(output) == pictures(folder / "whole")
    assert not [*output.glob(".*.part")]


def test_ctrl_c_stops_it_with_a_word(folder: Path) -> None:
    output = folder / "stopped"
    process = start(folder, output)
    wait_for(output, 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    if process.returncode == 0:  # it was faster
        assert len(manifest(output)) == 12
    else:
        assert process.returncode == 130, err
        assert "run the same command again to go on" in err
        assert out.strip() == str(output / "manifest.jsonl")
        assert "Traceback" not in err
        made = pictures(folder / "whole")
        assert all(made[name] == data for name, data in pictures(output).items())
