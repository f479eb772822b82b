"""``safelight info``, ``safelight models`` and ``safelight doctor``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from micro_models import MICRO, micro_model, toy_model
from safelight import provenance
from safelight.cli.doctor import devices
from safelight.cli.main import main
from safelight.generate import Generator
from safelight.model import Model
from safelight.store.folder import read_folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(a) for a in arguments])
    return int(leaving.value.code or 0)


@pytest.fixture
def micro(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = micro_model()
    monkeypatch.setattr(Model, "load", lambda name="tiny", **options: model)
    return model


def test_info_of_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = Generator(toy_model()).generate("a red dragon", seed=7, steps=2)
    path = provenance.save(result, tmp_path / "a.jpg")
    assert run("info", path) == 0
    out = capsys.readouterr().out
    assert "a red dragon" in out
    assert "never heard of: dragon" in out
    assert run("info", path, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["request"]["seed"] == 7
    assert document["record"] == result.metadata
    assert run("info", tmp_path / "none.png") == 2


@pytest.mark.usefixtures("micro")
def test_info_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "tiny") == 0
    out = capsys.readouterr().out
    assert "32 pixels a side" in out
    assert "unet" in out
    assert run("info", "tiny", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["spec"] == MICRO.model_dump(mode="json")
    assert document["networks"]["unet"]["parameters"] > 1000


def test_an_unknown_model_exits_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "no-such-model") == 3
    assert "no-such-model" in capsys.readouterr().err


def test_the_list_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models") == 0
    capsys.readouterr()
    assert run("models", "--json") == 0
    assert isinstance(json.loads(capsys.readouterr().out)["models"], list)


def test_export_writes_a_folder_that_is_read_back(
    micro: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "micro"
    assert run("models", "export", "tiny", folder) == 0
    assert str(folder) in capsys.readouterr().out
    contents = read_folder(folder)
    assert contents.spec.unet == MICRO.unet
    assert set(contents.tensors["unet"].entries) == set(micro.unet.state_dict())
    assert run("models", "export", "tiny", folder) == 2
    assert "not empty" in capsys.readouterr().err


def test_doctor_describes_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    out = capsys.readouterr().out
    assert "tested" in out
    assert "emulated" in out
    assert "winograd: o" in out
    assert run("doctor", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["layouts"]) >= {"packed", "compiled", "winograd"}
    assert document["packages"]["torch"]
    assert len(document["devices"]) == 9


def test_doctor_says_why_something_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from safelight.runtime import explain, plan

    monkeypatch.setattr(plan, "library", lambda: None)
    monkeypatch.setattr(plan, "packing_works", lambda: False)
    why = explain()
    assert "without kernels" in why["winograd"]
    assert "without kernels" in why["compiled"]
    assert "PyTorch" in why["packed"]


def test_devices_agree_with_what_loading_does() -> None:
    states = {(row["device"], row["dtype"]): row["state"] for row in devices()}
    assert states["cpu", "float32"] == "tested"
    assert states["cpu", "float16"] == "emulated"
    assert set(states.values()) == {"tested", "expected", "emulated"}


@pytest.mark.usefixtures("micro")
def test_doctor_of_a_model_agrees_with_diffusers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "tiny", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["agreement"]["largest"] <= 1
    assert document["agreement"]["mean"] < 0.1
    assert run("doctor", "tiny", "--no-agreement") == 0
    out = capsys.readouterr().out
    assert "not measured" in out
    assert "unet" in out
    assert "plan      torch, " in out
