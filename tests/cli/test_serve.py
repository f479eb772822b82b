"""The command: what it refuses, and what it hands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safelight.cli.main import main


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["serve", *arguments])
    code = left.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What would be run."""
    found: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr("uvicorn.run", lambda app, **how: found.append((app, how)))
    return found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--load", "sometimes"], "load"),
        (["--memory", "0"], "memory"),
        (["--keys", "none.toml"], "keys"),
        (["--api-key", " "], "api-key"),
    ],
)
def test_refusals(
    served: list[Any], capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err
    assert not served


def test_options_arrive(
    served: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('[[key]]\nname = "a"\nkey = "long enough"\n')
    options = ["--keys", str(keys), "--load", "start", "--memory", "2", "--live", "4"]
    options += ["--patience", "5", "--log-json", "--no-measure", "--host", "0.0.0.0"]
    assert run("-m", "x", "-m", "y", *options) == 0
    ((app, how),) = served
    house = app.state.house
    settings = house.settings
    assert settings.models == ("x", "y")
    assert (settings.load, settings.memory, settings.live) == ("start", 2.0, 4)
    assert (settings.patience, settings.measure) == (5.0, False)
    assert house.models.bound == 2 * 2**30
    assert [asker.name for asker in house.keys.askers] == ["a"]
    assert "JsonLines" in str(how["log_config"])
    assert how["timeout_graceful_shutdown"] > settings.drain_seconds
    told = capsys.readouterr().err
    assert "Anyone" not in told, "keys were given"
    assert "http" not in told, "the log is for programs"


def test_an_open_port_is_said(served: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--host", "0.0.0.0") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "Anyone who reaches this port may use it" in told
    assert "serves tiny-v" in told
    assert served[0][0].state.house.settings.live is None
