"""The dialect of the ``compel`` library (version 2.5 is what the tests compare with).

``word+`` is 1.1, ``word--`` 0.81, ``(some words)1.3``, ``"quoted"1.3``, ``(x).attend(1.2)``;
brackets nest and multiply; operators touch what they are about. ``("a", "b").blend(0.7, 0.3)``
mixes whole prompts, ``("a", "b").and(1, 0.5)`` sets them one behind the other, ``withLora(name,
0.8)`` asks for an adapter. A backslash makes ``( ) " , . + - =`` text.

What looks like an operator and cannot be one ("a - b", "hot-dog", an open bracket) is text, as it
is there; ``blend``, ``and`` and ``swap`` where they cannot act are errors here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from safelight.text.prompt import MAX_DEPTH, Clause, Fragments, Prompt, Text, sound, wrong

PLUS, MINUS = 1.1, 0.9

_SPACE = " \t\n\r\v\f"
_SYNTAX = '()",.+-='
_BLANKS = re.compile(rf"[{_SPACE}]*")
# One word: escaped syntax, a sign in front of something else, a number, or any other character.
_WORD = re.compile(
    rf"(?:\\[{re.escape(_SYNTAX)}]|[+-](?![{_SPACE}{re.escape(_SYNTAX)}]|$)|-?[0-9]+"
    rf"|[^{_SPACE}{re.escape(_SYNTAX)}])+"
)
_FREE = re.compile(rf"[^{_SPACE}]+")
_SIGNS = re.compile(r"\++|-+")
_REAL = r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+)|-?[0-9]+"
_FACTOR = re.compile(rf"\++|-+|{_REAL}")
_ATTEND = re.compile(rf"[{_SPACE}]*\.attend[{_SPACE}]*\([{_SPACE}]*(\++|-+|{_REAL})[{_SPACE}]*\)")
_LORA = re.compile(
    rf"(?:useLora|withLora)[{_SPACE}]*\([{_SPACE}]*([\w-]+)[{_SPACE}]*"
    rf"(?:,[{_SPACE}]*({_REAL})[{_SPACE}]*)?\)"
)
_OPERATOR = re.compile(rf"\.(blend|and|add|swap)[{_SPACE}]*\(")
_ESCAPED = re.compile(rf"\\([{re.escape(_SYNTAX)}])")


class _Leaf(NamedTuple):
    """Text, as it was written."""

    text: str


class _Weighted(NamedTuple):
    """Nodes whose weights are multiplied by a factor."""

    factor: float
    nodes: list[_Node]


class _Lora(NamedTuple):
    """An adapter, and where in the prompt it is asked for."""

    name: str
    scale: float
    start: int
    end: int


_Node = _Leaf | _Weighted | _Lora
Found = tuple[list[_Node], int] | None
"""What a rule has read and where it ended; None where it does not apply."""


def parse(prompt: str, name: str = "prompt") -> Prompt:
    """Understand ``prompt``.

    Args:
        name: the request's field, for messages.

    Raises:
        InvalidRequest: with the place in the prompt.
    """
    reader = _Reader(prompt, name)
    clauses = reader.whole()
    loras = tuple((lora.name, lora.scale) for lora in reader.loras)
    return Prompt.fixed(Text(clauses, "compel"), reader.plain(), loras)


class _Reader:
    """A recursive descent in the grammar's own order, every rule at every place at most once."""

    def __init__(self, prompt: str, name: str) -> None:
        # A comma is followed by a space, so that it never sticks to the next word.
        pieces = re.split(rf"(,(?=[^{_SPACE}]))", prompt)
        self.origins: list[int] = []
        spaced: list[str] = []
        at = 0
        for piece in pieces:
            gap = piece == "," and at + 1 < len(prompt) and prompt[at + 1] not in _SPACE
            spaced.append(piece + " " * gap)
            self.origins += [*range(at, at + len(piece)), *[at] * gap]
            at += len(piece)
        self.prompt, self.name = prompt, name
        self.text = "".join(spaced)
        self.origins.append(len(prompt))
        self.loras: list[_Lora] = []
        self._known: dict[tuple[str, int, int], Found] = {}
        self._depth = 0
        self._quotes = self._pair_quotes()

    def plain(self) -> str:
        """The prompt without the adapters it asks for."""
        out, at = [], 0
        for lora in sorted(self.loras, key=lambda lora: lora.start):
            out.append(self.prompt[at : lora.start])
            at = lora.end
        return "".join([*out, self.prompt[at:]])

    def _pair_quotes(self) -> dict[int, int]:
        """The next quotation mark behind each, up to the end of its line."""
        marks = [m.start() for m in re.finditer(r'(?<!\\)"|\n', self.text)]
        return {a: b for a, b in pairwise(marks) if self.text[a] == self.text[b] == '"'}

    def _error(self, at: int, problem: str, fix: str = "") -> Exception:
        return wrong(self.name, self.origins[at], problem, fix)

    # -- the whole ---------------------------------------------------------------------------

    def whole(self) -> tuple[Clause, ...]:
        """Clauses of the prompt."""
        operators = list(_OPERATOR.finditer(self.text))
        if not operators:
            nodes, _ = self.loose(0, len(self.text))
            return (Clause(((self._flat(nodes), 1.0),)),)
        first = operators[0]
        if first[1] == "swap":
            raise self._error(
                first.start(),
                "the compel operator .swap() is not supported.",
                "Put a backslash before its bracket if it is meant as text.",
            )
        if len(operators) > 1:
            raise self._error(
                operators[1].start(),
                f".{operators[1][1]}() stands beside another: only one fits a prompt.",
                "Put a backslash before its bracket if it is meant as text.",
            )
        return self._joined(first)

    def _joined(self, operator: re.Match[str]) -> tuple[Clause, ...]:
        """``(target, target).and(…)`` or ``.blend(…)``, which is all there is."""
        kind, at = operator[1], self._skip_loras(0)
        targets = self._targets(at)
        if targets is None or self._skip(targets[1]) != operator.start():
            raise self._error(
                operator.start(),
                f".{kind}() needs prompts in front of it, and nothing else.",
                f'Write ("one prompt", "another").{kind}(1, 0.5).',
            )
        flat = [self._flat(nodes) for nodes in targets[0]]
        weights, normal, at = self._options(operator)
        at = self._skip_loras(at)
        if at < len(self.text):
            raise self._error(at, f"there is text behind .{kind}().", "It must be the last thing.")
        if weights and len(weights) != len(flat):
            raise self._error(
                operator.start(), f"{len(weights)} weights for {len(flat)} prompts.", "One each."
            )
        weights = weights or [1.0] * len(flat)
        if kind != "blend":
            return tuple(
                Clause(((part, 1.0),), weight) for part, weight in zip(flat, weights, strict=True)
            )
        if normal:
            total = sum(weights)
            if abs(total) < 1e-6:
                raise self._error(
                    operator.start(),
                    "the weights add up to 0.",
                    "Add no_normalize behind them to take them as they are.",
                )
            weights = [
                sound(weight / total, self.name, self.origins[operator.start()])
                for weight in weights
            ]
        return (Clause(tuple(zip(flat, weights, strict=True))),)

    def _targets(self, at: int) -> tuple[list[list[_Node]], int] | None:
        at, end = self._skip(at), len(self.text)
        if self.text[at : at + 1] != "(":
            return None
        targets: list[list[_Node]] = []
        at += 1
        while True:
            at = self._skip(at)
            found = self._target(at, end) or self._prompt_in_quotes(at)
            if found is None:
                return None
            targets.append(found[0])
            at = self._skip(found[1])
            mark = self.text[at : at + 1]
            at += 1
            if mark == ")":
                return targets, at
            if mark != ",":
                return None

    def _prompt_in_quotes(self, at: int) -> Found:
        close = self._quotes.get(at)
        return None if close is None else (self.loose(at + 1, close)[0], close + 1)

    def _options(self, operator: re.Match[str]) -> tuple[list[float], bool, int]:
        """Weights, whether they are normalised, and where the bracket is closed."""
        close = self.text.find(")", operator.end())
        if close < 0:
            raise self._error(operator.start(), f".{operator[1]}( is not closed.")
        words = [word.strip() for word in self.text[operator.end() : close].split(",")]
        normal = True
        if operator[1] == "blend" and words[-1] == "no_normalize":
            words, normal = words[:-1], False
        if words == [""]:
            words = []
        for word in words:
            if not re.fullmatch(_REAL, word):
                raise self._error(operator.end(), f"{word[:30]!r} is not a weight.")
        place = self.origins[operator.end()]
        return [sound(float(word), self.name, place) for word in words], normal, close + 1

    def _skip_loras(self, at: int) -> int:
        while (found := self._lora(self._skip(at))) is not None:
            self._flat(found[0])
            at = found[1]
        return self._skip(at)

    # -- rules -------------------------------------------------------------------------------

    def loose(self, at: int, end: int) -> tuple[list[_Node], int]:
        """A prompt: what has syntax, and everything else word by word."""
        nodes: list[_Node] = []
        while (at := self._skip(at, end)) < end:
            found = self._syntax(at, end)
            if found is None:
                free = _FREE.match(self.text, at, end)
                assert free is not None
                found = [_Leaf(free[0])], free.end()
            nodes += found[0]
            at = found[1]
        return nodes, end

    def _syntax(self, at: int, end: int) -> Found:
        return (
            self._lora(at, end)
            or self._once("attention", self._attention, at, end)
            or self._once("quoted", self._quoted, at, end)
            or self._once("bracket", self._bracket, at, end)
        )

    def _strict(self, at: int, end: int) -> tuple[list[_Node], int]:
        """What brackets and quotes may hold: as much of it as there is."""
        nodes: list[_Node] = []
        while True:
            start = self._skip(at, end)
            found = self._syntax(start, end) or self._word(start, end)
            if found is None and start < end and self.text[start] in ",.":
                found = [_Leaf(self.text[start])], start + 1
            if found is None:
                return nodes, at
            nodes += found[0]
            at = found[1]

    def _attention(self, at: int, end: int) -> Found:
        target = self._target(at, end)
        if target is None:
            return None
        nodes, after = target
        match = _ATTEND.match(self.text, after, end)
        if match is not None:
            return [_Weighted(self._factor(match[1], after), nodes)], match.end()
        grouped = self.text[at] in '("'
        match = (_FACTOR if grouped else _SIGNS).match(self.text, after, end)
        if match is None:
            return None
        return [_Weighted(self._factor(match[0], after), nodes)], match.end()

    def _target(self, at: int, end: int) -> Found:
        """What an operator can be about: quotes, brackets or a word."""
        return (
            self._once("quoted", self._quoted, at, end)
            or self._once("bracket", self._bracket, at, end)
            or self._word(at, end)
        )

    def _quoted(self, at: int, end: int) -> Found:
        close = self._quotes.get(at)
        if close is None or close >= end:
            return None
        nodes, after = self._strict(at + 1, close)
        return (nodes, close + 1) if self._skip(after, close) == close else None

    def _bracket(self, at: int, end: int) -> Found:
        if self.text[at : at + 1] != "(":
            return None
        nodes, after = self._strict(at + 1, end)
        after = self._skip(after, end)
        return (nodes, after + 1) if after < end and self.text[after] == ")" else None

    def _word(self, at: int, end: int) -> Found:
        match = _WORD.match(self.text, at, end)
        return None if match is None else ([_Leaf(match[0])], match.end())

    def _lora(self, at: int, end: int | None = None) -> Found:
        match = _LORA.match(self.text, at, len(self.text) if end is None else end)
        if match is None:
            return None
        start, after = self.origins[at], self.origins[match.end() - 1] + 1
        scale = sound(float(match[2] or 1.0), self.name, start)
        return [_Lora(match[1], scale, start, after)], match.end()

    def _once(self, rule: str, read: Callable[[int, int], Found], at: int, end: int) -> Found:
        """``read(at, end)``, remembered: the grammar asks the same question many times."""
        key = (rule, at, end)
        if key not in self._known:
            self._depth += 1
            if self._depth > 2 * MAX_DEPTH:  # two rules a bracket
                raise self._error(at, f"more than {MAX_DEPTH} brackets are open.")
            self._known[key] = read(at, end)
            self._depth -= 1
        return self._known[key]

    def _skip(self, at: int, end: int | None = None) -> int:
        match = _BLANKS.match(self.text, at, len(self.text) if end is None else end)
        assert match is not None
        return match.end()

    # -- numbers -----------------------------------------------------------------------------

    def _factor(self, value: str, at: int) -> float:
        if value[-1] not in "+-":
            return sound(float(value), self.name, self.origins[at])
        base = PLUS if value[0] == "+" else MINUS
        factor = base ** len(value) if len(value) <= 1000 else math.inf
        return sound(factor, self.name, self.origins[at])

    def _flat(self, nodes: list[_Node]) -> Fragments:
        """Fragments; neighbours of one weight are joined by a space. Adapters are noted."""
        out: list[tuple[str, float]] = []
        for text, weight in self._leaves(nodes, 1.0):
            if out and out[-1][1] == weight:
                out[-1] = (f"{out[-1][0]} {text}", weight)
            else:
                out.append((text, weight))
        return tuple(out) or (("", 1.0),)

    def _leaves(self, nodes: list[_Node], weight: float) -> Iterator[tuple[str, float]]:
        for node in nodes:
            if isinstance(node, _Weighted):
                yield from self._leaves(node.nodes, sound(weight * node.factor, self.name, 0))
            elif isinstance(node, _Lora):
                self.loras.append(node)
            else:
                yield _ESCAPED.sub(r"\1", node.text), weight
