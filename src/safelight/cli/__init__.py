"""The command line. One file per command, imported only when used."""

from __future__ import annotations


def main() -> None:
    """Entry point of the ``safelight`` command."""
    from safelight.cli.main import app

    app()
