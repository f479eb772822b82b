"""Prompt dialects: which words of a prompt weigh more, and how much.

Two published spellings, mutually unintelligible: ``(word:1.3)`` (the A1111 web UI's attention
brackets) and ``(word)1.3`` or ``word++`` (the ``compel`` library's). Only the parsing is here;
what a weight does to an embedding differs between the two and belongs to the conditioning.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from safelight.errors import InvalidRequest

Dialect = Literal["none", "a1111", "compel"]
Fragment = tuple[str, float]

_NUMBER = r"\d+(?:\.\d*)?|\.\d+"
_A1111_CLOSE = re.compile(rf":\s*([+-]?(?:{_NUMBER}))\s*\)")
_A1111_PLAIN = re.compile(r"[^\\()\[\]:]+")
# Signs that touch a word character on the right are part of a word ("hot-dog", "+test").
_COMPEL_OPERATOR = re.compile(
    rf"(?P<signs>\++|-+)(?![\w+-])|(?P<number>{_NUMBER})"
    rf"|\.attend\(\s*(?P<attend>\++|-+|-?(?:{_NUMBER}))\s*\)"
    r"|\.(?P<other>blend|and|add|swap)\("
)
_MAX_DEPTH = 64


def parse(prompt: str, dialect: Dialect = "none") -> list[Fragment]:
    """Split ``prompt`` into (text, weight) fragments, at least one.

    Args:
        prompt: as the user wrote it.
        dialect: ``none``: all of it is text. ``a1111``: ``(x)`` is 1.1, ``[x]`` 1/1.1,
            ``(x:1.3)`` 1.3; nesting multiplies; backslash escapes brackets; an open bracket
            reaches to the end; fragments keep their spaces. ``compel``: ``word+`` is 1.1,
            ``word--`` 0.81, ``(some words)1.3`` and ``"quoted"1.3``; nesting multiplies;
            fragments are stripped and neighbours of equal weight joined by a space.

    Raises:
        InvalidRequest: an unknown dialect, a weight that is not finite, a compel operator that
            is not a weight (``blend``, ``and``, ``swap``), or absurd nesting.
    """
    if dialect == "none":
        return [(prompt, 1.0)]
    if dialect == "a1111":
        return _parse_a1111(prompt)
    if dialect == "compel":
        return _flatten(_Compel(prompt).sequence(0, len(prompt), 1.0, 0)) or [("", 1.0)]
    raise InvalidRequest("dialect", f"{dialect!r} is unknown.", "Use none, a1111 or compel.")


def _parse_a1111(prompt: str) -> list[Fragment]:
    pieces: list[tuple[str, float]] = []
    # Brackets that are open, by the index of the first piece inside them.
    round_open: list[int] = []
    square_open: list[int] = []

    def scale(first: int, factor: float) -> None:
        for i in range(first, len(pieces)):
            pieces[i] = (pieces[i][0], _finite(pieces[i][1] * factor))

    at = 0
    while at < len(prompt):
        char = prompt[at]
        explicit = _A1111_CLOSE.match(prompt, at) if round_open else None
        if char == "\\":
            following = prompt[at + 1 : at + 2]
            escaped = following != "" and following in "()[]\\"
            pieces.append((following if escaped else char, 1.0))
            at += 2 if escaped else 1
            continue
        if explicit:
            scale(round_open.pop(), float(explicit[1]))
            at = explicit.end()
            continue
        if plain := _A1111_PLAIN.match(prompt, at):
            pieces.append((plain[0], 1.0))
            at = plain.end()
            continue
        if char == "(":
            round_open.append(len(pieces))
        elif char == "[":
            square_open.append(len(pieces))
        elif char == ")" and round_open:
            scale(round_open.pop(), 1.1)
        elif char == "]" and square_open:
            scale(square_open.pop(), 1 / 1.1)
        else:
            pieces.append((char, 1.0))
        at += 1
    for first in round_open:
        scale(first, 1.1)
    for first in square_open:
        scale(first, 1 / 1.1)
    joined: list[Fragment] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]


class _Compel:
    """A recursive descent over one prompt; positions instead of copies."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        # What closes each bracket or quote, found once so that parsing stays linear. One
        # without a partner is text.
        self.closes: dict[int, int] = {}
        opened: list[int] = []
        quote: int | None = None
        at = 0
        while at < len(prompt):
            char = prompt[at]
            if char == "\\":
                at += 1
            elif char == "(":
                opened.append(at)
            elif char == ")" and opened:
                self.closes[opened.pop()] = at
            elif char == '"':
                if quote is not None:
                    self.closes[quote] = at
                quote = at
            at += 1

    def sequence(self, at: int, end: int, weight: float, depth: int) -> list[Fragment]:
        """Fragments of ``prompt[at:end]``."""
        if depth > _MAX_DEPTH:
            raise InvalidRequest("prompt", f"has more than {_MAX_DEPTH} nested brackets.")
        out: list[Fragment] = []
        text = ""
        while at < end:
            char = self.prompt[at]
            if char == "\\" and at + 1 < end and self.prompt[at + 1] in '()"\\':
                text += self.prompt[at + 1]
                at += 2
                continue
            if char in '("' and (close := self.closes.get(at, end)) < end:
                factor, after = self._operator(close + 1, end)
                out.append((text, weight))
                out += self.sequence(at + 1, close, _finite(weight * factor), depth + 1)
                text, at = "", after
                continue
            if char in "+-.":
                factor, after = self._operator(at, end, bare_word=True)
                rest, word = _last_word(text)
                if after > at and word:
                    out += [(rest, weight), (word, _finite(weight * factor))]
                    text, at = "", after
                    continue
            text += char
            at += 1
        return [*out, (text, weight)]

    def _operator(self, at: int, end: int, bare_word: bool = False) -> tuple[float, int]:
        """The factor of the operator at ``at`` and the position after it; 1 where none is."""
        match = _COMPEL_OPERATOR.match(self.prompt, at, end)
        if match is None or (bare_word and match["number"]):
            return 1.0, at  # "(x)1.3" is a weight, "word1.3" is a word
        if match["other"]:
            raise InvalidRequest(
                "prompt",
                f"the compel operator .{match['other']}() is not supported.",
                "Put a backslash before its bracket if it is meant as text.",
            )
        value = match["signs"] or match["number"] or match["attend"]
        if value[-1] in "+-":
            if len(value) > 1000:
                _finite(math.inf)
            return (1.1 if value[0] == "+" else 0.9) ** len(value), match.end()
        return float(value), match.end()


def _last_word(text: str) -> tuple[str, str]:
    """``text`` before its last word, and the word that an operator right behind it is about."""
    start = 1 + max(text.rfind(char) for char in " \t\n,")
    word = text[start:]
    if not any(char.isalnum() or char in '()"' for char in word):
        return text, ""
    return text[:start], word


def _flatten(fragments: list[Fragment]) -> list[Fragment]:
    out: list[Fragment] = []
    for text, weight in fragments:
        clean = " ".join(text.split())
        if not clean:
            continue
        if out and out[-1][1] == weight:
            out[-1] = (f"{out[-1][0]} {clean}", weight)
        else:
            out.append((clean, weight))
    return out


def _finite(weight: float) -> float:
    if not math.isfinite(weight):
        raise InvalidRequest("prompt", "contains a weight that is not a finite number.")
    return weight
