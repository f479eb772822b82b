"""The kinds of values a request is made of, and what is said of a wrong one. No torch."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError

from safelight.errors import InvalidRequest
from safelight.inputs import PictureInput, numbers, picture_input, picture_inputs

MAX_SIDE = 8192
MAX_PROMPT = 20_000
MAX_ADAPTERS = 32


def whole(value: Any) -> Any:
    """Whole numbers of any kind (numpy's too, and 25.0); neither booleans nor text."""
    if value is None or isinstance(value, bool | str | bytes):
        return refuse_type(value, "a whole number")
    if isinstance(value, float):
        return int(value) if value.is_integer() else refuse_type(value, "a whole number")
    try:
        return operator.index(value)
    except TypeError:
        return refuse_type(value, "a whole number")


def number(value: Any) -> Any:
    """Numbers of any kind; neither booleans nor text."""
    if isinstance(value, bool | str | bytes):
        return refuse_type(value, "a number")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return refuse_type(value, "a number")


def text(value: Any) -> Any:
    if not isinstance(value, str):
        return refuse_type(value, "text")
    if "\0" in value:
        raise ValueError("contains a NUL character.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("contains half a character (an unpaired surrogate).") from None
    return value


def flag(value: Any) -> Any:
    return value if isinstance(value, bool) else refuse_type(value, "true or false")


def refuse_type(value: Any, wanted: str) -> Any:
    raise ValueError(f"must be {wanted}, not {shown(value)}.")


def shown(value: Any) -> str:
    """``value`` for a message: short, whatever it is."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def pairs(value: Any, default: float | str) -> Any:
    """Names alone, pairs, or a mapping, as a tuple of pairs; ``default`` where one is missing."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if isinstance(value, str | os.PathLike):
        value = (value,)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        return refuse_type(value, "a list of names, or of (name, value)")
    if len(value) > MAX_ADAPTERS:
        raise ValueError(f"has {len(value)} entries; at most {MAX_ADAPTERS} are taken.")
    found = []
    for entry in value:
        name, other = (entry, default) if isinstance(entry, str | os.PathLike) else _two(entry)
        name = text(os.fspath(name) if isinstance(name, os.PathLike) else name)
        if not name.strip():
            raise ValueError("has an empty name.")
        found.append((name, other))
    return tuple(found)


def _two(entry: Any) -> tuple[Any, Any]:
    if isinstance(entry, list | tuple) and len(entry) == 2:
        return entry[0], entry[1]
    return refuse_type(entry, "a name, or a pair (name, value)")


Whole = Annotated[int, BeforeValidator(whole)]
Number = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
Text = Annotated[str, BeforeValidator(text), Field(max_length=MAX_PROMPT)]
Flag = Annotated[bool, BeforeValidator(flag)]
Side = Annotated[Whole, Field(ge=8, le=MAX_SIDE, multiple_of=8)]
Picture = Annotated[
    PictureInput, BeforeValidator(picture_input), PlainSerializer(lambda given: given.digest)
]
Pictures = Annotated[
    tuple[PictureInput, ...],
    BeforeValidator(picture_inputs),
    PlainSerializer(lambda given: [each.digest for each in given]),
]
Row = Annotated[tuple[Number, ...], BeforeValidator(numbers), Field(max_length=8192)]


_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
}


def invalid(error: ValidationError, closest: Callable[[str], str]) -> InvalidRequest:
    """The first complaint of a validation, in our words.

    Args:
        closest: what a field of an unknown name may have meant.
    """
    first = error.errors()[0]
    kind, context = first["type"], first.get("ctx") or {}
    name = str(first["loc"][0]) if first["loc"] else "request"
    cause = context.get("error")
    if isinstance(cause, InvalidRequest):
        return cause
    value = shown(first.get("input"))
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return InvalidRequest(name, f"must be {words} {context[key]:g}, not {value}.")
    if kind == "extra_forbidden":
        return InvalidRequest(name, "is not a field.", closest(name))
    if kind == "missing":
        return InvalidRequest(name, "is missing.")
    if kind == "finite_number":
        return InvalidRequest(name, f"must be a finite number, not {value}.")
    if kind == "string_too_long":
        return InvalidRequest(name, f"is longer than {context['max_length']} characters.")
    if kind == "literal_error":
        return InvalidRequest(name, f"must be {context['expected']}, not {value}.")
    if kind == "value_error":
        return InvalidRequest(name, str(cause))
    return InvalidRequest(name, f"{first['msg']}: {value}.")
