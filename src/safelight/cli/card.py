"""``safelight card``: licence, uses and limits of a published model."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from safelight import cards
from safelight.cli import show


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A model's name or hub id; none: a list.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All cards, as docs/responsible-use.md.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Print a model's card in Markdown: licence and use restrictions, intended, out-of-scope and
    excluded use, limitations, bias, training, evaluation, emissions, citation."""
    if everything:
        typer.echo(cards.page(), nl=False)
    elif name is None:
        known = [cards.card(each) for each in cards.names()]
        if as_json:
            show.document({"schema": 1, "cards": [_document(card) for card in known]})
        else:
            for card in known:
                typer.echo(f"{card.name:18} {card.licence.key:22} {card.title}")
    elif (shipped := cards.shipped(name)) is not None and not as_json:
        typer.echo(shipped, nl=False)
    elif as_json:
        show.document({"schema": 1, **_document(cards.card(name))})
    else:
        typer.echo(cards.markdown(cards.card(name)), nl=False)


def _document(card: cards.Card) -> dict[str, Any]:
    return dataclasses.asdict(card)
