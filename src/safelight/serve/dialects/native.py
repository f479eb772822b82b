"""``/v1/jobs``: everything the engine can do, with progress, previews and cancelling."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from safelight import provenance
from safelight.errors import InvalidRequest, SafelightError
from safelight.fields import shown
from safelight.request import GenerateRequest, ImageResult
from safelight.serve import describe, wire
from safelight.serve.dialects import house_of, json_body, schemas
from safelight.serve.house import House
from safelight.serve.jobs import Job, Status, described
from safelight.serve.store import Kept

log = logging.getLogger(__name__)

router = APIRouter(tags=["native"])
PICTURES = ("image", "mask", "depth")
_OWN = ("model", "timeout", "priority", "output_format")

EXAMPLES: dict[str, dict[str, Any]] = {
    "text": {"prompt": "a red cube on top of a blue sphere", "seed": 7, "steps": 8},
    "several, with previews": {
        "prompt": "a small green cone to the left of a yellow cylinder",
        "negative_prompt": "a sphere",
        "seed": 7,
        "count": 2,
        "steps": 8,
        "sampler": "euler",
        "guidance_scale": 3.0,
        "preview_every": 4,
        "output_format": "jpeg",
    },
    "a picture to start from": {
        "prompt": "a red cube on top of a blue sphere",
        "image": schemas.GREY,
        "strength": 0.7,
        "seed": 7,
        "steps": 8,
        "width": 128,
        "height": 128,
    },
    "weights in the prompt, a deadline": {
        "prompt": "a (red:1.2) cube",
        "weighting": "a1111",
        "steps": 8,
        "timeout": 60,
        "priority": 1,
    },
}
_BODY = schemas.object_of(
    {
        **schemas.request_fields(),
        "model": {"type": "string", "description": "One of `/v1/capabilities`; the first if none."},
        "timeout": schemas.number(
            "number", 0, 1e9, description="Seconds after which nobody wants it, if it still waits."
        ),
        "priority": schemas.number("integer", 0, 1e6, description="Higher goes first."),
        "output_format": schemas.choice("png", "jpeg", "webp"),
    },
    more=True,  # and every other program's names for the fields
)
_JOB = schemas.object_of(
    {
        "id": {"type": "string"},
        "status": schemas.choice(*(str(status) for status in Status)),
        "url": {"type": "string"},
        "queue_position": {"type": ["integer", "null"]},
        "eta_seconds": {"type": ["number", "null"]},
        "progress": schemas.number("number", 0, 1),
        "error": {"type": ["string", "null"]},
        "results": {"type": "array", "items": {"type": "object"}},
    },
    required=("id", "status", "url"),
    more=True,
)
_MISSING = schemas.errors(schemas.OPENAI_ERROR, 401, 404)


@router.post(
    "/v1/jobs",
    summary="Queue a job",
    status_code=202,
    openapi_extra=schemas.body(_BODY, EXAMPLES),
    responses={
        202: {
            "description": "The job, queued. `Location` says where to ask for it.",
            "content": {"application/json": {"schema": _JOB}},
        },
        **schemas.errors(schemas.OPENAI_ERROR),
    },
)
async def create(request: Request) -> JSONResponse:
    """Queue a request: any field of ``GenerateRequest``, pictures as base64 or data URLs; and
    ``model``, ``timeout`` (seconds), ``priority``, ``output_format``. With an ``Idempotency-Key``,
    sending it again is the same job."""
    body = await json_body(request)
    key = request.headers.get("idempotency-key")
    found = await asyncio.to_thread(accept, house_of(request), body, key)
    where = {"location": found["url"], "retry-after": "1"}
    return JSONResponse(found, 202, headers=where)


def accept(
    house: House, body: Mapping[str, Any], key: str | None = None, kept: Kept | None = None
) -> dict[str, Any]:
    """Queue what a body asks for.

    Args:
        kept: the job that it is already, after a restart.

    Returns:
        the job, as :func:`told`.
    """
    store = house.store
    if key and store is not None and kept is None:
        known = store.by_key(key)
        if known is not None:
            return found(house, known.id)
    fields = {str(name): value for name, value in body.items()}
    own = {name: fields.pop(name) for name in _OWN if name in fields}
    timeout, priority = _number(own, "timeout"), _number(own, "priority")
    asked = read(fields)

    added: list[Callable[[], None]] = []

    def accepted(job: Job) -> None:
        if store is None:
            return
        if kept is not None:
            job.id, job.created = kept.id, kept.created
        else:
            seeded = {**body, "seed": job.requests[0].seed}
            store.add(job, seeded, key)
            added.append(functools.partial(store.remove, job.id))
        finish = store.finish
        job.keep = lambda ended, status: finish(ended, status, _final(house, ended, status))

    try:
        job = house.submit(
            [asked],
            own.get("model"),
            timeout=timeout,
            priority=int(priority or 0),
            format=wire.format_of(own.get("output_format")),
            on_accept=accepted,
            restored=kept is not None,
        )
    except SafelightError:
        for undo in added:  # refused after all: it must not run after a restart
            undo()
        known = store.by_key(key) if key and store is not None and not added else None
        if known is not None:  # the same request, sent twice at once
            return found(house, known.id)
        raise
    return told(house, job)


def restore(house: House) -> int:
    """Queue again what a crash has left; says how many."""
    left = [] if house.store is None else house.store.unfinished()
    for kept in left:
        try:
            accept(house, kept.body, kept=kept)
        except SafelightError as error:
            log.exception("job %s cannot be taken up again", kept.id)
            if house.store is not None:
                house.store.fail(kept, str(error))
    return len(left)


def _final(house: House, job: Job, status: Status) -> dict[str, Any]:
    """What will be told once it has ended."""
    found = {**told(house, job), "status": str(status), "eta_seconds": None}
    return {**found, "progress": 1.0} if status is Status.completed else found


def read(body: dict[str, Any]) -> GenerateRequest:
    """A request from JSON; strings that should be pictures are never paths."""
    fields = dict(body)
    for name in (*PICTURES, "init_image", "mask_image", "input_image", "depth_map"):
        if fields.get(name) is not None and not isinstance(fields[name], list):
            fields[name] = wire.picture(fields[name], name)
    for name in ("images", "image"):
        if isinstance(fields.get(name), list):
            fields[name] = [wire.picture(v, f"{name}[{k}]") for k, v in enumerate(fields[name])]
    return GenerateRequest.from_kwargs(**{str(name): value for name, value in fields.items()})


@router.get("/v1/jobs", summary="List jobs")
async def every(request: Request) -> dict[str, Any]:
    """The jobs that are remembered, oldest first."""
    house = house_of(request)
    return {"jobs": [told(house, job) for job in house.jobs()]}


@router.get("/v1/jobs/{name}", summary="Ask for a job", responses=_MISSING)
async def one(request: Request, name: str) -> dict[str, Any]:
    """How far a job is; its results when it is done."""
    return found(house_of(request), name)


@router.get("/v1/jobs/{name}/images/{index}", summary="Fetch a picture", responses=_MISSING)
async def image(request: Request, name: str, index: int) -> Response:
    """A finished picture's file."""
    house = house_of(request)
    job = house.job(name)
    if job is not None:
        result = next((each for each in job.results if each.index == index), None)
        if result is not None and result.image is not None:
            data = provenance.encode(result, job.format)
            return Response(data, media_type=wire.TYPES[job.format])
    kept = None if house.store is None else house.store.job(name)
    if kept is not None and house.store is not None:
        path = house.store.picture(name, index)
        if path.is_file():
            return Response(path.read_bytes(), media_type=wire.TYPES[kept.format])
    raise HTTPException(404, f"job {name} has no picture {index}")


@router.get("/v1/jobs/{name}/preview", summary="Fetch a preview", responses=_MISSING)
async def preview(request: Request, name: str) -> Response:
    """What the last previewed picture looks like so far."""
    import io

    seen = _found(request, name).preview
    if seen is None:
        raise HTTPException(404, "no preview yet; ask for preview_every")
    out = io.BytesIO()
    seen.image.save(out, "PNG")
    return Response(out.getvalue(), media_type="image/png")


@router.get("/v1/jobs/{name}/events", summary="Follow a job", responses=_MISSING)
async def events(request: Request, name: str) -> StreamingResponse:
    """Server-sent events: ``progress`` until ``done``."""
    house, job = house_of(request), _found(request, name)

    async def stream() -> AsyncIterator[str]:
        async for changed in wire.changes(job):
            kind = "done" if changed.status.final else "progress"
            yield f"event: {kind}\ndata: {json.dumps(told(house, changed))}\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream")


@router.post("/v1/jobs/{name}/cancel", summary="Cancel a job", responses=_MISSING)
async def cancel(request: Request, name: str) -> dict[str, Any]:
    """Stop within one step. What is finished stays."""
    job = _found(request, name)
    job.cancel()
    return told(house_of(request), job)


@router.delete("/v1/jobs/{name}", summary="Forget a job", status_code=204, responses=_MISSING)
async def delete(request: Request, name: str) -> Response:
    """Cancel a job, and forget its pictures."""
    house = house_of(request)
    found(house, name)
    job = house.job(name)
    if job is not None:
        job.cancel()
        job.keep = None
    house.forget(name)
    if house.store is not None:
        house.store.remove(name)
    return Response(status_code=204)


@router.get("/v1/capabilities", summary="What there is", responses=_MISSING)
async def capabilities(request: Request, model: str | None = None) -> dict[str, Any]:
    """Models and what they can, samplers, schedules, adapters, limits. With ``?model=NAME``, that
    one is loaded first, and ``model`` says all about it."""
    house = house_of(request)
    if model is None:
        return await asyncio.to_thread(describe.server, house)
    asked = await asyncio.to_thread(describe.model, house, model, load=True)
    return {**await asyncio.to_thread(describe.server, house), "model": asked}


def told(house: House, job: Job) -> dict[str, Any]:
    """A job as JSON."""
    found = dict(described(job, position=house.position(job), eta=house.eta(job)))
    found["error"] = None if job.error is None else str(job.error)
    found["results"] = [_result(job, result) for result in job.pictures]
    found["url"] = f"/v1/jobs/{job.id}"
    return found


def _result(job: Job, result: ImageResult) -> dict[str, Any]:
    return {
        "index": result.index,
        "seed": result.seed,
        "outcome": str(result.outcome),
        "message": result.message,
        "nsfw": result.nsfw,
        "notices": list(result.notices),
        "url": None if result.image is None else f"/v1/jobs/{job.id}/images/{result.index}",
    }


def found(house: House, name: str) -> dict[str, Any]:
    """A job as JSON, from memory or from disk.

    Raises:
        HTTPException: there is none, 404.
    """
    job = house.job(name)
    if job is not None:
        return told(house, job)
    kept = None if house.store is None else house.store.job(name)
    if kept is None:
        raise HTTPException(404, f"no job {name}; finished ones are forgotten after a while")
    return dict(kept.told or {"id": kept.id, "status": str(kept.status), "url": f"/v1/jobs/{name}"})


def _found(request: Request, name: str) -> Job:
    job = house_of(request).job(name)
    if job is None:
        raise HTTPException(404, f"no job {name}; finished ones are forgotten after a while")
    return job


def _number(fields: dict[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        raise InvalidRequest(name, f"must be a number from 0 to 1e9, not {shown(value)}.")
    return float(value)
