"""``safelight distill``: a student from a recipe with a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safelight.cli import train
from safelight.errors import InvalidRequest


def command(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file.")],
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Instead of the recipe's, in every stage.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, and train nothing.")
    ] = False,
    rehearse: Annotated[
        int,
        typer.Option("--rehearse", min=0, metavar="STEPS", help="Take steps in miniature."),
    ] = 0,
    stop_after: Annotated[
        float | None,
        typer.Option("--stop-after", min=0, help="Minutes; then it saves and stops."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Train a student from a teacher: ``train``, for recipes that have a ``distill`` section.

    The same command again resumes.
    """
    from safelight.train.recipe import read_stages

    stages = read_stages(recipe_file)
    if all(stage.distill is None for stage in stages):
        raise InvalidRequest(
            "distill", f"{recipe_file} has no such section.", "Use safelight train."
        )
    if teacher is not None:
        stages = [
            s if s.distill is None else s.replace(distill=s.distill.replace(teacher=teacher))
            for s in stages
        ]
    train.follow(stages, dry_run, rehearse, stop_after, as_json)
