"""``safelight train``: a model from a recipe."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli import show
from safelight.errors import Cancelled, MissingExtra, SafelightError

if TYPE_CHECKING:
    from safelight.train.loop import Run
    from safelight.train.recipe import Recipe


def command(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, and train nothing.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=1024, help="CPU threads.")
    ] = None,
    rehearse: Annotated[
        int,
        typer.Option(
            "--rehearse",
            min=0,
            metavar="STEPS",
            help="Take steps in miniature at the recipe's shapes, and train nothing.",
        ),
    ] = 0,
    stop_after: Annotated[
        float | None,
        typer.Option("--stop-after", min=0, help="Minutes; then it saves and stops."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Train a model from a recipe. The same command again resumes.

    Ctrl-C saves a checkpoint and stops; a second one stops at once.
    """
    # safelight.train imports torch only in the modules that train.
    from safelight.train.recipe import read_stages

    changes = {} if threads is None else {"threads": threads}
    follow(read_stages(recipe_file, **changes), dry_run, rehearse, stop_after, as_json)


def follow(
    stages: list[Recipe], dry_run: bool, steps: int, stop_after: float | None, as_json: bool
) -> None:
    """Show, rehearse or train the stages of a recipe, one after the other."""
    if dry_run:
        show.document(_shown(stages))
        return
    if steps:
        _rehearse(stages, steps, as_json)
        return
    for recipe in stages:
        if not _train(recipe, stop_after, as_json):
            break


def _shown(stages: list[Recipe]) -> dict[str, Any]:
    """What ``--dry-run`` prints: a run, or all of them."""
    shown: list[dict[str, Any]] = [
        {"kind": r.kind, "steps": r.steps, **_shapes(r), "recipe": r.model_dump(mode="json")}
        for r in stages
    ]
    return shown[0] if len(shown) == 1 else {"stages": shown}


def _shapes(recipe: Recipe) -> dict[str, Any]:
    """The aspect buckets of a run that has them; how many pictures each holds is in its
    ``data.json``."""
    if recipe.data.buckets is None:
        return {}
    from safelight.data.framing import buckets

    made = buckets(recipe.data.size, **dict(recipe.data.buckets))
    return {"buckets": [f"{width}x{height}" for width, height in made]}


def _rehearse(stages: list[Recipe], steps: int, as_json: bool) -> None:
    from safelight.train.rehearsal import rehearse

    said = []
    for recipe in stages:
        losses = rehearse(recipe, steps)
        said.append({"name": recipe.name, "losses": losses})
        if not as_json:
            typer.echo(f"{recipe.name}: {steps} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}")
    if as_json:
        show.document({"schema": 1, "stages": said})


def _train(recipe: Recipe, stop_after: float | None, as_json: bool) -> bool:
    """One run; says whether it came to its end."""
    run = _prepare(recipe, stop_after, as_json)
    from safelight.train.processes import this_process

    if not this_process().is_main_process:  # one of them speaks for all
        interrupted, _ = _go(run, quiet=True)
        if interrupted:
            raise Cancelled("stopped; the same command resumes.")
        return run.seen >= recipe.images
    if not as_json:
        show.words().print(
            f"{recipe.name}: {run.seen:,} of {recipe.images:,} pictures, in {recipe.output}",
            markup=False,
            soft_wrap=True,
        )
    interrupted, numbers = _go(run, as_json)
    if as_json:
        show.document(
            {
                "schema": 1,
                "name": recipe.name,
                "folder": recipe.output,
                "seen": run.seen,
                "images": recipe.images,
                "seconds": round(run.seconds, 1),
                "validation": numbers,
            }
        )
    else:
        typer.echo(f"{run.seen:,} of {recipe.images:,} pictures seen: {recipe.output}")
        for name, value in numbers.items():
            typer.echo(f"  {name:24} {value:.4f}")
    if numbers.get("copies") and not as_json:
        show.words().print(
            f"warning: {numbers['copies']:.0f} of the last samples copy a training picture: see "
            f"{recipe.output / 'copying.json'}",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    if interrupted:
        raise Cancelled("stopped; the same command resumes.")
    return run.seen >= recipe.images


def _prepare(recipe: Recipe, stop_after: float | None, quiet: bool) -> Run:
    import torch

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        import accelerate  # noqa: F401
        import tensorboard  # noqa: F401
    except ImportError:
        raise MissingExtra("training", "train") from None
    from safelight.train.loop import Run
    from safelight.train.objectives import objective
    from safelight.train.processes import this_process

    say = show.words()
    say.quiet = quiet
    with say.status("preparing data …") as status:
        seconds = None if stop_after is None else 60 * stop_after
        engine = None
        if recipe.kind == "personal":
            from safelight.cli.render import Engine

            engine = Engine(lambda made: status.update(f"preparing data: {made} class pictures …"))
        with this_process().main_process_first():  # it fills the caches that the others read
            made = objective(recipe, engine)
        run = Run(recipe, made, stop_after=seconds)
        if engine is not None:
            engine.tell = lambda made: None
        return run


def _go(run: Run, quiet: bool) -> tuple[bool, dict[str, float]]:
    """Train; says whether Ctrl-C ended it, and the last validation numbers."""
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted, run.stop_after = True, 0.0  # saves after the step that is being taken

    with show.bar(quiet=quiet, extra="{task.fields[numbers]}") as bar:
        task = bar.add_task("pictures", total=run.recipe.images, completed=run.seen, numbers="")

        def progress(seen: int, total: int, numbers: dict[str, Any]) -> None:
            bar.update(task, completed=min(seen, total), numbers=f"loss {numbers['loss']:.4f}")

        run.progress = progress
        before = signal.signal(signal.SIGINT, interrupt)
        try:
            numbers = run.go()
            return interrupted, numbers
        except FloatingPointError as error:
            raise SafelightError(str(error)) from error
        finally:
            signal.signal(signal.SIGINT, before)
