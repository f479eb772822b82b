"""Prompt dialects: which words of a prompt weigh more, which act when, which act together.

Two published spellings, mutually unintelligible: :mod:`safelight.text.a1111` (the A1111 web UI's)
and :mod:`safelight.text.compel` (the ``compel`` library's). Only the parsing is in this column;
what a weight does to an embedding differs between the two and belongs to the conditioning.
"""

from __future__ import annotations

from safelight.errors import InvalidRequest
from safelight.text import a1111, compel
from safelight.text.prompt import Dialect, Prompt, Text

DIALECTS = ("none", "a1111", "compel")


def parse(prompt: str, dialect: Dialect = "none", field: str = "prompt") -> Prompt:
    """Understand ``prompt``.

    Args:
        prompt: as the user wrote it.
        dialect: ``none`` (all of it is text), ``a1111`` or ``compel``; see docs/prompts.md.
        field: where it came from, for messages. In ``negative_prompt`` A1111's ``AND`` is text,
            and adapters are refused.

    Raises:
        InvalidRequest: an unknown dialect, or something in the prompt that cannot be meant; the
            message names the place.
    """
    negative = field == "negative_prompt"
    if dialect == "none":
        return Prompt.fixed(Text.of((prompt, 1.0)), prompt)
    if dialect == "a1111":
        read = a1111.parse(prompt, field, conjunctions=not negative)
    elif dialect == "compel":
        read = compel.parse(prompt, field)
    else:
        raise InvalidRequest("dialect", f"{dialect!r} is unknown.", "Use none, a1111 or compel.")
    if negative and read.loras:
        raise InvalidRequest(field, "asks for a LoRA.", "Ask for it in the prompt.")
    return read


def extract_loras(
    prompt: str, dialect: Dialect = "none"
) -> tuple[str, tuple[tuple[str, float], ...]]:
    """The prompt without the adapters it asks for, and those as (name, scale).

    A1111's ``<lora:name:0.8>``, compel's ``withLora(name, 0.8)``; the dialect ``none`` has none.

    Raises:
        InvalidRequest: as :func:`parse`.
    """
    read = parse(prompt, dialect)
    return read.plain, read.loras
