"""The pictures of docs/gallery.md: ``python -m benchmarks.gallery [--model NAME] [--only NAME]``.

``gallery.toml`` lists the sheets. A sheet has ``command``, a command line of ours with ``{axis}``
for each of its ``axes`` (one: pictures in rows of ``columns``; two: one value a row, one a column),
or ``code``, Python that leaves a dict ``pictures`` of labels and pictures.
``before`` (a command) and ``python`` (code) run first; ``show`` puts files that they left in front.
What is run is what the page shows, character by character; only the model stays in memory between
commands.

Writes ``docs/assets/gallery/*.webp`` and the page.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import os
import shlex
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from safelight.cli.main import main as safelight
from safelight.model import Model

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
ASSETS = DOCS / "assets" / "gallery"
PAGE = DOCS / "gallery.md"
GAP, LINE = 4, 16  # of a sheet, in pixels
QUALITY = 82  # of WebP

Sheet = dict[str, Any]
Labelled = list[tuple[str, Image.Image]]


# -- what a sheet says ----------------------------------------------------------------------------


def filled(text: str, values: dict[str, Any]) -> str:
    """``{name}`` replaced, nothing else touched."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def cases(sheet: Sheet) -> Iterator[dict[str, Any]]:
    """The values of each picture, in order."""
    axes = sheet["axes"]
    for chosen in itertools.product(*axes.values()):
        yield dict(zip(axes, chosen, strict=True))


def shown(sheet: Sheet, names: dict[str, Any]) -> str:
    """The lines that the page shows for a sheet: all that is run."""
    blocks = []
    if "before" in sheet:
        blocks.append(f"```\n{filled(sheet['before'], names)}\n```")
    for key in ("python", "code"):
        if key in sheet:
            blocks.append(f"```python\n{filled(sheet[key], names).strip()}\n```")
    if "command" in sheet:
        blocks.append(f"```\n{loop(sheet, names)}\n```")
    return "\n\n".join(blocks)


def loop(sheet: Sheet, names: dict[str, Any]) -> str:
    """The command under a shell's ``for`` loops."""
    command, lines = filled(sheet["command"], names), []
    for depth, (axis, values) in enumerate(sheet["axes"].items()):
        words = [shlex.quote(str(value)) for value in values]
        between = " " if len(" ".join(words)) < 80 else " \\\n  "
        lines.append(f"{'  ' * depth}for {axis} in {between.join(['', *words]).strip(' ')}; do")
        command = command.replace(f"{{{axis}}}", f"${{{axis}}}")
    depth = len(sheet["axes"])
    lines.append("  " * depth + command)
    lines += ["  " * d + "done" for d in reversed(range(depth))]
    return "\n".join(lines)


# -- making ---------------------------------------------------------------------------------------


def run(line: str) -> None:
    """One command line of ours, in this process."""
    program, *words = shlex.split(line)
    assert program == "safelight", line
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            safelight(words)
        except SystemExit as leaving:
            if leaving.code:
                raise RuntimeError(f"{line}\n{said.getvalue()}") from None


def pictures(sheet: Sheet, names: dict[str, Any]) -> tuple[Labelled, Labelled]:
    """What is shown first, and what the sheet makes, with labels. Works in the current folder."""
    if "before" in sheet:
        run(filled(sheet["before"], names))
    scope: dict[str, Any] = {}
    for key in ("python", "code"):
        if key in sheet:
            exec(compile(filled(sheet[key], names), sheet["name"], "exec"), scope)
    first = [(words, Image.open(file)) for words, file in sheet.get("show", {}).items()]
    if "code" in sheet:
        return first, list(scope["pictures"].items())
    made = []
    for values in cases(sheet):
        line = filled(sheet["command"], {**names, **values})
        run(line)
        words = shlex.split(line)
        axis = list(sheet["axes"])[-1]
        made.append((label(axis, values[axis]), Image.open(words[words.index("-o") + 1])))
    return first, made


def label(axis: str, value: Any) -> str:
    """Words speak for themselves, numbers do not."""
    return value if isinstance(value, str) else f"{axis} {value}"


def drawn(sheet: Sheet, first: Labelled, made: Labelled) -> Image.Image:
    """The sheet: rows of labelled pictures; with two axes, a line above each row."""
    axes = sheet.get("axes", {})
    two = len(axes) == 2
    columns = len(list(axes.values())[1]) if two else min(sheet["columns"], len(first + made))
    cells = first + made
    width, height = cells[-1][1].size
    rows = -(-len(cells) // columns)
    above = LINE if two else 0
    step = above + height + LINE + GAP
    page = Image.new("RGB", (columns * (width + GAP) - GAP, rows * step - GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for k, (words, picture) in enumerate(cells):
        row, column = divmod(k, columns)
        left, top = column * (width + GAP), row * step
        if two and column == 0:
            name, values = next(iter(axes.items()))
            pen.text((left, top + 1), label(name, values[row]), fill="black", font=font)
        page.paste(picture.convert("RGB"), (left, top + above))
        pen.text((left, top + above + height + 1), words, fill="black", font=font)
    return page


def page(data: dict[str, Any], names: dict[str, Any]) -> str:
    """docs/gallery.md, whole."""
    lines = ["# Gallery", "", filled(data["intro"], names).strip(), ""]
    for sheet in data["sheet"]:
        place = (ASSETS / f"{sheet['name']}.webp").relative_to(DOCS).as_posix()
        lines += [f"## {sheet['title']}", "", filled(sheet["text"], names).strip(), ""]
        lines += [f"![{sheet['title']}]({place})", "", shown(sheet, names), ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Make the sheets and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery", description=__doc__)
    parser.add_argument("--model", help="instead of the one in gallery.toml")
    parser.add_argument("--only", help="sheets, by commas; the page is written all the same")
    parser.add_argument("--sheets", type=Path, default=HERE / "gallery.toml")
    given = parser.parse_args(arguments)
    data = tomllib.loads(given.sheets.read_text(encoding="utf-8"))
    Model.load = functools.cache(Model.load)  # type: ignore[method-assign]
    name = given.model or data["model"]
    spec = Model.load(name, device="cpu").spec
    names = {"model": name, "size": spec.native_size}
    ASSETS.mkdir(parents=True, exist_ok=True)
    home = Path.cwd()
    for sheet in data["sheet"]:
        if given.only and sheet["name"] not in given.only.split(","):
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="safelight-gallery-") as desk:
            os.chdir(desk)
            try:
                image = drawn(sheet, *pictures(sheet, names))
            finally:
                os.chdir(home)
        path = ASSETS / f"{sheet['name']}.webp"
        image.save(path, quality=QUALITY, method=6)
        size = path.stat().st_size / 1024
        print(f"{path.name}: {size:.0f} KiB, {time.monotonic() - began:.0f} s", flush=True)
    PAGE.write_text(page(data, names), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
