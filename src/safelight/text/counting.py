"""How many tokens a prompt has, and in which windows they are read."""

from __future__ import annotations

from dataclasses import dataclass

from safelight.text import weighting
from safelight.text.prompt import Dialect, Text
from safelight.text.tokenizer import Chunk, Tokenizer
from safelight.text.windows import MANNERS


@dataclass(frozen=True)
class Reading:
    """One text of a prompt.

    Args:
        part: which of the prompts that ``AND`` joins, from 0.
        weight: of that part.
        steps: at which steps it is read, from 0.
        windows: as the text tower gets them.
    """

    part: int
    weight: float
    steps: tuple[int, ...]
    windows: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        """Without start, end and padding."""
        return sum(source >= 0 for window in self.windows for source in window.sources)


def text_windows(tokenizer: Tokenizer, text: Text) -> list[Chunk]:
    """The windows that a text is read in. What is mixed stands one behind the other."""
    return [
        chunk
        for clause in text.clauses
        for fragments, _ in clause.blend
        for chunk in tokenizer.weighted_chunks(fragments, MANNERS[text.dialect])
    ]


def count_tokens(
    tokenizer: Tokenizer, prompt: str, dialect: Dialect = "none", *, steps: int = 1
) -> list[Reading]:
    """Every text that ``prompt`` becomes in a run, part by part, by first use.

    Args:
        steps: sampling steps, for prompts that change during the run.

    Raises:
        InvalidRequest: as :func:`safelight.text.weighting.parse`.
    """
    out = []
    for number, part in enumerate(weighting.parse(prompt, dialect).parts):
        at: dict[Text, list[int]] = {}
        for step, text in enumerate(part.texts(steps)):
            at.setdefault(text, []).append(step)
        out += [
            Reading(number, part.weight, tuple(when), tuple(text_windows(tokenizer, text)))
            for text, when in at.items()
        ]
    return out
