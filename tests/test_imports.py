"""Importing is free, and the command line starts without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from safelight.cli.main import COMMANDS

HEAVY = ("torch", "numpy", "PIL", "safetensors", "tokenizers", "huggingface_hub", "pyarrow")


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


SAFELIGHT = """
import json, sys
from safelight.cli.main import main
try:
    main()
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def test_import_safelight_imports_nothing_heavy() -> None:
    done = run("import json, sys, safelight; print(json.dumps(sorted(sys.modules)))")
    modules = json.loads(done.stdout)
    assert "safelight" in modules
    assert [m for m in modules if m.startswith((*HEAVY, "pydantic", "safelight."))] == []


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_command_line_starts_without_torch(arguments: list[str]) -> None:
    done = run(SAFELIGHT, *arguments)
    assert done.returncode == 0
    assert set(HEAVY).isdisjoint(json.loads(done.stderr.splitlines()[-1]))


def test_help_lists_every_command_with_a_line_of_help() -> None:
    words = run(SAFELIGHT, "--help").stdout
    for name, entry in COMMANDS.items():
        assert name in words
        assert entry.help[:20] in words


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str) -> None:
    done = run(SAFELIGHT, name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"safelight {name}" in done.stdout
