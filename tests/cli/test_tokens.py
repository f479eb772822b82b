"""``safelight tokens``."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from safelight.cli.main import app


def tokens(*arguments: str):
    return CliRunner().invoke(app, ["tokens", *arguments])


def test_one_line_a_reading_and_one_a_window():
    result = tokens("a (red:1.3) [cube:sphere:0.5]", "--prompt-dialect", "a1111")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("3 tokens in 1 window of ")
    assert lines[0].endswith("steps 1-10")
    assert lines[1] == "  1: a red×1.3 cube"
    assert lines[3] == "  1: a red×1.3 sphere"


def test_json_has_every_part_and_window():
    result = tokens("red cube AND ball :0.5", "--prompt-dialect", "a1111", "--json")
    document = json.loads(result.output)
    assert [r["weight"] for r in document["readings"]] == [1.0, 0.5]
    assert document["readings"][0]["windows"] == [
        [{"token": "red</w>", "weight": 1.0}, {"token": "cube</w>", "weight": 1.0}]
    ]


def test_long_prompts_show_their_windows():
    result = tokens("red cube, " * 60)
    lines = result.output.splitlines()
    assert lines[0].startswith("180 tokens in ")
    assert len(lines) == 1 + int(lines[0].split()[3])


def test_wrong_arguments_are_one_line():
    for arguments, word in [
        (["a", "--prompt-dialect", "x"], "prompt-dialect"),
        (["a", "--steps", "0"], "steps"),
        (["a [b|c:3]", "--prompt-dialect", "a1111"], "character 3"),
    ]:
        result = tokens(*arguments)
        assert result.exit_code == 2
        assert word in result.output
