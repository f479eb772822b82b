"""AUTOMATIC1111's ``/sdapi/v1``: generating. What clients ask beside that is in :mod:`a1111_lists`.

Fields that this program has no use for are ignored where they are at their default, as clients send
all of them every time, and refused by name where they are not. Prompts are read in A1111's dialect.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image, ImageOps
from starlette.exceptions import HTTPException

from safelight import names, provenance
from safelight.errors import InvalidRequest
from safelight.fields import shown
from safelight.request import GenerateRequest, ImageResult
from safelight.serve import wire
from safelight.serve.dialects import house_of, json_body, schemas, submitted
from safelight.serve.jobs import Job, Status
from safelight.store.pictures import opened

router = APIRouter(prefix="/sdapi/v1", tags=["a1111"])

_REFUSED: dict[str, tuple[Any, ...]] = {
    "enable_hr": (False, None),
    "styles": ([], None),
    "subseed_strength": (0, None),
    "seed_resize_from_h": (0, -1, None),
    "seed_resize_from_w": (0, -1, None),
    "restore_faces": (False, None),
    "tiling": (False, None),
    "refiner_checkpoint": (None, ""),
    "script_name": (None, ""),
    "image_cfg_scale": (None, 0, 1.5),
    "initial_noise_multiplier": (None, 0, 1, 1.0),
    "latent_mask": (None,),
    "save_images": (False, None),
}
"""Fields that would change the picture (or write files here), and the values that would not."""
_FIELDS: dict[str, Any] = {
    "prompt": {"type": "string", "default": ""},
    "negative_prompt": {"type": "string", "default": ""},
    "seed": {"type": "integer", "default": -1},
    "steps": schemas.number("integer", 1, 512, default=50),
    "cfg_scale": schemas.number("number", 0, 1000, default=7.0),
    "sampler_name": {"type": ["string", "null"], "description": "One of `/samplers`."},
    "sampler_index": {"type": "string", "default": "Euler"},
    "scheduler": {"type": ["string", "null"], "description": "One of `/schedulers`."},
    "batch_size": {"type": "integer", "default": 1},
    "n_iter": {"type": "integer", "default": 1},
    "width": {"type": "integer", "description": "The model's native size where it is left out."},
    "height": {"type": "integer"},
    "eta": {"type": ["number", "null"]},
    "override_settings": {
        "type": "object",
        "description": "`sd_model_checkpoint` and `CLIP_stop_at_last_layers`.",
    },
    "send_images": {"type": "boolean", "default": True},
    **{
        name: {"enum": list(harmless), "description": "Anything else is refused."}
        for name, harmless in _REFUSED.items()
    },
}
_START: dict[str, Any] = {
    "init_images": {"type": "array", "items": schemas.PICTURE, "minItems": 1, "maxItems": 1},
    "denoising_strength": schemas.number("number", 0, 1, default=0.75),
    "resize_mode": schemas.choice(0, 1, 2, default=0),
    "mask": {**schemas.PICTURE, "type": ["string", "null"]},
    "mask_blur": {"type": "integer", "default": 4},
    "inpainting_mask_invert": {"type": "integer", "default": 0},
    "inpaint_full_res": {"type": "boolean", "default": True},
    "inpaint_full_res_padding": {"type": "integer", "default": 0},
}
_ERROR = schemas.object_of(
    {name: {"type": "string"} for name in ("error", "detail", "body", "errors")},
    required=("error", "detail"),
)
_FEW = {"prompt": "a (red:1.2) cube", "steps": 8, "seed": 7, "sampler_name": "Euler a"}
EXAMPLES: dict[str, dict[str, Any]] = {
    "few fields": _FEW,
    "as webuiapi sends it": {
        **_FEW,
        "sampler_index": "Euler a",
        "scheduler": "automatic",
        "cfg_scale": 7.0,
        "eta": 1.0,
        "styles": [],
        "subseed_strength": 0,
        "seed_resize_from_h": 0,
        "enable_hr": False,
        "width": 128,
        "height": 128,
    },
}
STARTING: dict[str, dict[str, Any]] = {
    "image to image": {**_FEW, "init_images": [schemas.GREY], "width": 128, "height": 128},
}


@router.post(
    "/txt2img",
    summary="Text to image",
    openapi_extra=schemas.body(schemas.object_of(_FIELDS, more=True), EXAMPLES),
    responses=schemas.errors(_ERROR),
)
async def txt2img(request: Request) -> dict[str, Any]:
    """Pictures from a prompt."""
    body = await json_body(request)
    return await _made(request, body, read(body))


@router.post(
    "/img2img",
    summary="Image to image, inpainting",
    openapi_extra=schemas.body(
        schemas.object_of({**_FIELDS, **_START}, required=("init_images",), more=True), STARTING
    ),
    responses=schemas.errors(_ERROR),
)
async def img2img(request: Request) -> dict[str, Any]:
    """Pictures from a picture, or where a mask is white."""
    body = await json_body(request)
    if not body.get("init_images"):
        raise HTTPException(404, "Init image not found")
    return await _made(request, body, read(body, starts=True))


def read(body: Mapping[str, Any], *, starts: bool = False) -> GenerateRequest:
    """Our request from theirs.

    Args:
        starts: it comes with a picture.

    Raises:
        InvalidRequest: a wrong field, or one that is not honoured and not at its default.
    """
    for name, harmless in _REFUSED.items():
        value = body.get(name)
        if not any(value == each for each in harmless):
            raise InvalidRequest(name, f"{shown(value)} is not supported here.", "Leave it out.")
    scripts = body.get("alwayson_scripts") or {}
    if scripts:
        said = shown(sorted(scripts) if isinstance(scripts, Mapping) else scripts)
        raise InvalidRequest("alwayson_scripts", f"{said}: not installed here.")
    settings = body.get("override_settings") or {}
    if not isinstance(settings, Mapping):
        raise InvalidRequest("override_settings", "must be an object.")
    fields: dict[str, Any] = {
        "prompt": body.get("prompt") or "",
        "negative_prompt": body.get("negative_prompt") or "",
        "steps": _given(body, "steps", 50),
        "guidance_scale": _given(body, "cfg_scale", 7.0),
        "sampler": body.get("sampler_name") or body.get("sampler_index") or "Euler",
        "schedule": body.get("scheduler"),
        "seed": _given(body, "seed", -1),
        "weighting": "a1111",
    }
    fields["batch_size"] = _given(body, "batch_size", 1)
    fields["n_iter"] = _given(body, "n_iter", 1)
    for name in ("width", "height"):
        if body.get(name) not in (None, 0, ""):
            fields[name] = body[name]
    last = settings.get("CLIP_stop_at_last_layers")
    if last is not None:
        fields["CLIP_stop_at_last_layers"] = last
    try:
        names.sampler(fields["sampler"])
    except InvalidRequest as error:
        raise HTTPException(404, f"Sampler not found: {error.problem[:200]}") from None
    # Clients send eta for every sampler; it means something to some.
    if body.get("eta") is not None and _takes_eta(fields["sampler"]):
        fields["eta"] = body["eta"]
    if starts:
        fields |= _picture(body, fields)
    try:
        return GenerateRequest.from_kwargs(**fields)
    except InvalidRequest as error:
        theirs = {"guidance_scale": "cfg_scale", "sampler": "sampler_name", "image": "init_images"}
        theirs |= {"schedule": "scheduler", "strength": "denoising_strength"}
        name = theirs.get(error.field, error.field)
        raise InvalidRequest(name, error.problem, error.fix) from None


def _given(body: Mapping[str, Any], name: str, default: Any) -> Any:
    value = body.get(name)
    return default if value is None else value


def _takes_eta(sampler: str) -> bool:
    return names.sampler(sampler).sampler in ("ddim", "euler-a")


def _picture(body: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    images = body["init_images"]
    if not isinstance(images, list) or len(images) != 1:
        raise InvalidRequest("init_images", "must be a list of one picture.")
    image = opened(wire.picture(images[0], "init_images"), field="init_images")
    size = (fields.get("width") or image.width, fields.get("height") or image.height)
    mode = body.get("resize_mode") or 0
    if not all(isinstance(side, int) and 0 < side <= 8192 for side in size):
        raise InvalidRequest("width", f"{size} is no size.")
    found: dict[str, Any] = {
        "image": _resized(image, size, mode),
        "strength": _given(body, "denoising_strength", 0.75),
    }
    if body.get("mask"):
        mask = opened(wire.picture(body["mask"], "mask"), field="mask").convert("L")
        if body.get("inpainting_mask_invert"):
            mask = ImageOps.invert(mask)
        found["mask"] = _resized(mask, size, mode)
        found["mask_feather"] = _given(body, "mask_blur", 4)
        if body.get("inpaint_full_res", True):
            found["mask_crop"] = _given(body, "inpaint_full_res_padding", 0)
    return found


def _resized(image: Image.Image, size: tuple[int, int], mode: Any) -> Image.Image:
    """Stretched (0), cropped (1) or fitted into the middle (2)."""
    if mode == 1:
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if mode == 2:
        return ImageOps.pad(image, size, Image.Resampling.LANCZOS)
    if mode == 0:
        return image.resize(size, Image.Resampling.LANCZOS)
    raise InvalidRequest("resize_mode", f"{mode!r} is not supported.", "0, 1 or 2.")


# -- running ------------------------------------------------------------------------------------


async def _made(
    request: Request, body: Mapping[str, Any], asked: GenerateRequest
) -> dict[str, Any]:
    house = house_of(request)
    job = await submitted(request, [asked.replace(preview_every=5)], _model(request, body))
    jobs: dict[str, Job] = request.app.state.a1111
    jobs[job.id] = job
    try:
        await wire.finished(job, request.receive)
    finally:
        jobs.pop(job.id, None)
        house.forget(job.id)
    if job.error is not None:
        raise job.error
    results = [result for result in job.pictures if result.image is not None]
    if not results and job.status is not Status.cancelled:
        reason = "; ".join(result.message for result in job.pictures)
        raise HTTPException(500, reason or "no picture was made")
    sent = results if _given(body, "send_images", True) else []
    return {
        "images": [wire.encoded(result) for result in sent],
        "parameters": dict(body),
        "info": json.dumps(_info(job, results, house.name(job.model))),
    }


def _model(request: Request, body: Mapping[str, Any]) -> str | None:
    """The checkpoint that the request asks for; an unknown one keeps the one in use, as there."""
    settings = body.get("override_settings") or {}
    wanted = settings.get("sd_model_checkpoint") or request.app.state.a1111_options.get(
        "sd_model_checkpoint"
    )
    try:
        return house_of(request).name(str(wanted).split(" [")[0]) if wanted else None
    except LookupError:
        return None


def _info(job: Job, results: list[ImageResult], model: str) -> dict[str, Any]:
    made = job.requests[0]
    seeds = [result.seed for result in results]
    texts = [provenance.parameters_text(result.metadata) for result in results]
    return {
        "prompt": made.prompt,
        "all_prompts": [made.prompt] * len(results),
        "negative_prompt": made.negative_prompt,
        "all_negative_prompts": [made.negative_prompt] * len(results),
        "seed": made.seed,
        "all_seeds": seeds,
        "subseed": made.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": made.width,
        "height": made.height,
        "sampler_name": names.sampler_label(made.sampler or "euler"),
        "cfg_scale": made.guidance_scale,
        "steps": made.steps,
        "batch_size": made.count,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model,
        "sd_model_hash": "",
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": made.strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": (made.clip_skip or 0) + 1,
        "is_using_inpainting_conditioning": made.mask is not None,
        "version": "safelight",
    }


@router.get("/progress", summary="Progress", responses=schemas.errors(_ERROR, 401))
async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
    """How far this interface's oldest job is; all zero when there is none."""
    jobs: list[Job] = list(request.app.state.a1111.values())
    job = jobs[0] if jobs else None
    told = job.progress if job else None
    image = None
    if job is not None and job.preview is not None and not skip_current_image:
        image = wire.png(job.preview.image)
    return {
        "progress": min(0.99, told.done) if told else (0.01 if job else 0.0),
        "eta_relative": (house_of(request).eta(job) or 0.0) if job else 0.0,
        "state": {
            "skipped": False,
            "interrupted": bool(job and job.cancel_token.is_set),
            "stopping_generation": bool(job and job.cancel_token.is_set),
            "job": job.id if job else "",
            "job_count": len(jobs),
            "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created))
            if job
            else "0",
            "job_no": 0,
            "sampling_step": told.step if told else 0,
            "sampling_steps": told.total if told else 0,
        },
        "current_image": image,
        "textinfo": None,
    }


@router.post("/interrupt", summary="Interrupt")
async def interrupt(request: Request) -> dict[str, Any]:
    """Stop what this interface has running."""
    for job in list(request.app.state.a1111.values()):
        job.cancel()
    return {}


@router.post("/skip", summary="Skip")
async def skip(request: Request) -> None:
    """As interrupt: a job's pictures are made together."""
    await interrupt(request)


def error(status: int, code: str, message: str, field: str) -> dict[str, Any]:
    """As the web UI answers."""
    return {"error": code, "detail": message, "body": field, "errors": message}
