"""DeepInfra's native inference call, with the parameter table of the SD v1-4 card's host."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from safelight.errors import InvalidRequest
from safelight.fields import shown as shown_value
from safelight.request import GenerateRequest
from safelight.serve import wire
from safelight.serve.dialects import (
    house_of,
    json_body,
    schemas,
    shown,
    submitted,
    unknown,
    waited,
)

router = APIRouter(prefix="/v1/inference", tags=["deepinfra"])

_TEXT = {"prompt", "negative_prompt", "lora", "lora_name", "webhook"}
_NUMBERS = {
    "num_images": (1, 4, int),
    "num_inference_steps": (1, 512, int),
    "guidance_scale": (1, 20, float),
    "strength": (0, 1, float),
    "width": (128, 1024, int),
    "height": (128, 1024, int),
    "seed": (0, 2**63 - 1, int),
    "lora_scale": (-10, 10, float),
}
_FIELDS = _TEXT | set(_NUMBERS) | {"image", "use_compel"}
_TABLE: dict[str, Any] = {
    **{name: {"type": "string"} for name in sorted(_TEXT - {"webhook"})},
    **{
        name: schemas.number("integer" if kind is int else "number", low, high)
        for name, (low, high, kind) in _NUMBERS.items()
    },
    "use_compel": {"type": "boolean", "default": False},
}
_JSON = schemas.object_of({**_TABLE, "image": schemas.PICTURE}, required=("prompt",))
_FORM = schemas.object_of({**_TABLE, "image": schemas.UPLOAD}, required=("prompt",))
_ERROR = schemas.object_of(
    {
        "detail": schemas.object_of(
            {
                "error": {"type": "string"},
                "msg": {"type": "string"},
                "loc": {"type": "array", "items": {"type": "string"}},
            },
            required=("error", "msg"),
        )
    },
    required=("detail",),
)
EXAMPLES: dict[str, dict[str, Any]] = {
    "text": {"prompt": "a red cube on top of a blue sphere", "num_inference_steps": 8, "seed": 7},
    "two, with weights": {
        "prompt": "a red++ cube",
        "negative_prompt": "a sphere",
        "num_images": 2,
        "num_inference_steps": 8,
        "guidance_scale": 3,
        "use_compel": True,
        "width": 128,
        "height": 128,
    },
    "a picture to start from": {
        "prompt": "a red cube",
        "image": schemas.GREY,
        "strength": 0.8,
        "num_inference_steps": 8,
        "width": 128,
        "height": 128,
    },
}


@router.post(
    "/{model:path}",
    summary="Infer",
    openapi_extra=schemas.body(_JSON, EXAMPLES, form=_FORM),
    responses=schemas.errors(_ERROR),
)
async def infer(request: Request, model: str) -> dict[str, Any]:
    """JSON or multipart; pictures come back as data URLs."""
    house, began = house_of(request), time.monotonic()
    if request.headers.get("content-type", "").startswith("multipart/"):
        async with request.form(max_files=4, max_fields=50) as form:
            fields = {
                name: value if isinstance(value, str) else await value.read()
                for name, value in form.multi_items()
            }
    else:
        fields = await json_body(request)
    name = house.name(model)
    job = await submitted(request, [read(fields)], name)
    results = shown(await waited(request, job))
    images = [
        None if result.image is None else f"data:image/png;base64,{wire.encoded(result)}"
        for result in results
    ]
    return {
        "images": images,
        "nsfw_content_detected": [bool(result.nsfw) for result in results],
        "seed": results[0].seed,
        "request_id": request.state.id,
        "inference_status": {
            "status": "succeeded",
            "runtime_ms": round(1000 * (time.monotonic() - began)),
            "cost": 0.0,
            "tokens_generated": 0,
            "tokens_input": 0,
        },
    }


def read(fields: dict[str, Any]) -> GenerateRequest:
    """Our request from the parameter table's fields.

    Raises:
        InvalidRequest: a field that is not in the table, or outside its bounds.
    """
    unknown(fields, _FIELDS)
    given = {k: _number(k, v) if k in _NUMBERS else v for k, v in fields.items()}
    given = {k: v for k, v in given.items() if v is not None and v != ""}
    if "prompt" not in given:
        raise InvalidRequest("prompt", "is missing.", "Say what the picture shows.")
    for name in ("lora", "lora_name"):
        if not isinstance(given.get(name, ""), str):
            raise InvalidRequest(name, f"must be a name, not {shown_value(given[name])}.")
    if given.pop("webhook", None):
        raise InvalidRequest("webhook", "is not supported here.", "Wait for the answer.")
    made: dict[str, Any] = {
        "prompt": given["prompt"],
        "negative_prompt": given.get("negative_prompt", ""),
        "steps": given.get("num_inference_steps", 25),
        "guidance_scale": given.get("guidance_scale", 7.5),
        "count": given.get("num_images", 1),
    }
    made |= {name: given[name] for name in ("width", "height", "seed") if name in given}
    if _flag("use_compel", given.get("use_compel", False)):
        made["weighting"] = "compel"
    lora = given.get("lora") or given.get("lora_name")
    if lora:
        made["loras"] = [(lora, given.get("lora_scale", 1.0))]
    if given.get("image"):
        made["image"] = wire.picture(given["image"], "image")
        made["strength"] = given.get("strength", 0.8)
    return GenerateRequest.from_kwargs(**made)


def _number(name: str, value: Any) -> Any:
    """A number within the table's bounds; forms send it as text."""
    low, high, kind = _NUMBERS[name]
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool | bytes):
            raise TypeError
        number = kind(value)
        whole = number == float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest(name, f"must be a number, not {shown_value(value)}.") from None
    if not whole or not low <= number <= high:
        raise InvalidRequest(name, f"must be from {low} to {high}, not {shown_value(value)}.")
    return number


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "1", "false", "0"):
        return str(value).lower() in ("true", "1")
    raise InvalidRequest(name, f"must be true or false, not {value!r}.")


def error(message: str, field: str) -> dict[str, Any]:
    """As the host answers."""
    where = {"loc": ["body", field], "msg": message} if field else {"msg": message}
    return {"detail": {"error": message, **where}}
