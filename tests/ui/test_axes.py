"""Axes of grids, against what AUTOMATIC1111's own code makes of the same texts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from safelight.errors import InvalidRequest
from safelight.ui import axes

BODY = {"prompt": "a red cube on a blue sphere", "negative_prompt": "red fog", "seed": 1}


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        # Worked examples of the X/Y/Z plot's own documentation.
        ("1-5", int, [1, 2, 3, 4, 5]),
        ("1-5 (+2)", int, [1, 3, 5]),
        ("10-5 (-3)", int, [10, 7]),
        ("1-3 (+0.5)", float, [1, 1.5, 2, 2.5, 3]),
        ("1-10 [5]", int, [1, 3, 5, 7, 10]),
        ("0.0-1.0 [6]", float, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        # And what follows from its code.
        ("1, 2 ,3", int, [1, 2, 3]),
        ("10,20-22,30-34 (+2)", int, [10, 20, 21, 22, 30, 32, 34]),
        ("-1", int, [-1]),
        ("-2 - 1", int, [-2, -1, 0, 1]),
        ("3-1", int, [3, 2, 1]),
        ("10-1 (-3)", int, [10, 7, 4, 1]),
        ("7.5", float, [7.5]),
        ("0.5-0.5", float, [0.5]),
        ("5-9 [1]", int, [5]),
        ("1\n2", int, [1, 2]),
        ("", int, []),
    ],
)
def test_numbers(text: str, kind: Any, found: list[float]) -> None:
    assert axes.numbers(text, kind) == pytest.approx(found)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1-5 (-1)", int),
        ("1-5 (+0)", int),
        ("x", int),
        ("1.5", int),
        ("1-100000", int),
        ("1-9 [0]", int),
        ("1-9 [5000]", float),
        ("1;2", float),
    ],
)
def test_what_is_no_number_is_refused_by_name(text: str, kind: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        axes.numbers(text, kind, "X values")
    assert refused.value.field == "X values"


def test_quotes_keep_a_comma() -> None:
    assert axes.split('a, "b, c" ,d') == ["a", "b, c", "d"]


def asked(kind: str, text: str, **more: Any) -> list[dict[str, Any]]:
    body = {**BODY, **more}
    return [cell.body for cell in axes.cells(body, [axes.axis(kind, text, body)])]


def test_search_and_replace() -> None:
    found = asked("Prompt S/R", "red, green")
    assert [b["prompt"] for b in found] == [
        "a red cube on a blue sphere",
        "a green cube on a blue sphere",
    ]
    assert found[1]["negative_prompt"] == "green fog"
    with pytest.raises(InvalidRequest, match="'pink' is neither in the prompt"):
        asked("Prompt S/R", "pink, green")


def test_prompt_order() -> None:
    found = asked("Prompt order", "red cube, blue sphere")
    assert [b["prompt"] for b in found] == [
        "a red cube on a blue sphere",
        "a blue sphere on a red cube",
    ]


@pytest.mark.parametrize(
    ("kind", "text", "field", "values"),
    [
        ("Seed", "3-5", "seed", [3, 4, 5]),
        ("Steps", "5, 10", "steps", [5, 10]),
        ("CFG scale", "1-2 [3]", "guidance_scale", [1, 1.5, 2]),
        ("Sampler", "Euler a, DPM++ 2M Karras", "sampler", ["Euler a", "DPM++ 2M Karras"]),
        ("Schedule type", "Automatic, Karras", "schedule", ["Automatic", "Karras"]),
        ("Model", "tiny, tiny-v", "model", ["tiny", "tiny-v"]),
        ("Denoising", "0.5, 1", "strength", [0.5, 1]),
        ("Size", "64x128", "width", [64]),
        ("Noise level", "0-500 [2]", "noise_level", [0, 500]),
        ("LoRA scale", "0, 1", "loras", [[["a", 0]], [["a", 1]]]),
    ],
)
def test_every_kind_changes_its_field(kind: str, text: str, field: str, values: list[Any]) -> None:
    assert [b[field] for b in asked(kind, text, loras=[["a", 0.5]])] == values


@pytest.mark.parametrize(
    ("kind", "text", "field"),
    [
        ("Steps", "", "X values"),
        ("Sampler", "Eulers b", "sampler"),
        ("Schedule type", "nonsense", "schedule"),
        ("Size", "big", "X values"),
        ("Moon", "1", "X axis"),
        ("LoRA scale", "1", "loras"),
    ],
)
def test_a_wrong_axis_names_its_field(kind: str, text: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        asked(kind, text)
    assert refused.value.field == field


def test_cells_are_in_reading_order() -> None:
    x, y = axes.axis("Seed", "1,2", BODY), axes.axis("Steps", "5,6,7", BODY, "Y")
    z = axes.axis("CFG scale", "1,3", BODY, "Z")
    found = axes.cells(BODY, [x, y, z])
    assert [(c.x, c.y, c.z) for c in found[:4]] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert len(found) == 12
    assert found[-1].body == {**BODY, "seed": 2, "steps": 7, "guidance_scale": 3}
    assert x is not None
    assert x.labels == ["seed 1", "seed 2"]
    assert [c.body for c in axes.cells(BODY, [None, None, None])] == [BODY]


def test_too_many_and_twice_the_same() -> None:
    seeds, steps = axes.axis("Seed", "1-20", BODY), axes.axis("Steps", "1-20", BODY)
    with pytest.raises(InvalidRequest, match="400 pictures"):
        axes.cells(BODY, [seeds, steps])
    with pytest.raises(InvalidRequest, match="two axes"):
        axes.cells(BODY, [seeds, axes.axis("Seed", "1", BODY)])


def test_no_torch() -> None:
    code = "import sys, safelight.ui.axes, safelight.ui.sheet; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
