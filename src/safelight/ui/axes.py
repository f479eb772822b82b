"""Grids in the axis syntax of AUTOMATIC1111's X/Y/Z plot. No torch.

An axis is a kind ("Steps") and a text of values::

    10, 20, 30          each of them
    1-5                 1, 2, 3, 4, 5
    1-10 (+3)           1, 4, 7, 10
    10-1 (-3)           10, 7, 4, 1
    1-5 [3]             three values, evenly spaced: 1, 3, 5
    red, green, blue    prompt S/R: "red" in the prompt, then each of the others in its place
    "a, b", c           quotes keep a comma

as its ``scripts/xyz_grid.py`` reads it, with one difference: a range down includes its end.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safelight import names
from safelight.errors import InvalidRequest

MOST = 100
"""Pictures in a grid."""

_INT = r"\s*([+-]?\s*\d+)\s*-\s*([+-]?\s*\d+)"
_FLOAT = r"\s*([+-]?\s*\d+(?:\.\d*)?)\s*-\s*([+-]?\s*\d+(?:\.\d*)?)"
_RANGE = {
    int: re.compile(_INT + r"(?:\s*\(\s*([+-]\s*\d+)\s*\))?\s*"),
    float: re.compile(_FLOAT + r"(?:\s*\(\s*([+-]\s*\d+(?:\.\d*)?)\s*\))?\s*"),
}
_COUNT = {
    int: re.compile(_INT + r"\s*\[\s*(\d+)\s*\]\s*"),
    float: re.compile(_FLOAT + r"\s*\[\s*(\d+)\s*\]\s*"),
}
Body = dict[str, Any]


def split(text: str) -> list[str]:
    """Values between commas; quotes keep a comma, line ends count as one."""
    lines = [line for line in text.splitlines() if line.strip()]
    found = [value.strip() for row in csv.reader(lines, skipinitialspace=True) for value in row]
    return [value for value in found if value]


def numbers(text: str, kind: type[int] | type[float], field: str = "values") -> list[Any]:
    """Numbers, ranges, and ranges with a count.

    Raises:
        InvalidRequest: something else; the message shows the syntax.
    """
    found: list[Any] = []
    for part in split(text):
        if match := _COUNT[kind].fullmatch(part):
            first, last, count = _as(kind, match[1]), _as(kind, match[2]), int(match[3])
            if not 1 <= count <= MOST:
                raise InvalidRequest(field, f"{part!r} asks for {count} values.", f"1 to {MOST}.")
            width = (last - first) / (count - 1) if count > 1 else 0.0
            found += [kind(round(first + k * width, 10)) for k in range(count)]
        elif match := _RANGE[kind].fullmatch(part):
            found += _range(kind, match, part, field)
        else:
            try:
                found.append(kind(part))
            except ValueError:
                what = "a whole number" if kind is int else "a number"
                fix = "Write 1, 2, 3 or 1-5 or 1-10 (+2) or 1-10 [3]."
                raise InvalidRequest(field, f"{part!r} is not {what}.", fix) from None
    return found


def _as(kind: type[int] | type[float], text: str) -> Any:
    return kind(text.replace(" ", ""))


def _range(kind: type, match: re.Match[str], part: str, field: str) -> list[Any]:
    first, last = _as(kind, match[1]), _as(kind, match[2])
    step = _as(kind, match[3]) if match[3] else kind(1 if last >= first else -1)
    if step == 0 or (last - first) * step < 0:
        raise InvalidRequest(field, f"{part!r} never arrives.", "Turn the sign of its step.")
    count = int((last - first) / step + 1e-9) + 1
    if count > MOST:
        raise InvalidRequest(field, f"{part!r} has {count} values.", f"At most {MOST}.")
    return [kind(round(first + k * step, 10)) for k in range(count)]


# -- kinds of axes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What an axis changes.

    Args:
        read: the text, and the request that is changed, to values.
        put: a request with one of the values.
        word: a value in the legend.
        hint: an example of the text.
    """

    read: Callable[[str, Mapping[str, Any], str], list[Any]]
    put: Callable[[Body, Any], None]
    word: Callable[[Any], str]
    hint: str


def _number(name: str, kind: type, label: str, hint: str) -> Kind:
    def put(body: Body, value: Any) -> None:
        body[name] = value

    return Kind(
        lambda text, _, field: numbers(text, kind, field), put, lambda v: f"{label} {v:g}", hint
    )


def _word(name: str, check: Callable[[str], str | None], hint: str) -> Kind:
    def put(body: Body, value: Any) -> None:
        body[name] = value

    return Kind(lambda text, _, field: _checked(split(text), check), put, str, hint)


def _checked(values: list[str], check: Callable[[str], object]) -> list[str]:
    for value in values:
        check(value)
    return values


def _sizes(text: str, _: Mapping[str, Any], field: str) -> list[tuple[int, int]]:
    found = []
    for part in split(text):
        match = re.fullmatch(r"(\d+)\s*[x×]\s*(\d+)", part)
        if not match:
            raise InvalidRequest(field, f"{part!r} is no size.", "Write 512x512.")
        found.append((int(match[1]), int(match[2])))
    return found


def _put_size(body: Body, value: tuple[int, int]) -> None:
    body["width"], body["height"] = value


def _searches(text: str, body: Mapping[str, Any], field: str) -> list[tuple[str, str]]:
    values = split(text)
    if values and values[0] not in f"{body.get('prompt', '')}\n{body.get('negative_prompt', '')}":
        problem = f"{values[0]!r} is neither in the prompt nor in the negative prompt."
        raise InvalidRequest(field, problem, "The first value is what is replaced.")
    return [(values[0], value) for value in values]


def _put_search(body: Body, value: tuple[str, str]) -> None:
    for name in ("prompt", "negative_prompt"):
        if body.get(name):
            body[name] = body[name].replace(*value)


def _orders(text: str, body: Mapping[str, Any], field: str) -> list[tuple[str, ...]]:
    values = split(text)
    missing = next((v for v in values if v not in body.get("prompt", "")), None)
    if missing is not None:
        raise InvalidRequest(field, f"{missing!r} is not in the prompt.")
    if len(values) > 4:
        raise InvalidRequest(field, f"{len(values)} words have too many orders.", "At most 4.")
    return list(itertools.permutations(values))


def _put_order(body: Body, order: tuple[str, ...]) -> None:
    """The words in another order, each at a place where one of them stood."""
    text, spots = body["prompt"], []
    for word in order:
        spots.append((text.index(word), word))
    made, end = [], 0
    for (at, old), new in zip(sorted(spots), order, strict=True):
        made += [text[end:at], new]
        end = at + len(old)
    body["prompt"] = "".join([*made, text[end:]])


def _put_lora(body: Body, value: float) -> None:
    if not body.get("loras"):
        raise InvalidRequest("loras", "are missing.", "Choose the LoRA whose scale is to change.")
    body["loras"] = [[name, value] for name, _ in body["loras"]]


KINDS: dict[str, Kind] = {
    "Seed": _number("seed", int, "seed", "1-4"),
    "Steps": _number("steps", int, "steps", "10, 20, 30"),
    "CFG scale": _number("guidance_scale", float, "guidance", "1-9 [5]"),
    "Prompt S/R": Kind(_searches, _put_search, lambda v: v[1], "red, green, blue"),
    "Prompt order": Kind(_orders, _put_order, ", ".join, "red cube, blue sphere"),
    "Negative prompt": _word("negative_prompt", lambda v: None, 'blurry, "dark, noisy"'),
    "Sampler": _word("sampler", lambda v: names.sampler(v) and None, "Euler a, DPM++ 2M"),
    "Schedule type": _word("schedule", names.schedule, "Automatic, Karras"),
    "Model": _word("model", lambda v: None, "tiny, tiny-v"),
    "Denoising": _number("strength", float, "strength", "0.2-1 [5]"),
    "Clip skip": _number("clip_skip", int, "clip skip", "0-2"),
    "CFG rescale": _number("guidance_rescale", float, "rescale", "0, 0.7"),
    "Eta": _number("eta", float, "eta", "0, 0.5, 1"),
    "Noise level": _number("noise_level", int, "noise", "0-500 [3]"),
    "LoRA scale": Kind(
        lambda text, _, field: numbers(text, float, field),
        _put_lora,
        lambda v: f"LoRA {v:g}",
        "0-1 [3]",
    ),
    "Size": Kind(_sizes, _put_size, lambda v: f"{v[0]}×{v[1]}", "128x128, 128x192"),
}
NOTHING = "Nothing"


@dataclass(frozen=True)
class Axis:
    """A kind and its values, read."""

    kind: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        """For the legend."""
        return [KINDS[self.kind].word(value) for value in self.values]


@dataclass(frozen=True)
class Cell:
    """One picture of a grid: where it stands, and what is asked for."""

    x: int
    y: int
    z: int
    body: Body


def axis(kind: str, text: str, body: Mapping[str, Any], name: str = "X") -> Axis | None:
    """Read one axis; None where it changes nothing.

    Raises:
        InvalidRequest: an unknown kind, no values, or values that are none.
    """
    if kind in ("", NOTHING):
        return None
    field = f"{name} values"
    if kind not in KINDS:
        raise InvalidRequest(f"{name} axis", f"{kind!r} is unknown.", f"One of {', '.join(KINDS)}.")
    found = KINDS[kind].read(text, body, field)
    if not found:
        raise InvalidRequest(field, "are missing.", f"For {kind}: {KINDS[kind].hint}")
    return Axis(kind, tuple(found))


def cells(body: Mapping[str, Any], given: Sequence[Axis | None]) -> list[Cell]:
    """Every picture of a grid of up to three axes, in reading order.

    Raises:
        InvalidRequest: too many, or two axes of one kind.
    """
    kinds = [each.kind for each in given if each is not None]
    if len(set(kinds)) < len(kinds):
        raise InvalidRequest("Y axis", f"two axes change {kinds[-1]}.", "Choose another.")
    spans = [range(1 if each is None else len(each.values)) for each in [*given, None, None][:3]]
    total = len(spans[0]) * len(spans[1]) * len(spans[2])
    if total > MOST:
        raise InvalidRequest("X values", f"{total} pictures in one grid.", f"At most {MOST}.")
    found = []
    for z, y, x in itertools.product(spans[2], spans[1], spans[0]):
        made = dict(body)
        for each, place in zip(given, (x, y, z), strict=False):
            if each is not None:
                KINDS[each.kind].put(made, each.values[place])
        found.append(Cell(x, y, z, made))
    return found
