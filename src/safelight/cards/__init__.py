"""Licences and cards of the published models, in our own words, as data.

One TOML file a model; ``like`` names the file whose sections it takes over, ``[add]`` lengthens
lists that it took over. Licences and their use restrictions are in ``licences.toml``. The
published cards and licences decide; these are there to be read first.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from safelight.errors import ModelNotFound
from safelight.spec import ModelSpec

FOLDER = Path(__file__).parent

SECTIONS = {
    "intended": "Intended use",
    "out_of_scope": "Out of scope",
    "excluded": "Excluded use",
    "limitations": "Limitations",
    "bias": "Bias",
    "safety": "Safety checker",
    "training": "Training",
    "evaluation": "Evaluation",
    "emissions": "Emissions",
}
"""Key in the files -> heading, in the order in which cards are printed."""

_FULL_SIZE = (320, 640, 1280, 1280)
_NOT_ADVICE = "This is our reading, not legal advice; the licence's own text decides."


@dataclass(frozen=True)
class Licence:
    """Under what published weights may be used."""

    key: str
    """As the hub's metadata write it: ``creativeml-openrail-m``, ``openrail++`` …"""
    name: str
    url: str
    summary: str
    forbidden: tuple[str, ...]
    duties: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """What to know of a published model before it is used."""

    name: str
    title: str
    licence: Licence
    summary: str
    sections: Mapping[str, tuple[str, ...]]
    citation: str
    sources: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    hub: tuple[str, ...] = ()
    """Hub ids that hold these weights."""

    @property
    def notice(self) -> str:
        """One line, for a first load."""
        return (
            f"{self.title}, or derived from it: licence {self.licence.name}, with restrictions on "
            f"use. See: safelight card {self.name}"
        )


def names() -> list[str]:
    """Names of all cards."""
    return sorted(
        p.stem for p in FOLDER.glob("*.toml") if p.stem[0] != "_" and p.stem != "licences"
    )


@cache
def licences() -> Mapping[str, Licence]:
    """All licences by their key."""
    table = _toml("licences")
    lists = table.pop("restrictions")
    return {
        key: Licence(
            key,
            entry["name"],
            entry["url"],
            entry["summary"],
            tuple(lists[entry["restrictions"]]["forbidden"]),
            tuple(lists[entry["restrictions"]]["duties"]),
        )
        for key, entry in table.items()
    }


@cache
def card(name: str) -> Card:
    """The card of a published model, by its name, an alias or a hub id.

    Raises:
        ModelNotFound: there is none; lists the names.
    """
    wanted = name.strip().strip("/").lower()
    for known in names():
        entry = _entry(known)
        answers = [known, *entry.get("aliases", []), *entry.get("hub", [])]
        if wanted in (answer.lower() for answer in answers):
            return Card(
                name=known,
                title=entry["title"],
                licence=licences()[entry["licence"]],
                summary=entry["summary"],
                sections={key: tuple(entry[key]) for key in SECTIONS if key in entry},
                citation=entry["citation"].strip(),
                sources=tuple(entry["sources"]),
                aliases=tuple(entry.get("aliases", [])),
                hub=tuple(entry.get("hub", [])),
            )
    raise ModelNotFound(f"no card of {name!r}. There are: {', '.join(names())}.")


def shipped(name: str) -> str | None:
    """The card that came with one of the shipped models' training, as Markdown, or None."""
    if not name.isidentifier() and not name.replace("-", "").isidentifier():
        return None
    file = FOLDER.parent / "family" / name / "README.md"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def find(spec: ModelSpec) -> Card | None:
    """The card of the published model that has this shape, or None.

    Weights of that shape are the published ones or were most likely derived from them; either way
    the licence's restrictions hold. A shape that was never published is someone's own.
    """
    for name in names():
        shape = _entry(name).get("shape")
        if shape and _fits(spec, shape):
            return card(name)
    return None


def _fits(spec: ModelSpec, shape: Mapping[str, Any]) -> bool:
    wanted = {"channels": _FULL_SIZE, **shape}
    wanted["channels"] = tuple(wanted["channels"])
    has = {
        **{key: getattr(spec.unet, key, None) for key in wanted},
        "family": spec.family,
        "prediction_type": spec.schedule.prediction_type,
    }
    return all(has[key] == value for key, value in wanted.items())


def _toml(name: str) -> dict[str, Any]:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


@cache
def _entry(name: str) -> dict[str, Any]:
    """A file with the sections that it takes over."""
    own = _toml(name)
    add = own.pop("add", {})
    entry = {**(_entry(own["like"]) if "like" in own else {}), **own}
    for key, more in add.items():
        entry[key] = [*entry.get(key, []), *more]
    return entry


# -- for people -----------------------------------------------------------------------------------


def page() -> str:
    """All licences and cards as one page, ``docs/responsible-use.md``. What all cards say is
    there once."""
    lines = [(FOLDER / "_page.md").read_text(encoding="utf-8"), "## Licences", ""]
    for licence in licences().values():
        lines += [f"### {licence.name}", ""]
        lines += [f"`{licence.key}`", "", *licence_lines(licence), ""]
    shared = {key: tuple(value) for key, value in _entry("_published").items() if key in SECTIONS}
    lines += ["## What all cards say", "", *_section_lines(shared, 3)]
    for name in names():
        found = card(name)
        own = {
            key: tuple(item for item in items if item not in shared.get(key, ()))
            for key, items in found.sections.items()
        }
        lines += [markdown(replace(found, sections=own), level=2, licence=False)]
    return "\n".join(lines).strip() + "\n"


def markdown(card: Card, *, level: int = 1, licence: bool = True) -> str:
    """A card as Markdown.

    Args:
        level: of its first heading.
        licence: with the restrictions in full; False names the licence only.
    """
    head, sub = "#" * level, "#" * (level + 1)
    also = ", ".join(f"`{name}`" for name in card.aliases)
    lines = [f"{head} {card.title}", "", card.summary, ""]
    lines += [f"`safelight card {card.name}`" + (f" (also {also})" if also else ""), ""]
    lines += [f"{sub} Licence", "", *licence_lines(card.licence, full=licence), ""]
    lines += _section_lines(card.sections, level + 1)
    lines += [f"{sub} Citation", "", "```bibtex", card.citation, "```", ""]
    lines += [f"After: {'; '.join(card.sources)}.", ""]
    return "\n".join(lines)


def _section_lines(sections: Mapping[str, tuple[str, ...]], level: int) -> list[str]:
    lines: list[str] = []
    for key, heading in SECTIONS.items():
        if sections.get(key):
            lines += [f"{'#' * level} {heading}", "", *(f"- {item}" for item in sections[key]), ""]
    return lines


def licence_lines(licence: Licence, *, full: bool = True) -> list[str]:
    """A licence as Markdown."""
    lines = [f"[{licence.name}]({licence.url}). {licence.summary}"]
    if full:
        lines += ["", "Forbidden:", "", *(f"- {item}" for item in licence.forbidden)]
        lines += ["", "Those who share:", "", *(f"- {item}" for item in licence.duties)]
        lines += ["", _NOT_ADVICE]
    return lines
