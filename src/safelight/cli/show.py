"""What the commands share: JSON on stdout, words and bars on stderr."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def words() -> Console:
    """For people: on stderr, so that stdout stays for what was asked for."""
    return Console(stderr=True, highlight=False)


def document(value: Any) -> None:
    """One JSON document on stdout, for programs."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str))


def bar(*, quiet: bool = False, extra: str = "") -> Progress:
    """A progress bar; silent where nobody watches (no terminal, ``quiet``).

    Args:
        extra: a field that is shown at the end of the line, as ``{task.fields[...]}`` text.
    """
    console = words()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn(extra),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=False,
    )
