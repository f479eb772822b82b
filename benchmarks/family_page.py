"""docs/family.md, from the numbers that :mod:`benchmarks.family` keeps.

Members that make pictures of the same prompts with the same seeds are compared in pairs here.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import RESULTS
from safelight.evaluate.paired import Paired, paired

FILE = Path(__file__).with_name("family.toml")
KEPT = RESULTS / "family"
DOCS = Path(__file__).parents[1] / "docs"
ASSETS = DOCS / "assets" / "family"
Member = dict[str, Any]
Numbers = dict[str, Any]
Rows = list[tuple[str, str]]


def kept(name: str) -> Numbers | None:
    """A member's numbers, if it has been measured."""
    file = KEPT / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def against(numbers: Numbers, other: str) -> Paired | None:
    """A member in pairs with another, on the prompts that both were measured on."""
    theirs = kept(other)
    if theirs is None or "each" not in theirs:
        return None
    one, two = (np.array([d == "1" for d in n["each"]]) for n in (theirs, numbers))
    n = min(len(one), len(two))
    return paired(one[:n], two[:n])


def percent(cell: dict[str, Any]) -> str:
    """A share with its interval."""
    low, high = (100 * v for v in cell["wilson95"])
    return f"{100 * cell['share']:.1f} % ({low:.1f}–{high:.1f})"


def _unet(numbers: Numbers) -> Rows:
    if "parameters" not in numbers:
        return []
    kind = "a guided step" if numbers["guided"] else "a step; nothing is guided"
    size = f"{numbers['parameters'] / 1e6:.2f} M weights"
    return [("UNet", f"{size}, {numbers['flop_a_step'] / 1e9:.2f} GFLOP {kind}")]


def _text(member: Member, numbers: Numbers) -> Rows:
    what = f"everything right, {numbers['count']:,} prompts"
    rows = [(what, percent(numbers["cells"]["all"]))]
    for more in numbers.get("also", []):
        words = ", ".join(f"{key} {value}" for key, value in more["wishes"].items())
        rows.append((f"{words}, {more['count']:,} prompts", percent(more["cells"]["all"])))
    for other in member.get("against", []):
        found = against(numbers, other)
        if found is not None:
            shares = f"{100 * found.second:.1f} % and {100 * found.first:.1f} %"
            rows.append((f"against {other}, {found.total:,} pairs", f"{shares}: {found}"))
    return rows


def _looks(member: Member, numbers: Numbers) -> Rows:
    rows = []
    for row in numbers["levels"]:
        level, cells = row["noise_level"], row["cells"]
        mark = "" if level is None else f", noise level {level}"
        cosine = f"CLIP cosine {row['cosine']['value']:.3f}"
        rows.append((f"everything kept{mark}", f"{percent(cells['all'])}; {cosine}"))
        both = f"{percent(cells['shapes'])}, {percent(cells['colours'])}"
        rows.append((f"both shapes, both colours{mark}", both))
    for row in numbers.get("mixed", []):
        heard = f"prompt obeyed {percent(row['prompt_obeyed'])}"
        seen = f"picture kept {percent(row['picture_kept'])}"
        what = f"picture and another prompt, noise level {row['noise_level']}"
        rows.append((what, f"{heard}, {seen}"))
    return rows


def _inpaint(member: Member, numbers: Numbers) -> Rows:
    return [
        ("largest change outside the mask", f"{numbers['largest_change_outside']}/255"),
        ("the new thing is as asked", percent(numbers["inside_right"])),
        ("the same of real renders", percent(numbers["inside_right_of_renders"])),
        ("everything right", percent(numbers["everything_right"])),
    ]


def _depth(member: Member, numbers: Numbers) -> Rows:
    names = ("all", "relation", "shapes", "colours")
    words = ("everything right", "relation", "both shapes", "both colours")
    rows = [(w, percent(numbers["cells"][n])) for n, w in zip(names, words, strict=True)]
    ceiling = f"real renders {numbers['overlap_of_renders']:.3f}"
    floor = f"other scenes {numbers['overlap_of_other_pictures']:.3f}"
    where = "where things are: overlap with the truth"
    return [*rows, (where, f"{numbers['overlap']:.3f} ({ceiling}, {floor})")]


def _upscale(member: Member, numbers: Numbers) -> Rows:
    low, high = numbers["gain95"]
    ours, plain = f"{numbers['psnr']:.2f} dB", f"bicubic {numbers['psnr_bicubic']:.2f} dB"
    return [
        ("PSNR to the render", f"{ours}; {plain}"),
        ("gain", f"{numbers['gain']:+.2f} dB ({low:+.2f} to {high:+.2f})"),
        ("nearer than bicubic", percent(numbers["better_in"])),
    ]


def _safety(member: Member, numbers: Numbers) -> Rows:
    return [
        ("area under the curve", f"{numbers['area']:.4f}"),
        ("wrong at its threshold", f"{numbers['wrong']} of {numbers['count']:,}"),
    ]


_ROWS = {
    "text": _text,
    "variations": _looks,
    "mixed": _looks,
    "inpaint": _inpaint,
    "depth": _depth,
    "upscale": _upscale,
    "safety": _safety,
}


def rows_of(member: Member, numbers: Numbers) -> Rows:
    """What the page's table says of a member."""
    return [*_unet(numbers), *_ROWS[numbers["measure"]](member, numbers)]


def page() -> str:
    """The whole page."""
    data = tomllib.loads(FILE.read_text(encoding="utf-8"))
    lines = ["# The tiny family", "", data["intro"].strip(), ""]
    for name, member in data["member"].items():
        numbers = kept(name)
        if numbers is None or member.get("hidden"):
            continue
        lines += [f"## {name}", "", member["text"].strip(), "", "| | |", "|---|---|"]
        lines += [f"| {what} | {value} |" for what, value in rows_of(member, numbers)]
        lines.append("")
        if "command" in member:
            lines += ["```", member["command"].strip(), "```", ""]
        if (ASSETS / f"{name}.webp").is_file():
            lines += [f"![{name}](assets/family/{name}.webp)", ""]
    return "\n".join(lines).rstrip() + "\n"
