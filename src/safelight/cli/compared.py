"""``safelight evaluate compare``: two evaluations, prompt by prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    first: Annotated[Path, typer.Argument(help="What safelight evaluate -o wrote.")],
    second: Annotated[Path, typer.Argument(help="Another, of the same lists.")],
) -> None:
    """The difference of two models on the same prompts and seeds, with its 95 % interval."""
    from safelight.evaluate.paired import compare

    typer.echo("| list | pairs | first | second | second - first (95 %) |\n|---|---|---|---|---|")
    for name, found in compare(first, second).items():
        shares = f"{100 * found.first:.1f} % | {100 * found.second:.1f} %"
        typer.echo(f"| {name} | {found.total} | {shares} | {found} |")
