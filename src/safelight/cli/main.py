"""The ``safelight`` command: a table of commands, each imported only when it is called.

``safelight --help`` reads the table alone, so it imports no torch. An error of the
:class:`~safelight.errors.SafelightError` family ends as one line on stderr and its own exit
code; ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from safelight import __version__
from safelight.errors import SafelightError


class Entry(NamedTuple):
    """Where a command lives, and its line in ``safelight --help``.

    The module exposes a function ``command``, or a Typer ``app`` where there are subcommands.
    """

    module: str
    help: str


COMMANDS = {
    "generate": Entry("safelight.cli.generate", "Make pictures from a sentence."),
    "vary": Entry("safelight.cli.vary", "Make pictures like other pictures."),
    "upscale": Entry("safelight.cli.upscale", "Make a picture four times as large a side."),
    "batch": Entry("safelight.cli.batch", "Make the pictures of a file of requests."),
    "ui": Entry("safelight.cli.ui", "Make pictures in the browser."),
    "serve": Entry("safelight.cli.serve", "Serve models over HTTP."),
    "replay": Entry("safelight.cli.replay", "Make a picture again, and compare the two."),
    "tokens": Entry("safelight.cli.tokens", "Count a prompt's tokens; show its windows."),
    "info": Entry("safelight.cli.info", "Show what a picture, a model or a file of weights is."),
    "verify": Entry("safelight.cli.verify", "Say what the marks in a picture prove."),
    "card": Entry("safelight.cli.card", "Print a model's licence, uses and limits."),
    "plan": Entry("safelight.cli.plan", "Say how much memory pictures of a size will take."),
    "models": Entry("safelight.cli.models", "List the models at hand; export or convert one."),
    "doctor": Entry("safelight.cli.doctor", "Check this machine, or a model's files."),
    "train": Entry("safelight.cli.train", "Train a model from a recipe."),
    "distill": Entry("safelight.cli.distill", "Train a student from a teacher, from a recipe."),
    "personalize": Entry(
        "safelight.cli.personalize", "Teach a model a subject, from a few pictures of it."
    ),
    "evaluate": Entry("safelight.cli.evaluate", "Score a model on prompt lists; measure pictures."),
    "safety": Entry("safelight.cli.safety", "Make a safety checker; measure one."),
    "data": Entry("safelight.cli.data", "Filter, search and de-duplicate training pictures."),
    "stilllife": Entry("safelight.cli.stilllife", "Draw scenes of the world tiny is trained on."),
}


def _load(name: str) -> Any:
    """The real command behind ``name``."""
    module = import_module(COMMANDS[name].module)
    if hasattr(module, "app"):
        return typer.main.get_command(module.app)
    single = typer.Typer(add_completion=False)
    single.command(name)(module.command)
    return typer.main.get_command(single)


class LazyGroup(TyperGroup):
    """Lists stubs, which hold a name and a line of help, and dispatches to the real commands."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, entry in COMMANDS.items():
            self.add_command(TyperCommand(name, help=entry.help))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name else None, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except SafelightError as error:
            if ctx.params["debug"]:
                raise
            _print_error(error)
            raise typer.Exit(error.exit_code) from None


def _print_error(error: SafelightError) -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble(("Error: ", "bold red"), str(error) or type(error).__name__)
    Console(stderr=True).print(line, soft_wrap=True)


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"safelight {__version__}")
        raise typer.Exit


@app.callback()
def _safelight(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="SAFELIGHT_DEBUG", help="Show tracebacks of errors.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """The Stable Diffusion family as one program."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``safelight`` command. Leaves with the command's exit code."""
    command = typer.main.get_command(app)
    command.main(list(sys.argv[1:] if arguments is None else arguments), prog_name="safelight")
