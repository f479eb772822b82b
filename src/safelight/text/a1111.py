"""The A1111 web UI's dialect.

``(x)`` is 1.1, ``[x]`` 1/1.1, ``(x:1.3)`` 1.3; brackets nest and multiply; an open bracket reaches
to the end; a backslash makes ``( ) [ ] : | <`` and itself text. ``BREAK`` begins a new window,
``<lora:name:0.8>`` asks for an adapter, ``[from:to:when]`` changes the text during the run,
``[a|b]`` at every step, and ``AND`` joins prompts that are guided towards together.

Facts are those of the web UI's own examples and wiki ("Features"); docs/prompts.md lists where we
differ on purpose.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from safelight.text.prompt import MAX_DEPTH, Clause, Part, Prompt, Text, sound, wrong

MAX_PARTS = 16
"""Prompts that AND may join: each is a branch of every network call."""

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_CLOSE = re.compile(rf":\s*({_NUMBER})\s*\)")
_PLAIN = re.compile(r"[^\\()\[\]:]+")
_BREAK = re.compile(r"\bBREAK\b")
_AND = re.compile(r"\bAND\b")
_SHARE = re.compile(rf"(?<!\\):\s*({_NUMBER})$")
_WHEN = re.compile(rf"\s*({_NUMBER})\s*")
_TAG = re.compile(r"(?<!\\)<(lora|lyco|hypernet):([^<>]*)>")
_ESCAPES = "()[]\\:|<"

Span = tuple[int, int]


@dataclass(frozen=True)
class _Edit:
    """``[before:after:when]``."""

    before: _Tree
    after: _Tree
    when: float
    share: bool
    """``when`` is a share of the run, not a number of steps."""

    def chosen(self, step: int, steps: int) -> _Tree:
        # A hair more, so that 0.29 of 100 steps is 29 of them.
        switch = int(self.when * steps + 1e-6) if self.share else int(self.when)
        return self.before if step < min(switch, steps) else self.after


@dataclass(frozen=True)
class _Alternation:
    """``[a|b|c]``."""

    options: tuple[_Tree, ...]

    def chosen(self, step: int, steps: int) -> _Tree:
        return self.options[step % len(self.options)]


_Tree = tuple[Span | _Edit | _Alternation, ...]


def parse(prompt: str, name: str = "prompt", *, conjunctions: bool = True) -> Prompt:
    """Understand ``prompt``.

    Args:
        name: the request's field, for messages.
        conjunctions: ``AND`` joins prompts; otherwise it is text, as in a negative prompt.

    Raises:
        InvalidRequest: with the place in the prompt.
    """
    source = _Source.of(prompt, name)
    parts = []
    for (start, end), weight in source.conjuncts() if conjunctions else [source.whole]:
        tree = source.tree(start, end)
        parts.append(_part(source, tree, weight))
    return Prompt(tuple(parts), source.loras, source.text)


def _part(source: _Source, tree: _Tree, weight: float) -> Part:
    known: dict[tuple[Span, ...], Text] = {}

    def read(step: int, steps: int) -> Text:
        spans = tuple(_spans(tree, step, steps))
        if spans not in known:
            known[spans] = _weigh(source, spans)
        return known[spans]

    moving = any(not isinstance(node, tuple) for node in tree)
    if not moving:
        read(0, 1)  # so that a mistake is found here
    return Part(read, weight, moving)


def _spans(tree: _Tree, step: int, steps: int) -> list[Span]:
    """What is left of the source at ``step``."""
    out: list[Span] = []
    for node in tree:
        if isinstance(node, _Edit | _Alternation):
            out += _spans(node.chosen(step, steps), step, steps)
        else:
            out.append(node)
    return out


# -- structure ----------------------------------------------------------------------------------


@dataclass
class _Bracket:
    """A matched pair, and the ``:`` and ``|`` right inside it."""

    open: int
    close: int = -1
    colons: list[int] = field(default_factory=list)
    pipes: list[int] = field(default_factory=list)


class _Source:
    """A prompt without its adapters, and which brackets belong together."""

    def __init__(
        self, text: str, name: str, loras: Sequence[tuple[str, float]], cuts: Sequence[Span]
    ) -> None:
        self.text, self.name, self.loras = text, name, tuple(loras)
        # For each cut: where it was in the clean text, and how much is missing up to there.
        self._cuts = [at for at, _ in cuts]
        self._missing = [missing for _, missing in cuts]
        self.squares: dict[int, _Bracket] = {}
        self._outer: list[_Bracket] = []
        self._match()

    @classmethod
    def of(cls, prompt: str, name: str) -> _Source:
        kept, loras, cuts, missing, last = [], [], [], 0, 0
        for tag in _TAG.finditer(prompt):
            loras.append(_adapter(tag, name))
            kept.append(prompt[last : tag.start()])
            last = tag.end()
            cuts.append((tag.start() - missing, missing + len(tag[0])))
            missing += len(tag[0])
        return cls("".join([*kept, prompt[last:]]), name, loras, cuts)

    def origin(self, at: int) -> int:
        """Where index ``at`` of the clean text is in the prompt as it was written."""
        before = bisect_right(self._cuts, at)
        return at + (self._missing[before - 1] if before else 0)

    def _match(self) -> None:
        """Pair the brackets; one without a partner is left to the weights."""
        opened: list[_Bracket] = []
        text, at = self.text, 0
        while at < len(text):
            char = text[at]
            if char == "\\":
                at += 1
            elif char in "([":
                opened.append(_Bracket(at))
                if len(opened) > MAX_DEPTH:
                    raise wrong(
                        self.name, self.origin(at), f"more than {MAX_DEPTH} brackets are open."
                    )
            elif char in ")]":
                if opened and text[opened[-1].open] + char in ("()", "[]"):
                    pair = opened.pop()
                    pair.close = at
                    if char == "]":
                        self.squares[pair.open] = pair
                    # Whatever it holds is not outermost any more.
                    while self._outer and self._outer[-1].open > pair.open:
                        self._outer.pop()
                    self._outer.append(pair)
            elif opened and char == ":":
                opened[-1].colons.append(at)
            elif opened and char == "|":
                opened[-1].pipes.append(at)
            at += 1

    @property
    def whole(self) -> tuple[Span, float]:
        return (0, len(self.text)), 1.0

    def conjuncts(self) -> list[tuple[Span, float]]:
        """Where each prompt that AND joins begins and ends, and its weight."""
        opens = [pair.open for pair in self._outer]
        ends, starts = [], [0]
        for match in _AND.finditer(self.text):
            around = bisect_right(opens, match.start()) - 1
            if around >= 0 and match.start() < self._outer[around].close:
                raise wrong(
                    self.name,
                    self.origin(match.start()),
                    "AND stands in brackets, where it cannot join prompts.",
                    "Put it outside, or write it small.",
                )
            ends.append(match.start())
            starts.append(match.end())
        if not ends:
            return [self.whole]
        if len(starts) > MAX_PARTS:
            raise wrong(self.name, self.origin(ends[-1]), f"more than {MAX_PARTS} parts.")
        return [
            self._conjunct(start, end)
            for start, end in zip(starts, [*ends, len(self.text)], strict=True)
        ]

    def _conjunct(self, start: int, end: int) -> tuple[Span, float]:
        weight = 1.0
        if match := _SHARE.search(self.text[start:end].rstrip()):
            weight = sound(float(match[1]), self.name, self.origin(start + match.start()))
            end = start + match.start()
        if not self.text[start:end].strip():
            raise wrong(
                self.name,
                self.origin(min(start, len(self.text))),
                "AND has nothing beside it.",
                "It joins two prompts; write it small where it is a word.",
            )
        return (start, end), weight

    def tree(self, start: int, end: int) -> _Tree:
        """``text[start:end]`` as text, edits and alternations."""
        out: list[Span | _Edit | _Alternation] = []
        at = text = start
        while at < end:
            if self.text[at] == "\\":
                at += 2
                continue
            pair = self.squares.get(at)
            node = self._node(pair) if pair is not None and pair.close < end else None
            if node is None or pair is None:
                at += 1
                continue
            out += [(text, at), node]
            at = text = pair.close + 1
        out.append((text, end))
        return tuple(n for n in out if not isinstance(n, tuple) or n[0] < n[1])

    def _node(self, pair: _Bracket) -> _Edit | _Alternation | None:
        """What a pair of square brackets is; None: a weight below 1."""
        colons, pipes = pair.colons, pair.pipes
        when = _WHEN.fullmatch(self.text, colons[-1] + 1, pair.close) if colons else None
        if when is not None and len(colons) <= 2:
            if pipes:
                raise wrong(
                    self.name,
                    self.origin(pair.open),
                    "this bracket both alternates and changes once.",
                    "Nest them: [[a|b]:c:0.5].",
                )
            first = pair.open + 1
            before = self.tree(first, colons[0]) if len(colons) == 2 else ()
            after = self.tree(colons[0] + 1 if len(colons) == 2 else first, colons[-1])
            number = float(when[1])
            if abs(number) > 1e6:
                raise wrong(self.name, self.origin(colons[-1]), "there are never so many steps.")
            return _Edit(before, after, number, "." in when[1] and number <= 1)
        if pipes:
            ends = [*pipes, pair.close]
            starts = [pair.open + 1, *(pipe + 1 for pipe in pipes)]
            return _Alternation(tuple(self.tree(a, b) for a, b in zip(starts, ends, strict=True)))
        return None


def _adapter(tag: re.Match[str], name: str) -> tuple[str, float]:
    """``<lora:name>`` or ``<lora:name:scale>``."""
    kind, rest = tag[1], tag[2].split(":")
    if kind == "hypernet":
        raise wrong(name, tag.start(), "hypernetworks are not supported.")
    if not rest[0].strip():
        raise wrong(name, tag.start(), "a LoRA without a name.", "Write <lora:name:0.8>.")
    scale = 1.0
    if len(rest) > 1:
        number = rest[1].strip()
        if len(rest) > 2 or not re.fullmatch(_NUMBER, number):
            raise wrong(
                name, tag.start(), f"{tag[0][:60]!r} is not a LoRA.", "Write <lora:name:0.8>."
            )
        scale = sound(float(number), name, tag.start())
    return rest[0].strip(), scale


# -- weights ------------------------------------------------------------------------------------


def _weigh(source: _Source, spans: Sequence[Span]) -> Text:
    """The text that ``spans`` of the source make, with its weights and windows."""
    text = "".join(source.text[a:b] for a, b in spans)
    pieces: list[tuple[str | None, float]] = []  # None is a BREAK
    # Brackets that are open, by the index of the first piece inside them.
    round_open: list[int] = []
    square_open: list[int] = []

    def scale(first: int, factor: float, at: int) -> None:
        place = source.origin(_place(spans, at))
        for i in range(first, len(pieces)):
            pieces[i] = (pieces[i][0], sound(pieces[i][1] * factor, source.name, place))

    at = 0
    while at < len(text):
        char = text[at]
        if char == "\\":
            following = text[at + 1 : at + 2]
            escaped = following != "" and following in _ESCAPES
            pieces.append((following if escaped else char, 1.0))
            at += 2 if escaped else 1
        elif round_open and (explicit := _CLOSE.match(text, at)):
            scale(round_open.pop(), float(explicit[1]), at)
            at = explicit.end()
        elif plain := _PLAIN.match(text, at):
            first, *others = _BREAK.split(plain[0])
            pieces.append((first.rstrip() if others else first, 1.0))
            for other in others:
                pieces += [(None, 1.0), (other.lstrip(), 1.0)]
            at = plain.end()
        else:
            if char == "(":
                round_open.append(len(pieces))
            elif char == "[":
                square_open.append(len(pieces))
            elif char == ")" and round_open:
                scale(round_open.pop(), 1.1, at)
            elif char == "]" and square_open:
                scale(square_open.pop(), 1 / 1.1, at)
            else:
                pieces.append((char, 1.0))
            if len(round_open) + len(square_open) > 2 * MAX_DEPTH:
                place = source.origin(_place(spans, at))
                raise wrong(source.name, place, f"more than {2 * MAX_DEPTH} brackets are open.")
            at += 1
    for first in round_open:
        scale(first, 1.1, len(text))
    for first in square_open:
        scale(first, 1 / 1.1, len(text))
    return _windows(pieces)


def _windows(pieces: Sequence[tuple[str | None, float]]) -> Text:
    """Neighbours of one weight joined; a clause for each stretch between BREAKs."""
    stretches: list[list[tuple[str, float]]] = [[]]
    for text, weight in pieces:
        here = stretches[-1]
        if text is None:
            stretches.append([])
        elif here and here[-1][1] == weight:
            here[-1] = (here[-1][0] + text, weight)
        elif text:
            here.append((text, weight))
    if len(stretches) > 1 and not stretches[-1]:
        stretches.pop()  # a BREAK at the end asks for nothing
    return Text(
        tuple(Clause(((tuple(s) or (("", 1.0),), 1.0),)) for s in stretches), dialect="a1111"
    )


def _place(spans: Sequence[Span], at: int) -> int:
    """Index ``at`` of the joined spans, in the source."""
    for start, end in spans:
        if at < end - start:
            return start + at
        at -= end - start
    return spans[-1][1] if spans else 0
