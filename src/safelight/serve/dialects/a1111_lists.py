"""AUTOMATIC1111's ``/sdapi/v1``, beside generating: lists, options, pictures' texts."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from starlette.exceptions import HTTPException

from safelight import names, provenance
from safelight.errors import InvalidRequest
from safelight.fields import shown
from safelight.serve import wire
from safelight.serve.dialects import house_of, json_body, schemas
from safelight.store.pictures import open_picture, read_metadata

router = APIRouter(prefix="/sdapi/v1", tags=["a1111"])

_NOTHING = (
    "prompt-styles",
    "hypernetworks",
    "face-restorers",
    "realesrgan-models",
    "script-info",
    "extensions",
    "sd-vae",
    "sd-modules",
)
_UPSCALERS = {
    "None": None,
    "Lanczos": Image.Resampling.LANCZOS,
    "Nearest": Image.Resampling.NEAREST,
}
_PICTURED = schemas.object_of({"image": schemas.PICTURE}, required=("image",), more=True)
_ENLARGED = schemas.object_of(
    {
        "image": schemas.PICTURE,
        "upscaling_resize": schemas.number("number", 0, 8, default=2),
        "upscaler_1": schemas.choice(*_UPSCALERS, default="Lanczos"),
    },
    required=("image",),
    more=True,
)


def _nothing(name: str) -> None:
    @router.get(f"/{name}", name=name)
    async def empty() -> list[Any]:
        return []


for _name in _NOTHING:
    _nothing(_name)


@router.get("/samplers")
async def samplers() -> list[dict[str, Any]]:
    """By A1111's names."""
    return [
        {"name": each.label, "aliases": [each.name, *each.aliases], "options": {}}
        for each in names.SAMPLERS
    ]


@router.get("/schedulers")
async def schedulers() -> list[dict[str, Any]]:
    """Schedule types; ``automatic`` is the model's own."""
    found = [{"name": "automatic", "label": "Automatic", "aliases": []}]
    found += [
        {"name": each.name, "label": each.label or each.name, "aliases": list(each.aliases)}
        for each in names.SCHEDULES
    ]
    return [{**each, "default_rho": -1, "need_inner_model": False} for each in found]


@router.get("/sd-models")
async def sd_models(request: Request) -> list[dict[str, Any]]:
    """The models that are served."""
    return [
        {
            "title": name,
            "model_name": name,
            "hash": None,
            "sha256": None,
            "filename": name,
            "config": None,
        }
        for name in house_of(request).settings.models
    ]


def _files(folders: tuple[str, ...]) -> list[Path]:
    endings = (".safetensors", ".pt", ".bin", ".ckpt")
    return sorted(
        path
        for folder in folders
        if Path(folder).is_dir()
        for path in Path(folder).iterdir()
        if path.suffix in endings
    )


@router.get("/loras")
async def loras(request: Request) -> list[dict[str, Any]]:
    """Those that a prompt may name."""
    return [
        {"name": path.stem, "alias": path.stem, "path": path.name, "metadata": {}}
        for path in _files(house_of(request).settings.lora_dir)
    ]


@router.get("/embeddings")
async def embeddings(request: Request) -> dict[str, Any]:
    """Those that a prompt may name."""
    found = _files(house_of(request).settings.embedding_dir)
    return {"loaded": {path.stem: {} for path in found}, "skipped": {}}


@router.get("/upscalers")
async def upscalers() -> list[dict[str, Any]]:
    """Of ``extra-single-image``."""
    keys = ("model_name", "model_path", "model_url")
    return [{"name": name, **dict.fromkeys(keys), "scale": 4} for name in _UPSCALERS]


@router.get("/latent-upscale-modes")
async def latent_upscale_modes() -> list[dict[str, str]]:
    """There is no hires pass here."""
    return []


@router.get("/scripts")
async def scripts() -> dict[str, list[str]]:
    """There are none."""
    return {"txt2img": [], "img2img": []}


@router.get("/cmd-flags")
async def cmd_flags() -> dict[str, Any]:
    """Nothing of the web UI's command line."""
    return {}


@router.get("/options")
async def options(request: Request) -> dict[str, Any]:
    """The model in use, and whatever was posted."""
    house = house_of(request)
    given = request.app.state.a1111_options
    return {"sd_model_checkpoint": house.default, "CLIP_stop_at_last_layers": 1, **given}


@router.post(
    "/options",
    openapi_extra=schemas.body(
        schemas.object_of({"sd_model_checkpoint": {"type": "string"}}, more=True)
    ),
)
async def set_options(request: Request) -> None:
    """Remembered, as clients post back what they read; the model's name takes effect.

    Raises:
        ModelNotFound: a model that is not served.
    """
    body = await json_body(request)
    wanted = body.get("sd_model_checkpoint")
    if wanted:
        body["sd_model_checkpoint"] = house_of(request).name(str(wanted).split(" [")[0])
    request.app.state.a1111_options.update(body)


@router.get("/memory")
async def memory() -> dict[str, Any]:
    """Of this process, in bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"ram": {"used": used, "free": None, "total": None}, "cuda": {"error": "unavailable"}}


def _acknowledge(name: str) -> None:
    @router.post(f"/{name}", name=name)
    async def done() -> dict[str, Any]:
        return {}


for _name in (
    "refresh-checkpoints",
    "refresh-vae",
    "refresh-loras",
    "refresh-embeddings",
    "unload-checkpoint",
    "reload-checkpoint",
):
    _acknowledge(_name)


@router.post(
    "/png-info", openapi_extra=schemas.body(_PICTURED, {"a picture": {"image": schemas.GREY}})
)
async def png_info(request: Request) -> dict[str, Any]:
    """What a picture says about how it was made."""
    body = await json_body(request)
    data = wire.picture(body.get("image"), "image")
    try:
        text = read_metadata(data).parameters or ""
    except InvalidRequest as error:
        raise InvalidRequest("image", error.problem, error.fix) from None
    try:
        _, _, parameters = provenance.parse_parameters(text) if text else ("", "", {})
    except InvalidRequest:
        parameters = {}
    items = {"parameters": text} if text else {}
    return {"info": text, "items": items, "parameters": parameters}


@router.post("/interrogate")
async def interrogate() -> None:
    """Not here."""
    raise HTTPException(404, "interrogate: no captioning model is installed")


@router.post(
    "/extra-single-image",
    openapi_extra=schemas.body(
        _ENLARGED,
        {"twice": {"image": schemas.GREY, "upscaling_resize": 2, "upscaler_1": "Lanczos"}},
    ),
)
async def extra_single_image(request: Request) -> dict[str, Any]:
    """Enlarge a picture by an ordinary filter."""
    return {"html_info": "", "image": _enlarged(await json_body(request), "image")}


@router.post("/extra-batch-images")
async def extra_batch_images(request: Request) -> dict[str, Any]:
    """Several."""
    body = await json_body(request)
    given = body.get("imageList")
    if not isinstance(given, list) or not given:
        raise InvalidRequest("imageList", "must be a list of pictures.")
    pictures = [each.get("data") if isinstance(each, dict) else None for each in given]
    made = [_enlarged({**body, "image": each}, "imageList") for each in pictures]
    return {"html_info": "", "images": made}


def _enlarged(body: dict[str, Any], field: str) -> str:
    for name in ("gfpgan_visibility", "codeformer_visibility", "extras_upscaler_2_visibility"):
        if body.get(name):
            raise InvalidRequest(name, "is not supported here.", "Leave it at 0.")
    upscaler = body.get("upscaler_1", "Lanczos")
    if not isinstance(upscaler, str) or upscaler not in _UPSCALERS:
        known = ", ".join(_UPSCALERS)
        raise InvalidRequest("upscaler_1", f"{shown(upscaler)} is not here.", f"There are {known}.")
    image = open_picture(wire.picture(body.get("image"), field), field=field)
    factor = body.get("upscaling_resize", 2)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 8:
        raise InvalidRequest("upscaling_resize", f"must be above 0, at most 8, not {factor!r}.")
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    if size[0] * size[1] > 2**26:
        raise InvalidRequest("upscaling_resize", f"{size[0]}x{size[1]} is too large.")
    how = _UPSCALERS[upscaler]
    return wire.png(image if how is None else image.resize(size, how))
