"""Errors become one line and an exit code."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from safelight.cli.main import COMMANDS, Entry, main
from safelight.errors import Cancelled, InvalidRequest, SafelightError, WeightsError


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers a command ``fail`` that raises ``error``."""
    module = ModuleType("failing")

    def command(steps: int = 1) -> None:
        """Fails."""
        raise error

    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "failing", module)
    monkeypatch.setitem(COMMANDS, "fail", Entry("failing", "Fails."))


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    return int(leaving.value.code or 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("steps", "must be at least 1, not 0.", "Try 25."), 2),
        (WeightsError("model.safetensors", "is [red]truncated[/red]: " + 40 * "long "), 4),
        (Cancelled("2 of 4 pictures are finished"), 130),
        (SafelightError("no"), 1),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    error: SafelightError,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail_with(error, monkeypatch)
    assert exit_code("fail") == code
    assert capsys.readouterr() == ("", f"Error: {error}\n")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(SafelightError("no"), monkeypatch)
    with pytest.raises(SafelightError, match="no"):
        main(["--debug", "fail"])


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert exit_code("fail") == 130


def test_a_bug_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(ZeroDivisionError(), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        main(["fail"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fail", "--steps", "x"], "--steps"),
        (["fial"], "fial"),
        (["fail", "--no-such"], "--no-such"),
    ],
)
def test_a_wrong_command_line_exits_2(
    arguments: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail_with(SafelightError("not reached"), monkeypatch)
    assert exit_code(*arguments) == 2
    assert named in capsys.readouterr().err
