"""OpenAI's Images API: generations, edits, variations, models.

The unmodified ``openai`` package speaks it. Its extension fields (``negative_prompt``,
``num_inference_steps``, ``guidance_scale``, ``seed`` and the rest of our request) come beside the
published ones, as clients send them in ``extra_body``.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from safelight.errors import InvalidRequest
from safelight.fields import shown as display
from safelight.request import ALIASES, GenerateRequest, ImageResult, Outcome
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
from safelight.serve.house import House
from safelight.serve.jobs import Job

router = APIRouter(prefix="/v1", tags=["openai"])

_SAID = {"quality", "style", "background", "moderation", "user", "input_fidelity"}
"""Taken and without effect: what they choose is a property of other models."""
_OURS = set(GenerateRequest.model_fields) | set(ALIASES)
_FIELDS = (
    _SAID
    | _OURS
    | {
        "prompt",
        "model",
        "n",
        "size",
        "response_format",
        "output_format",
        "output_compression",
        "partial_images",
        "stream",
    }
)
_FORM_NUMBERS = {"n", "partial_images", "output_compression", "seed", "steps", "strength"}
_FORM_NUMBERS |= {"num_inference_steps", "guidance_scale", "noise_level", "width", "height"}


_PUBLISHED: dict[str, Any] = {
    "model": {"type": "string"},
    "n": schemas.number("integer", 1, 10, default=1),
    "size": {
        "type": "string",
        "description": "`WIDTHxHEIGHT`, or `auto`: the model's native size.",
    },
    "response_format": schemas.choice("b64_json", "url", default="b64_json"),
    "output_format": schemas.choice("png", "jpeg", "webp", default="png"),
    "output_compression": schemas.number("integer", 0, 100),
    "partial_images": schemas.number("integer", 0, 3),
    "stream": {"type": "boolean"},
    **{
        name: {"type": "string", "description": "Read, and without effect."}
        for name in sorted(_SAID)
    },
}
_EXTENSION = {
    **schemas.request_fields(),
    "num_inference_steps": {"type": "integer", "description": "`steps`."},
}
_JSON = schemas.object_of({**_EXTENSION, **_PUBLISHED}, required=("prompt",), more=True)
_PICTURED = {"image": schemas.UPLOAD, "mask": schemas.UPLOAD}
_EDIT = schemas.object_of(
    {**_EXTENSION, **_PUBLISHED, **_PICTURED}, required=("image", "prompt"), more=True
)
_VARY = schemas.object_of({**_EXTENSION, **_PUBLISHED, **_PICTURED}, required=("image",), more=True)
EXAMPLES: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "a red cube on top of a blue sphere"},
    "published fields": {
        "prompt": "a red cube on top of a blue sphere",
        "n": 2,
        "size": "128x128",
        "response_format": "b64_json",
        "output_format": "jpeg",
        "output_compression": 90,
        "quality": "auto",
    },
    "with extension fields": {
        "prompt": "a red cube on top of a blue sphere",
        "negative_prompt": "a cone",
        "num_inference_steps": 8,
        "guidance_scale": 3.0,
        "seed": 7,
        "response_format": "url",
    },
}
_REFUSALS = schemas.errors(schemas.OPENAI_ERROR)


@router.get("/models", summary="List models")
async def models(request: Request) -> dict[str, Any]:
    """The models that are served."""
    data = [_model(name) for name in house_of(request).settings.models]
    return {"object": "list", "data": data}


@router.get(
    "/models/{name:path}",
    summary="One model",
    responses=schemas.errors(schemas.OPENAI_ERROR, 401, 404),
)
async def model(request: Request, name: str) -> dict[str, Any]:
    """One of them."""
    return _model(house_of(request).name(name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "safelight"}


@router.post(
    "/images/generations",
    summary="Generate",
    openapi_extra=schemas.body(_JSON, EXAMPLES),
    responses=_REFUSALS,
)
async def generations(request: Request) -> Response:
    """Pictures from a prompt."""
    fields = await json_body(request)
    if "prompt" not in fields:
        raise InvalidRequest("prompt", "is missing.", "Say what the picture shows.")
    return await _made(request, fields, "image_generation")


@router.post(
    "/images/edits", summary="Edit", openapi_extra=schemas.body({}, form=_EDIT), responses=_REFUSALS
)
async def edits(request: Request) -> Response:
    """A picture made anew by a prompt, where the mask is transparent; all of it without one."""
    fields = await _form(request, "edit")
    return await _made(request, fields, "image_edit")


@router.post(
    "/images/variations",
    summary="Vary",
    openapi_extra=schemas.body({}, form=_VARY),
    responses=_REFUSALS,
)
async def variations(request: Request) -> Response:
    """Others like a picture, by a model that looks at pictures."""
    fields = await _form(request, "vary")
    worker = await asyncio.to_thread(house_of(request).worker, fields.get("model"))
    spec = worker.generator.model.spec
    if spec.family not in ("image-variations", "unclip"):
        fix = "Name a model that looks at pictures: image variations, or unCLIP."
        raise InvalidRequest("model", f"{spec.name} makes no variations.", fix)
    return await _made(request, fields, "image_generation")


async def _form(request: Request, purpose: str) -> dict[str, Any]:
    """A multipart body: files as bytes, numbers as numbers, ``image[]`` as ``image``.

    Raises:
        InvalidRequest: it holds no picture.
    """
    fields: dict[str, Any] = {}
    several: dict[str, list[bytes]] = {}
    async with request.form(max_files=16, max_fields=100) as form:
        for key, value in form.multi_items():
            name = key.removesuffix("[]")
            if isinstance(value, str):
                fields[name] = _typed(name, value)
            else:
                several.setdefault(name, []).append(await value.read())
    for name, files in several.items():
        fields[name] = files[0] if len(files) == 1 else files
    if "image" not in fields:
        raise InvalidRequest("image", "is missing.", f"Send the picture to {purpose}.")
    return fields


def _typed(name: str, value: str) -> Any:
    if value.lower() in ("true", "false") and name in ("stream", "deterministic"):
        return value.lower() == "true"
    if name in _FORM_NUMBERS:
        try:
            return int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            raise InvalidRequest(name, f"{value!r} is not a number.") from None
    return value


def read(fields: Mapping[str, Any]) -> GenerateRequest:
    """Our request from theirs.

    Raises:
        InvalidRequest: a field that is not understood, or wrong.
    """
    unknown(fields, _FIELDS)
    given = {name: value for name, value in fields.items() if name in _OURS and value is not None}
    number = given.pop("n", None)
    given["count"] = given.get("count", 1) if number is None else number
    size = fields.get("size")
    if size not in (None, "", "auto"):
        width, _, height = str(size).lower().partition("x")
        if not all(
            side.isdecimal() and side.isascii() and len(side) < 6 for side in (width, height)
        ):
            problem = f"{display(size)} is no size."
            raise InvalidRequest("size", problem, "Write 512x512, or auto.")
        given["width"], given["height"] = int(width), int(height)
    for name in ("image", "mask"):
        value = given.get(name)
        if isinstance(value, list):
            given[name] = [wire.picture(each, name) for each in value]
        elif value is not None:
            given[name] = wire.picture(value, name)
    try:
        return GenerateRequest.from_kwargs(**given)
    except InvalidRequest as error:
        if error.field == "count" and number is not None:
            raise InvalidRequest("n", error.problem, error.fix) from None
        raise


async def _made(request: Request, fields: dict[str, Any], kind: str) -> Response:
    partial = _whole(fields, "partial_images", 0, 3)
    format = wire.format_of(fields.get("output_format"))
    quality = fields.get("output_compression")
    if quality is not None:
        quality = max(1, _whole(fields, "output_compression", 0, 100) or 1)
    if fields.get("response_format") not in (None, "b64_json", "url"):
        raise InvalidRequest("response_format", f"{display(fields['response_format'])} is unknown.")
    made = read(fields)
    stream = fields.get("stream") or False
    if not isinstance(stream, bool):
        raise InvalidRequest("stream", f"must be true or false, not {display(stream)}.")
    if stream and partial:
        made = made.replace(preview_every=max(1, (made.steps or 25) // (partial + 1)))
    job = await submitted(request, [made], fields.get("model"), format=format)
    if stream:
        told = _streamed(house_of(request), job, kind, format, quality, partial)
        return StreamingResponse(told, media_type="text/event-stream")
    results = shown(await waited(request, job, keep=fields.get("response_format") == "url"))
    return JSONResponse(_body(request, job, results, format, quality, fields))


def _body(
    request: Request,
    job: Job,
    results: list[ImageResult],
    format: str,
    quality: int | None,
    fields: Mapping[str, Any],
) -> dict[str, Any]:
    removed = [result for result in results if result.outcome is Outcome.rejected]
    if len(removed) == len(results):
        raise Moderated(removed[0].message)
    data = []
    for result in results:
        entry: dict[str, Any] = {
            "seed": result.seed,
            "nsfw_content_detected": result.nsfw,
            "finish_reason": str(result.outcome),
        }
        if result.image is None:
            entry["b64_json"] = None
        elif fields.get("response_format") == "url":
            base = str(request.base_url).rstrip("/")
            entry["url"] = f"{base}/v1/jobs/{job.id}/images/{result.index}"
        else:
            entry["b64_json"] = wire.encoded(result, format, quality)
        data.append(entry)
    made = job.requests[0]
    return {
        "created": int(time.time()),
        "data": data,
        "output_format": format.lower(),
        "size": f"{made.width}x{made.height}",
        "usage": _usage(job),
    }


class Moderated(InvalidRequest):
    """Every picture was removed."""

    def __init__(self, reason: str) -> None:
        super().__init__("prompt", f"was refused: {reason}")


def _usage(job: Job) -> dict[str, Any]:
    """Tokens have no meaning here; clients read the fields all the same."""
    return {
        "input_tokens": 0,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "output_tokens": 0,
        "total_tokens": 0,
    }


async def _streamed(
    house: House, job: Job, kind: str, format: str, quality: int | None, partial: int
) -> AsyncIterator[str]:
    """The job's events; it is cancelled when nobody listens any more."""
    try:
        async for told in _events(job, kind, format, quality, partial):
            yield told
    finally:
        job.cancel()
        house.forget(job.id)


async def _events(
    job: Job, kind: str, format: str, quality: int | None, partial: int
) -> AsyncIterator[str]:
    """Partial pictures, then each whole one, then ``[DONE]``."""
    import base64
    import io

    sent, seen, done = 0, None, set[int]()
    async for changed in wire.changes(job, every=0.02):
        preview = changed.preview
        if preview is not None and preview is not seen and sent < partial:
            seen, out = preview, io.BytesIO()
            preview.image.save(out, format)
            text = base64.b64encode(out.getvalue()).decode()
            yield _event(
                job,
                format,
                {"type": f"{kind}.partial_image", "b64_json": text, "partial_image_index": sent},
            )
            sent += 1
        for result in changed.pictures:
            if result.index not in done and result.image is not None:
                done.add(result.index)
                text = wire.encoded(result, format, quality)
                fields = {"type": f"{kind}.completed", "b64_json": text, "seed": result.seed}
                yield _event(job, format, {**fields, "usage": _usage(job)})
    if job.error is not None or not done:
        reason = str(job.error) if job.error is not None else "no picture was made"
        yield f"data: {json.dumps(error(500, 'failed', reason, ''))}\n\n"
    yield "data: [DONE]\n\n"


def _event(job: Job, format: str, fields: Mapping[str, Any]) -> str:
    made = job.requests[0]
    about = {
        "created_at": int(time.time()),
        "size": f"{made.width}x{made.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": format.lower(),
    }
    return f"event: {fields['type']}\ndata: {json.dumps({**fields, **about})}\n\n"


def _whole(fields: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = fields.get(name)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(name, f"must be a whole number from {low} to {high}, not {value!r}.")
    return value


def error(status: int, code: str, message: str, field: str) -> dict[str, Any]:
    """The error body that the client's exceptions are made of."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field or None, "code": code}}
