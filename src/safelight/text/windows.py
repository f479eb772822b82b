"""Where a prompt of more than one window is cut.

A text tower reads at most ``context_length`` ids; longer prompts are read window by window
(Automatic1111's "unlimited prompts"; compel's ``SplitLongTextMode``). Cutting loses nothing, but
words that stand in one window know nothing of the other, so each dialect has its habit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

Manner = Literal["hard", "comma", "sentence"]

MANNERS: dict[str, Manner] = {"none": "hard", "a1111": "comma", "compel": "sentence"}
"""Of each dialect (:mod:`safelight.text.weighting`)."""

BACKTRACK = 20
"""How many tokens the web UI looks back for a comma (its ``comma_padding_backtrack``)."""

_COMMA = ",</w>"
_PHRASE = (".</w>", ",</w>", ";</w>", ":</w>")
_SENTENCE = (".</w>",)


def lengths(tokens: Sequence[str], room: int, manner: Manner = "hard") -> list[int]:
    """How many tokens each window takes; at least one window, none of more than ``room``.

    Args:
        tokens: as the vocabulary spells them, ``</w>`` at the end of words.
        manner: ``hard``: windows are filled. ``comma`` (A1111): a window ends behind its last
            comma if that is near its end. ``sentence`` (compel): behind its last full stop, else
            its last punctuation, else its last whole word.
    """
    cut = {"hard": _hard, "comma": _comma, "sentence": _sentence}[manner]
    out, at = [], 0
    while len(tokens) - at > room:
        out.append(cut(tokens, at, room))
        at += out[-1]
    return [*out, len(tokens) - at]


def _hard(tokens: Sequence[str], at: int, room: int) -> int:
    return room


def _comma(tokens: Sequence[str], at: int, room: int) -> int:
    last = _last(tokens, at, room, lambda token: token == _COMMA)
    near = last > 0 and room - (last - 1) <= BACKTRACK
    return last if near and tokens[at + room] != _COMMA else room


def _sentence(tokens: Sequence[str], at: int, room: int) -> int:
    return (
        _last(tokens, at, room, lambda token: token in _SENTENCE)
        or _last(tokens, at, room, lambda token: token in _PHRASE)
        or _last(tokens, at, room, lambda token: token.endswith("</w>"))
        or room
    )


def _last(tokens: Sequence[str], at: int, room: int, fits: Callable[[str], bool]) -> int:
    """How many tokens there are up to the last one that fits; 0 where none does."""
    return next((n for n in range(room, 0, -1) if fits(tokens[at + n - 1])), 0)
