"""``safelight safety``: make a safety checker of one's own, and say how good one is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safelight.cli import show
from safelight.errors import InvalidRequest

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def _safety() -> None:
    """Make a safety checker from sentences or pictures, and measure one."""


@app.command()
def build(
    concepts: Annotated[
        Path, typer.Option("--concepts", help="A sentence a line, or a TOML file.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new or empty folder.")],
    examples: Annotated[
        Path | None,
        typer.Option("--examples", help="A folder with safe/ and unsafe/, to choose thresholds."),
    ] = None,
    false_positives: Annotated[
        float | None,
        typer.Option("--false-positives", help="Most safe examples a concept may flag, 0 to 1."),
    ] = None,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Train the one concept's direction on the examples."),
    ] = False,
    clip: Annotated[
        Path | None, typer.Option("--clip", help="A CLIP's folder. [default: the tiny family's]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Make a checker in the published layout, for --safety-checker and for diffusers."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InvalidRequest("output", f"{output} is not empty.", "Name a new one.")
    if false_positives is not None and not 0 <= false_positives <= 1:
        raise InvalidRequest("false-positives", f"must be 0 to 1, not {false_positives:g}.")
    from safelight.safety import build as building
    from safelight.safety.clip import load_clip
    from safelight.safety.concepts import read_concepts, sorted_pictures
    from safelight.shipped import FAMILY
    from safelight.store.checkers import write_checker

    wanted = read_concepts(concepts)
    safe, unsafe = sorted_pictures(examples, "examples") if examples is not None else ([], [])
    checker = building.build(
        load_clip(clip or FAMILY / "shared"),
        wanted,
        safe=safe,
        unsafe=unsafe,
        false_positives=false_positives,
        fit=fit,
    )
    write_checker(output, checker.spec, checker.head.state_dict())
    limits = [*checker.thresholds.concepts.tolist(), *checker.thresholds.special.tolist()]
    rows = [
        {"name": name, "threshold": round(limit, 6)}
        for name, limit in zip(checker.names, limits, strict=True)
        if name != building.UNUSED
    ]
    if as_json:
        show.document({"schema": 1, "folder": output, "digest": checker.digest, "concepts": rows})
        return
    for row in rows:
        typer.echo(f"{row['threshold']:8.4f}  {row['name']}")
    typer.echo(output)


@app.command()
def measure(
    pictures: Annotated[Path, typer.Argument(help="A folder with safe/ and unsafe/ in it.")],
    checker: Annotated[
        str, typer.Option("--checker", help="Its folder, a model's that has one, or a hub id.")
    ],
    plot: Annotated[
        Path | None, typer.Option("--plot", help="The curve as a PNG (needs the extra eval).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Print the ROC of a checker on pictures that were sorted by hand."""
    _can_plot(plot)
    from safelight.checker import Checker
    from safelight.safety import measure as measuring
    from safelight.safety.concepts import sorted_pictures

    safe, unsafe = sorted_pictures(pictures, "pictures")
    roc = measuring.measure(Checker.load(checker), safe, unsafe)
    if plot is not None:
        measuring.plot(roc, plot)
    if as_json:
        show.document(measuring.document(roc))
        return
    typer.echo(measuring.table(roc), nl=False)
    for path in roc.wrong:
        typer.echo(f"wrong: {path}")


def _can_plot(path: Path | None) -> None:
    """Refuse a plot that cannot be drawn, before anything is computed."""
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise InvalidRequest("plot", f"{path} is not a PNG.", "Name it something.png.")
    from importlib.util import find_spec

    from safelight.errors import MissingExtra

    if find_spec("matplotlib") is None:
        raise MissingExtra("--plot", "eval")
