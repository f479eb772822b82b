"""``safelight tokens``: how many tokens a prompt has, and in which windows they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from safelight.cli import show
from safelight.errors import InvalidRequest
from safelight.names import DEFAULT_MODEL

if TYPE_CHECKING:
    from safelight.text.counting import Reading
    from safelight.text.prompt import Dialect
    from safelight.text.tokenizer import Chunk, Tokenizer


def command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to count.")],
    model: Annotated[
        str, typer.Option("-m", "--model", help="Whose tokenizer: a name, a folder or a hub id.")
    ] = DEFAULT_MODEL,
    dialect: Annotated[
        str, typer.Option("--prompt-dialect", "--weighting", help="none, a1111 or compel.")
    ] = "none",
    steps: Annotated[
        int, typer.Option("--steps", help="Of the run, for prompts that change during it.")
    ] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Count a prompt's tokens, and show the windows that the text tower reads them in.

    A window holds 75 tokens in the published models. Longer prompts are read window by window;
    nothing is cut.
    """
    if not 1 <= steps <= 1000:
        raise InvalidRequest("steps", f"must be between 1 and 1000, not {steps}.")
    if dialect not in ("none", "a1111", "compel"):
        raise InvalidRequest(
            "prompt-dialect", f"{dialect!r} is unknown.", "Use none, a1111 or compel."
        )
    from safelight.model import load_tokenizer
    from safelight.text.counting import count_tokens

    tokenizer = load_tokenizer(model)
    readings = count_tokens(tokenizer, prompt, cast("Dialect", dialect), steps=steps)
    if as_json:
        show.document(_report(tokenizer, readings))
        return
    for reading in readings:
        typer.echo(_headline(tokenizer, reading, steps, parts=readings[-1].part + 1))
        for number, window in enumerate(reading.windows, start=1):
            words = " ".join(
                _spelled(token, weight) for token, weight in _content(tokenizer, window)
            )
            typer.echo(f"  {number}: {words}")


def _headline(tokenizer: Tokenizer, reading: Reading, steps: int, parts: int) -> str:
    room = tokenizer.context_length - 2
    count, windows = reading.tokens, len(reading.windows)
    line = f"{count} token{'s' * (count != 1)} in {windows} window{'s' * (windows != 1)} of {room}"
    if parts > 1:
        line += f", part {reading.part + 1} of {parts}, weight {reading.weight:g}"
    if len(reading.steps) < steps:
        line += f", steps {_ranges([step + 1 for step in reading.steps])}"
    return line


def _ranges(numbers: list[int]) -> str:
    """1-3, 5, 7-9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]}" if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _content(tokenizer: Tokenizer, window: Chunk) -> list[tuple[str, float]]:
    tokens = tokenizer.spell(window.ids)
    rows = zip(tokens, window.weights, window.sources, strict=True)
    return [(token, weight) for token, weight, source in rows if source >= 0]


def _spelled(token: str, weight: float) -> str:
    """The token; a word that goes on ends in a hyphen, a weight stands behind a times sign."""
    word = token.removesuffix("</w>") if token.endswith("</w>") else f"{token}-"
    return word if weight == 1 else f"{word}×{weight:.3g}"


def _report(tokenizer: Tokenizer, readings: list[Reading]) -> dict[str, Any]:
    return {
        "schema": 1,
        "window": tokenizer.context_length - 2,
        "readings": [
            {
                "part": reading.part,
                "weight": reading.weight,
                "steps": list(reading.steps),
                "tokens": reading.tokens,
                "windows": [
                    [{"token": t, "weight": w} for t, w in _content(tokenizer, window)]
                    for window in reading.windows
                ],
            }
            for reading in readings
        ],
    }
