"""What a prompt says once its dialect is understood: records between parsing and encoding.

A :class:`Text` is what one branch of the network reads at one step. A :class:`Prompt` is one or
more of them a step, each with a weight: how :mod:`safelight.diffusion.guidance` adds branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from safelight.errors import InvalidRequest

Dialect = Literal["none", "a1111", "compel"]
Fragments = tuple[tuple[str, float], ...]
"""Pieces of text and how much each weighs."""

MAX_DEPTH = 64
"""Brackets that may be open at once."""
MAX_WEIGHT = 1000.0


@dataclass(frozen=True)
class Clause:
    """One stretch of tokens: texts whose states are mixed, then pulled to the empty prompt's.

    Args:
        blend: fragments and their share; almost always one, with the share 1.
        weight: 1 is the mix as it is, 0 the empty prompt.
    """

    blend: tuple[tuple[Fragments, float], ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Text:
    """What a branch reads: clauses, one behind the other, each in windows of its own.

    Args:
        dialect: decides what a weight does to a state, and where long texts are cut.
    """

    clauses: tuple[Clause, ...]
    dialect: Dialect = "none"

    @classmethod
    def of(cls, *fragments: tuple[str, float], dialect: Dialect = "none") -> Text:
        """One clause of these fragments."""
        return cls((Clause(((fragments, 1.0),)),), dialect)

    @property
    def fragments(self) -> Fragments:
        """All of them, in order; what is mixed stands side by side."""
        return tuple(f for clause in self.clauses for part, _ in clause.blend for f in part)


@dataclass(frozen=True)
class Part:
    """One of the prompts that ``AND`` joins.

    Args:
        read: (step from 0, steps) -> the text of that step.
        weight: its share of the guidance.
        moving: the text is not the same at all steps.
    """

    read: Callable[[int, int], Text]
    weight: float = 1.0
    moving: bool = False

    def texts(self, steps: int) -> tuple[Text, ...]:
        """The text of each step; equal steps share one object."""
        if not self.moving:
            return (self.read(0, steps),) * steps
        return tuple(self.read(step, steps) for step in range(steps))


@dataclass(frozen=True)
class Prompt:
    """A prompt, understood.

    Args:
        parts: at least one.
        loras: (name, scale) of the adapters that the prompt itself asks for.
        plain: the prompt without those.
    """

    parts: tuple[Part, ...]
    loras: tuple[tuple[str, float], ...] = ()
    plain: str = ""

    @classmethod
    def fixed(cls, text: Text, plain: str, loras: tuple[tuple[str, float], ...] = ()) -> Prompt:
        """One text for the whole run."""
        return cls((Part(lambda step, steps: text),), loras, plain)

    def words(self, steps: int = 1) -> str:
        """What it says without its weights, for a reader of one plain sentence.

        That is the first step's text; what pushes away (a weight or a share that is not above 0)
        is left out, what is joined or mixed stands side by side.
        """
        texts = [part.texts(steps)[0] for part in self.parts if part.weight > 0]
        said = [
            words
            for text in texts
            for clause in text.clauses
            for fragments, share in clause.blend
            for words, weight in fragments
            if min(clause.weight, share, weight) > 0
        ]
        return " ".join(" ".join(said).split())

    def texts(self, steps: int) -> tuple[Text, ...]:
        """Every text that is read in a run of so many steps, each once, by first use."""
        runs = [part.texts(steps) for part in self.parts]
        return tuple(dict.fromkeys(text for step in zip(*runs, strict=True) for text in step))


def wrong(field: str, at: int, problem: str, fix: str = "") -> InvalidRequest:
    """An error at index ``at`` of the prompt in ``field``; people count from 1."""
    return InvalidRequest(field, f"at character {at + 1}, {problem}", fix)


def sound(weight: float, field: str, at: int) -> float:
    """``weight``, if a state can be multiplied by it."""
    if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
        raise wrong(field, at, f"a weight is beyond ±{MAX_WEIGHT:g}.", "Useful: 0.5 to 1.5.")
    return weight
