"""What OpenAPI says of the dialects: JSON schemas of bodies, examples, errors.

Schemas are made from the records and tables that requests are read by, where there are such. They
describe; the readers decide.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from safelight.request import GenerateRequest

PICTURE: dict[str, Any] = {"type": "string", "description": "A picture: base64, or a data URL."}
UPLOAD: dict[str, Any] = {"type": "string", "format": "binary", "description": "A picture's file."}
GREY = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR42mNsYIAAJgaKGAAmCACQtTEKkQAAAABJ"
    "RU5ErkJggg=="
)
"""A small picture, for examples."""
REASONS = {
    400: "The request is wrong; the message names the field.",
    401: "The key is missing or wrong (where the server asks for one).",
    404: "No such model.",
    413: "The body is too large.",
    429: "The queue is full: `Retry-After` says when to come back.",
    500: "No picture could be made; asking again will not change that.",
    503: "The server is shutting down.",
    504: "The deadline passed while the request waited.",
}


OPENAI_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field."},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
"""Errors of the native interface and of OpenAI's."""


class _Pictures(GenerateJsonSchema):
    """Knows what a picture is on the wire."""

    def is_instance_schema(self, schema: Any) -> dict[str, Any]:
        return dict(PICTURE)


_KEYWORDS = {"ge": "minimum", "le": "maximum", "multiple_of": "multipleOf"}


@functools.cache
def request_fields() -> dict[str, Any]:
    """Every field of :class:`GenerateRequest` as JSON schema, with what its record says of it."""
    schema = GenerateRequest.model_json_schema(schema_generator=_Pictures)
    said = _docstrings(GenerateRequest)
    found: dict[str, Any] = {}
    for name, field in schema["properties"].items():
        plain = _plain(field, schema.get("$defs", {}))
        found[name] = {**plain, "description": said[name]} if name in said else plain
    found["seed"]["anyOf"][0]["minimum"] = -1  # draws one
    return found


def _plain(value: Any, definitions: Mapping[str, Any]) -> Any:
    """Without references into the record's own definitions, in JSON schema's own words."""
    if isinstance(value, list):
        return [_plain(each, definitions) for each in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _plain(definitions[value["$ref"].rsplit("/", 1)[-1]], definitions)
    made = {_KEYWORDS.get(k, k): _plain(v, definitions) for k, v in value.items() if k != "title"}
    if made.get("type") == "array" and "maxLength" in made:
        made["maxItems"] = made.pop("maxLength")
    return made


def _docstrings(record: type) -> dict[str, str]:
    """The texts below a record's fields."""
    (body,) = ast.parse(inspect.getsource(record)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            said = text.value.value if isinstance(text.value, ast.Constant) else None
            if isinstance(field.target, ast.Name) and isinstance(said, str):
                found[field.target.id] = " ".join(said.replace("``", "`").split())
    return found


def object_of(
    properties: Mapping[str, Any], *, required: Sequence[str] = (), more: bool = False
) -> dict[str, Any]:
    """An object's schema.

    Args:
        more: it may have other properties.
    """
    made: dict[str, Any] = {"type": "object", "properties": dict(properties)}
    if required:
        made["required"] = list(required)
    return made if more else {**made, "additionalProperties": False}


def number(kind: str, low: float, high: float, **more: Any) -> dict[str, Any]:
    """A number's schema, bounds included."""
    return {"type": kind, "minimum": low, "maximum": high, **more}


def choice(*values: Any, **more: Any) -> dict[str, Any]:
    """One of these."""
    return {"enum": list(values), **more}


def body(
    schema: Mapping[str, Any],
    examples: Mapping[str, Any] | None = None,
    *,
    form: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``openapi_extra`` of a route that reads its body itself.

    Args:
        schema: of the JSON body; empty where only a form is taken.
        examples: by name; each of them works as it is.
        form: schema of the multipart body.
    """
    content: dict[str, Any] = {}
    if schema:
        shown = {name: {"value": value} for name, value in (examples or {}).items()}
        content["application/json"] = {"schema": dict(schema), "examples": shown}
    if form:
        content["multipart/form-data"] = {"schema": dict(form)}
    return {"requestBody": {"required": True, "content": content}}


def errors(schema: Mapping[str, Any], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route: how it refuses, in its dialect's form."""
    content = {"application/json": {"schema": dict(schema)}}
    found: dict[int | str, dict[str, Any]] = {
        status: {"description": REASONS[status], "content": content}
        for status in statuses or tuple(REASONS)
    }
    # Also tells FastAPI that there is no 422 of its own.
    return {**found, "4XX": {"description": "Any other refusal.", "content": content}}
