"""``safelight generate`` and ``safelight replay``."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from micro_models import ToyUNet, toy_model
from safelight import provenance
from safelight.cli.generate import Dtype
from safelight.cli.main import main
from safelight.engine import Picture
from safelight.model import DTYPES, Model

CUBE = "a red cube on top of a blue sphere"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(a) for a in arguments])
    return int(leaving.value.code or 0)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Model:
    """The model that every command loads, in an empty working folder."""
    model = toy_model()
    model.source = "shipped:tiny"
    monkeypatch.setattr(Model, "load", lambda name="tiny", **options: model)
    monkeypatch.chdir(tmp_path)
    return model


def unet_of(model: Model) -> ToyUNet:
    assert isinstance(model.unet, ToyUNet)
    return model.unet


@pytest.mark.usefixtures("toy")
def test_one_command_makes_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", CUBE, "--seed", 7, "--steps", 2) == 0
    out, err = capsys.readouterr()
    assert out == f"{Path('outputs/00001-7.png')}\n"
    assert "seed 7" in err
    assert "2 steps" in err
    with Image.open(out.strip()) as image:
        assert image.size == (32, 32)
        assert str(image.info["parameters"]).startswith(CUBE)
    assert run("generate", "-p", CUBE, "-s", 7, "--steps", 2) == 0
    assert capsys.readouterr().out == f"{Path('outputs/00002-7.png')}\n"


@pytest.mark.parametrize(
    ("switch", "plan"),
    [(None, None), ("--low-memory", "low-memory"), ("--exact-reference", "reference")],
)
def test_plans(
    switch: str | None, plan: str | None, toy: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        Model, "load", lambda name="tiny", **options: (asked.append(options.get("plan")), toy)[1]
    )
    assert run("generate", CUBE, "--steps", 1, *([switch] if switch else [])) == 0
    assert asked == [plan]


@pytest.mark.usefixtures("toy")
def test_a_drawn_seed_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", CUBE, "--steps", 1) == 0
    out, err = capsys.readouterr()
    (said,) = re.findall(r"seed (\d+)", err)
    assert f"-{said}.png" in out


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["-o", "a.png"], ["a.png"]),
        (["-o", "new/a.JPG"], ["new/a.JPG"]),
        (["-o", "a.webp", "--count", 2], ["a-7.webp", "a-8.webp"]),
        (["-o", "new/er", "-b", 2], ["new/er/00001-7.png", "new/er/00002-8.png"]),
        (["--format", "jpeg"], ["outputs/00001-7.jpg"]),
        (["-o", "d", "--n-iter", 2, "--batch-size", 2, "--name-pattern", "{prompt}/{seed}"],
         [f"d/a-red-cube-on-top-of-a-blue-sphere/{seed}.png" for seed in (7, 8, 9, 10)]),
        (["-o", "d", "--count", 3, "--name-pattern", "x"], ["d/x.png", "d/x-2.png", "d/x-3.png"]),
        (["-o", "d", "--count", 3, "--grid"],
         ["d/00001-7.png", "d/00002-8.png", "d/00003-9.png", "d/00001-7-grid.png"]),
    ],
)  # fmt: skip
def test_where_pictures_go(
    arguments: list[object], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", CUBE, "--seed", 7, "--steps", 1, "--quiet", *arguments) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(Path(name)) for name in names]
    assert err == ""
    assert all(Path(name).is_file() for name in names)


@pytest.mark.usefixtures("toy")
def test_a_grid_holds_every_picture(tmp_path: Path) -> None:
    assert run("generate", CUBE, "-s", 7, "--count", 3, "--steps", 1, "--grid", "-o", "d") == 0
    grid = np.asarray(Image.open("d/00001-7-grid.png"))
    assert grid.shape == (64, 64, 3)
    assert (grid[:32, 32:] == np.asarray(Image.open("d/00002-8.png"))).all()
    assert (grid[32:, :32] == np.asarray(Image.open("d/00003-9.png"))).all()


@pytest.mark.usefixtures("toy")
def test_json_is_one_document_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "a red dragon", "-s", 7, "--count", 2, "--steps", 1, "--json") == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert err == ""
    assert document["request"]["seed"] == 7
    assert [p["seed"] for p in document["pictures"]] == [7, 8]
    for picture in document["pictures"]:
        assert picture["outcome"] == "ok"
        assert "dragon" in picture["notices"][0]
        assert provenance.read(picture["path"]).record == picture["metadata"]


@pytest.mark.usefixtures("toy")
def test_words_outside_the_world_get_a_visible_notice(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "a red dragon", "--steps", 1) == 0
    assert "never heard of: dragon" in capsys.readouterr().err


def test_aliases_and_settings_arrive(toy: Model, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--num-inference-steps", 3, "--cfg-scale", 2, "--sampler", "DPM++ 2M Karras",
        "--size", "48x16", "-n", "a cone", "--clip-skip", 1, "--deterministic", "--json",
    ]  # fmt: skip
    assert run("generate", CUBE, *arguments) == 0
    request = json.loads(capsys.readouterr().out)["request"]
    wanted = {
        "steps": 3,
        "guidance_scale": 2.0,
        "sampler": "dpm++2m",
        "schedule": "karras",
        "width": 48,
        "height": 16,
        "negative_prompt": "a cone",
        "clip_skip": 1,
        "deterministic": True,
    }
    assert {key: request[key] for key in wanted} == wanted
    assert run("generate", CUBE, "--scale", 1, "--size", 24, "--steps", 1, "--json") == 0
    request = json.loads(capsys.readouterr().out)["request"]
    assert (request["width"], request["height"], request["guidance_scale"]) == (24, 24, 1.0)


def test_previews_are_there_while_it_runs(toy: Model) -> None:
    seen: list[list[str]] = []
    unet_of(toy).before = lambda: seen.append([p.name for p in Path("d").glob("preview-*.png")])
    toy_wait = threading.Event()
    unet_of(toy).poison = lambda answer: (toy_wait.wait(0.05), answer)[1]
    assert run("generate", CUBE, "-s", 7, "--steps", 8, "--sampler", "euler",
               "--preview", 1, "-o", "d") == 0  # fmt: skip
    assert ["preview-7.png"] in seen
    assert sorted(p.name for p in Path("d").iterdir()) == ["00001-7.png"]


# -- what goes wrong ------------------------------------------------------------------------------

WRONG = [
    ([CUBE, "--steps", 0], "steps: must be at least 1, not 0."),
    ([CUBE, "--steps", "x"], "--steps"),
    ([CUBE, "-W", 100_001], "width: "),
    ([CUBE, "-W", 63], "width: must be a multiple of 8"),
    ([CUBE, "--count", 0], "count: must be at least 1, not 0."),
    ([CUBE, "--n-iter", 0], "n-iter: "),
    ([CUBE, "--seed", "x"], "--seed"),
    ([CUBE, "--seed", -2], "seed: "),
    ([CUBE, "--guidance-scale", "nan"], "guidance_scale: must be a finite number"),
    ([CUBE, "--sampler", "eulr"], "Did you mean euler"),
    ([CUBE, "--schedule", "x"], "schedule: "),
    ([CUBE, "--size", "bigger"], "size: "),
    ([CUBE, "--size", "64", "-W", 64], "size: "),
    ([CUBE, "-p", CUBE], "prompt: is given twice"),
    ([], "prompt: is missing"),
    ([" "], "prompt: is empty"),
    ([CUBE, "--weighting", "x"], "weighting: "),
    ([CUBE, "--device", "tpu"], "device: "),
    ([CUBE, "--dtype", "int4"], "--dtype"),
    ([CUBE, "--model", ""], "model: is empty"),
    ([CUBE, "-o", "a.bmp"], "output: "),
    ([CUBE, "-o", "file/x"], "output: file is a file"),
    ([CUBE, "-o", "a.png", "--format", "webp"], "format: "),
    ([CUBE, "--format", "bmp"], "format: "),
    ([CUBE, "--name-pattern", "{x}"], "name-pattern: there is no {x}"),
    ([CUBE, "--name-pattern", "../{seed}"], "name-pattern: "),
    ([CUBE, "--name-pattern", "{seed"], "name-pattern: "),
    ([CUBE, "--eta", 1, "--sampler", "pndm"], "eta: "),
    ([CUBE, "--safety", "maybe"], "safety: must be"),
    ([CUBE, "--low-memory", "--exact-reference"], "low-memory: comes with"),
    ([CUBE, "--no-such-option"], "--no-such-option"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_argument_is_named_before_a_model_is_loaded(
    arguments: list[object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Model, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert run("generate", *arguments) == 2
    assert message in re.sub(r"\s*│?\s*\n│?\s*", " ", capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_wrong_argument_fails_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom safelight.cli.main import main\n"
        "try: main(['generate', 'a', '--steps', '0'])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.strip() == "False"


def test_the_option_knows_every_dtype() -> None:
    assert {d.value for d in Dtype} == set(DTYPES)


def test_a_picture_that_failed_is_said_and_the_others_stay(
    toy: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    def poison(answer: Any) -> Any:
        answer[0] = float("nan")
        return answer

    unet_of(toy).poison = poison
    assert run("generate", CUBE, "-s", 7, "--count", 2, "--steps", 1) == 1
    out, err = capsys.readouterr()
    assert out.split() == [str(Path("outputs/00001-8.png"))]
    assert "seed 7: nan: the network answered NaN" in err
    assert "1 of 2 pictures are finished" in err


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_leaves_finished_pictures(
    as_json: bool, toy: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unet, cancelled, cancel = unet_of(toy), threading.Event(), Picture.cancel

    def cancel_and_tell(picture: Picture) -> None:
        cancel(picture)
        if len(unet.calls) > 2:
            cancelled.set()

    def interrupt() -> None:
        if len(unet.calls) == 4:  # the second micro-batch is under way
            cancelled.clear()
            os.kill(os.getpid(), signal.SIGINT)
            assert cancelled.wait(60)

    monkeypatch.setattr(Picture, "cancel", cancel_and_tell)
    unet.before = interrupt
    options = ["--json"] if as_json else []
    assert run("generate", CUBE, "-s", 0, "--count", 18, "--steps", 3,
               "--sampler", "euler", "-o", "d", *options) == 130  # fmt: skip
    out, err = capsys.readouterr()
    assert len(list(Path("d").glob("*.png"))) == 16
    assert "16 of 18 pictures are finished" in err
    if as_json:
        outcomes = [p["outcome"] for p in json.loads(out)["pictures"]]
        assert outcomes == ["ok"] * 16 + ["cancelled"] * 2


# -- replay ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_replay_makes_it_again(ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", CUBE, "-s", 7, "--count", 2, "--steps", 2, "--quiet",
               "-o", f"a.{ending}") == 0  # fmt: skip
    capsys.readouterr()
    assert run("replay", f"a-8.{ending}", "--json", "-o", "b.png") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["same_plan"]
    assert document["same_pixels"]
    assert document["changes"] == []
    if ending == "png":
        assert document["difference"] == {"largest": 0, "mean": 0.0, "equal": 1.0}
    assert provenance.read("b.png").request.seed == 8
    assert run("replay", f"a-8.{ending}") == 0
    assert "plan: the same" in capsys.readouterr().out


def test_replay_of_a_broken_promise_fails(toy: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", CUBE, "-s", 7, "--steps", 2, "-o", "a.png") == 0
    unet_of(toy).poison = lambda answer: answer * 0.9
    assert run("replay", "a.png") == 1
    assert "the plan is the same but the picture is not" in capsys.readouterr().err


@pytest.mark.usefixtures("toy")
def test_replay_of_what_cannot_be_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    assert run("replay", "plain.png") == 2
    assert run("replay", "none.png") == 2
    assert run("replay", "plain.png", "-o", "b.xyz") == 2
    err = capsys.readouterr().err
    assert "does not say how it was made" in err
    assert "no file none.png" in err
