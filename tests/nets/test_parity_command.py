"""``python -m benchmarks.parity`` at micro size, and that it can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import parity

from safelight.nets.clip import TextTower, VisionTower
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(["--models", "micro", "--side", "4", "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert [row.split(" | ")[1] for row in table.splitlines()[1:6]] == [
        "unet",
        "vae encode",
        "vae decode",
        "text",
        "vision",
    ]
    report = next(tmp_path.glob("parity-*.md")).read_text()
    assert "Everything agrees." in report
    assert "Not run yet" not in report
    data = json.loads(next(tmp_path.glob("parity-*.json")).read_text())
    assert all(network["faults"] for network in data["networks"])
    assert data["networks"][0]["taps"][-1]["name"] == "conv_out"


def test_a_difference_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parity.PUBLISHED, ("micro", "text"), (1, 1))
    monkeypatch.setattr(parity, "TAP_LIMIT", -1.0)
    arguments = ["--models", "micro", "--parts", "text", "--no-faults", "--out", str(tmp_path)]
    assert parity.main(arguments) == 1
    report = next(tmp_path.glob("parity-*.md")).read_text()
    assert "published 1 in 1" in report
    assert "differs by" in report


def test_wrong_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parity.main(["--models", "sd99"])
    assert "there are sd15" in capsys.readouterr().err


def test_parameter_counts_are_the_published_ones() -> None:
    kinds = {"unet": UNet, "vae": VAE, "text": TextTower, "vision": VisionTower}
    for (system, part), published in parity.PUBLISHED.items():
        with torch.device("meta"):
            parameters = list(kinds[part](getattr(parity.SYSTEMS[system], part)).parameters())
        assert (sum(p.numel() for p in parameters), len(parameters)) == published, (system, part)


def test_shared_networks_run_once() -> None:
    found = parity.networks(["sd15", "unclip-h", "small"], ["unet", "vae", "text", "vision"])
    assert sorted(len(network.systems) for network in found) == [1, 1, 1, 1, 1, 2, 2, 3]
    every = parity.networks([name for name in parity.SYSTEMS if name != "micro"], parity.PARTS)
    assert len(every) == 16
    assert sum(network.part == "prior" for network in every) == 1


def test_an_interrupted_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", "micro", "--side", "4", "--no-faults", "--out", str(tmp_path)]
    assert parity.main([*arguments, "--parts", "text"]) == 0
    capsys.readouterr()
    assert parity.main([*arguments, "--parts", "text,prior", "--resume"]) == 0
    ran = [row.split(" | ")[1] for row in capsys.readouterr().out.splitlines()[1:-1]]
    assert ran == ["prior"]
    kept = json.loads(next(tmp_path.glob("parity-*.json")).read_text())["networks"]
    assert [network["part"] for network in kept] == ["text", "prior"]
