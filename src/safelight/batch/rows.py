"""What a row asks for: its columns, the command's defaults behind them, and a seed.

The names of columns are those of :class:`~safelight.request.GenerateRequest` in any spelling that
it reads, with ``model`` and ``size``. Pictures are paths beside the file, base64 or data URLs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, get_args

from safelight import inputs, names
from safelight.batch.table import Entry, Table, plain
from safelight.errors import InvalidRequest
from safelight.inputs import PictureInput
from safelight.request import ALIASES, GenerateRequest
from safelight.store.registry import scaled, worded

OWN = ("model", "size")
"""Columns beside the request's."""
_MODEL = {"sd_model": "model", "checkpoint": "model", "model_name": "model"}
_HALVES = {
    "use_compel": "weighting",
    "lora_scale": "loras",
    "clip_stop_at_last_layers": "clip_skip",
}
"""Spellings that :meth:`GenerateRequest.from_kwargs` reads beside its aliases."""
_LISTS = ("guidance_interval", "image_weights", "image_embedding")
_SEEDS = 2**32
"""Seeds that are made up lie below it, where diffusers draws the same noise."""
_EXTRA = 500  # characters of a passed-over column that the manifest repeats


@dataclass(frozen=True)
class Wish:
    """A row as far as it can be understood without its model.

    Args:
        request: None where there is an error.
        prompt: as far as there is one.
        error: what is wrong, by ``field``, ``problem`` and ``fix``.
        extra: the columns that were passed over.
    """

    row: int
    line: str
    model: str
    request: GenerateRequest | None
    error: dict[str, str] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None


@dataclass(frozen=True)
class Defaults:
    """What stands behind the columns.

    Args:
        fields: of the request, by their plain names.
        seed: of the run: the seed of a row without one follows from it and the row's number.
        same_seed: such a row's seed is the run's own.
        ignore: pass over columns that are unknown.
    """

    fields: Mapping[str, Any]
    model: str
    seed: int
    same_seed: bool = False
    ignore: bool = False

    def check(self) -> None:
        """Refuse wrong values at once, rather than once a row.

        Raises:
            InvalidRequest: naming the field.
        """
        given = dict(self.fields)
        needs_picture = {"strength", "mask", "mask_crop"} & set(given)
        if needs_picture:
            given.setdefault("image", f"sha256:{'0' * 64}")
        if "mask_crop" in given:
            given.setdefault("mask", f"sha256:{'0' * 64}")
        GenerateRequest.from_kwargs(**{"prompt": "a picture", **given})


def seed_of(run: int, row: int) -> int:
    """The seed of a row that gives none: the same whenever the run is taken up again.

    Hashed, so that the consecutive seeds of one row's pictures are not the next row's.
    """
    data = hashlib.sha256(f"safelight.batch:{run}:{row}".encode()).digest()
    return int.from_bytes(data[:8], "big") % _SEEDS


def check_columns(table: Table, *, ignore: bool = False) -> None:
    """Refuse a column that nothing is known by.

    Raises:
        InvalidRequest: naming it as it is written, and the nearest known one.
    """
    for name, written in table.columns.items():
        if not known(name) and not ignore:
            raise InvalidRequest(
                written,
                f"is no column that is known in {table.path.name}.",
                f"{_nearest(name)} --ignore-columns passes over it.",
            )


def known(name: str) -> bool:
    """Whether a column of this plain name is one of ours."""
    return name in _known()


@cache
def _known() -> frozenset[str]:
    return frozenset({*GenerateRequest.model_fields, *ALIASES, *_HALVES, *_MODEL, *OWN})


def _nearest(name: str) -> str:
    found = get_close_matches(name, sorted(_known()), n=1, cutoff=0.6)
    if found:
        return f"Did you mean {found[0]}?"
    return f"Known: {', '.join(sorted({*GenerateRequest.model_fields, *OWN}))}."


def wish(entry: Entry, defaults: Defaults, folder: Path) -> Wish:
    """Understand a row. Never raises for what is in it.

    Args:
        folder: where paths of pictures begin.
    """
    model, extra = defaults.model, {}
    try:
        if entry.problem:
            raise InvalidRequest("row", entry.problem)
        fields, extra = _split(entry, defaults.ignore)
        model = fields.pop("model", model)
        if not isinstance(model, str) or not model.strip():
            raise InvalidRequest("model", "is not a name.")
        _resize(fields)
        given = {name: _value(name, fields[name], entry.typed, folder) for name in fields}
        covered = {_plain_field(name, given[name]) for name in given}
        behind = {n: v for n, v in defaults.fields.items() if n not in covered}
        request = GenerateRequest.from_kwargs(**behind, **given)
        if request.seed is None:
            seed = defaults.seed if defaults.same_seed else seed_of(defaults.seed, entry.row)
            request = request.replace(seed=seed)
        return Wish(entry.row, entry.line, model.strip(), request, None, extra, request.prompt)
    except InvalidRequest as error:
        given = {plain(name): value for name, value in entry.fields.items()}.get("prompt")
        prompt = given if isinstance(given, str) else None
        return Wish(entry.row, entry.line, str(model), None, told(error), extra, prompt)


def told(error: Exception) -> dict[str, str]:
    """An error as the manifest has it."""
    if isinstance(error, InvalidRequest):
        return {"field": error.field, "problem": error.problem, "fix": error.fix}
    return {"field": "", "problem": f"{type(error).__name__}: {error}", "fix": ""}


def assignments(texts: Iterable[str], folder: Path = Path()) -> dict[str, Any]:
    """Defaults written ``NAME=VALUE``, by the request's own names.

    Raises:
        InvalidRequest: a name that is unknown, or no assignment.
    """
    found: dict[str, Any] = {}
    for text in texts:
        written, sign, value = text.partition("=")
        name = plain(written)
        if not sign:
            raise InvalidRequest("set", f"{text!r} has no =.", "Write NAME=VALUE.")
        if not known(name) or name in (*OWN, *_MODEL, "lora_scale", "seed"):
            raise InvalidRequest("set", f"{written.strip()!r} is no field.", _nearest(name))
        given = {name: _value(name, value, False, folder)}
        found[_plain_field(name, given[name])] = getattr(_one(given), _plain_field(name, value))
    return found


def _one(given: Mapping[str, Any]) -> GenerateRequest:
    """A request that holds a default and what it needs."""
    blank = f"sha256:{'0' * 64}"
    needs = {"strength": ("image",), "mask": ("image",), "mask_crop": ("image", "mask")}
    field_ = _plain_field(*next(iter(given.items())))
    others = dict.fromkeys(needs.get(field_, ()), blank)
    return GenerateRequest.from_kwargs(**{"prompt": "a picture", **others, **given})


def model_of(entry: Entry, default: str) -> str:
    """The model that a row names."""
    for name, value in entry.fields.items():
        if _MODEL.get(plain(name), plain(name)) == "model" and isinstance(value, str):
            return value.strip() or default
    return default


def _split(entry: Entry, ignore: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns that are known, by plain name, and the others."""
    fields: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for written, value in entry.fields.items():
        name = plain(written)
        name = _MODEL.get(name, name)
        if not known(name):
            if not ignore:
                raise InvalidRequest(written, "is no column that is known.", _nearest(name))
            if isinstance(value, str | int | float | bool) and len(str(value)) <= _EXTRA:
                extra[written] = value
        elif name in fields:
            raise InvalidRequest(written, "is given twice.", "Give it once.")
        else:
            fields[name] = value
    return fields, extra


def _resize(fields: dict[str, Any]) -> None:
    """``size`` as width and height."""
    size = fields.pop("size", None)
    if size is None:
        return
    match = re.fullmatch(r"\s*(\d{1,9})\s*(?:[xX*×,]\s*(\d{1,9})\s*)?", str(size))
    if match is None:
        raise InvalidRequest("size", f"{size!r} is not a size.", "Write 512x512, or 512.")
    if {"width", "height", "w", "h"} & set(fields):
        raise InvalidRequest("size", "comes with a width or a height.", "Give one of them.")
    fields["width"], fields["height"] = int(match[1]), int(match[2] or match[1])


def _plain_field(name: str, value: Any) -> str:
    """Which field of the request a column fills."""
    if name == "scheduler" and isinstance(value, str):  # diffusers' word for the sampler
        try:
            names.schedule(value)
        except InvalidRequest:
            return "sampler"
    return _HALVES.get(name, ALIASES.get(name, name))


# -- values -------------------------------------------------------------------------------------


def _value(name: str, value: Any, typed: bool, folder: Path) -> Any:
    field_ = _plain_field(name, None)
    if field_ in ("image", "mask", "depth", "images"):
        return _pictures(name, value, typed, folder)
    if typed or not isinstance(value, str):
        return value
    if field_ in ("loras", "embeddings") and name != "lora_scale":
        return _adapters(name, field_, value)
    kinds = {float} if name in ("lora_scale", *_LISTS) else _kinds(field_)
    kinds = {bool} if name == "use_compel" else kinds
    if field_ in _LISTS:
        return [_number(part, {float}) for part in re.split(r"[\s,;]+", value.strip("[]() "))]
    if dict in kinds:
        return _json(name, value)
    if bool in kinds:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
            value.strip().lower(), value
        )
    return _number(value, kinds) if kinds & {int, float} else value


@cache
def _kinds(name: str) -> set[Any]:
    """The Python types that a field's annotation is made of."""
    found: set[Any] = set()

    def walk(annotation: Any) -> None:
        parts = get_args(annotation)
        if getattr(annotation, "__origin__", annotation) in (dict, tuple):
            found.add(annotation.__origin__)
        elif parts:
            for part in parts:
                walk(part)
        elif isinstance(annotation, type):
            found.add(annotation)

    walk(GenerateRequest.model_fields[name].annotation)
    return found


def _number(text: str, kinds: set[Any]) -> Any:
    """A number, or the text where it is none: the field then says so."""
    try:
        return int(text) if int in kinds else float(text)
    except ValueError:
        try:
            return float(text)  # 25.0, as tables of numbers write whole ones
        except ValueError:
            return text


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(
            name, f"{text[:60]!r} is not JSON.", 'Write {"name": value}.'
        ) from None


def _adapters(name: str, kind: str, text: str) -> Any:
    if text.lstrip().startswith(("[", "{")):
        return _json(name, text)
    parts = [part.strip() for part in text.split(";") if part.strip()]
    if name in ("lora", "lora_name") and len(parts) == 1 and ":" not in text:
        return parts[0]  # a name, whose scale may be in lora_scale
    return scaled(parts) if kind == "loras" else worded(parts)


def _pictures(name: str, value: Any, typed: bool, folder: Path) -> Any:
    if not typed and isinstance(value, str) and name == "images":
        text = value.strip()
        value = _json(name, text) if text.startswith("[") else [p.strip() for p in text.split(";")]
    if isinstance(value, list | tuple):
        return [_picture(f"{name}[{k}]", each, folder) for k, each in enumerate(value)]
    return _picture(name, value, folder)


def _picture(name: str, value: Any, folder: Path) -> PictureInput:
    """A picture's bytes: from a path beside the file, base64, a data URL, or a Hugging Face column
    (``{"bytes": …, "path": …}``)."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, bytes):
            return inputs.picture_input(value)
        if not isinstance(value, str) or not value.strip():
            raise ValueError("must be a path, base64 or a data URL.")
        text = value.strip()
        if re.match(r"https?://", text, re.IGNORECASE):
            raise ValueError("is an address; nothing is fetched. Name a file.")
        if text[:5].lower() == "data:":
            return inputs.picture_input(inputs.decoded(text))
        if _may_be_path(text):
            path = folder / Path(text).expanduser()
            if len(text) < 64 or path.exists():
                return inputs.picture_input(path)
        return inputs.picture_input(inputs.decoded(text))
    except ValueError as error:
        raise InvalidRequest(name, str(error)) from None
    except OSError as error:
        raise InvalidRequest(name, f"cannot be read: {error.strerror}.") from None


def _may_be_path(text: str) -> bool:
    return len(text) < 4096 and "\0" not in text and "\n" not in text


def weight(request: GenerateRequest) -> int:
    """Bytes of the pictures that come with a request."""
    values = (each.value for each in request.pictures.values())
    return sum(len(value) for value in values if isinstance(value, bytes))
