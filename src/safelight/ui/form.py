"""The form: what was filled in becomes a request of the native interface, and a picture's settings
become what is filled in. No gradio, no torch.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from safelight.errors import InvalidRequest

Values = dict[str, Any]
Body = dict[str, Any]

LABELS = {
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "model": "Model",
    "count": "Pictures",
    "steps": "Steps",
    "guidance_scale": "Guidance",
    "size": "Size",
    "width": "Width",
    "height": "Height",
    "seed": "Seed",
    "weighting": "Prompt weights",
    "sampler": "Sampler",
    "schedule": "Schedule",
    "guidance_rescale": "CFG rescale",
    "clip_skip": "Clip skip",
    "eta": "Eta",
    "safety": "A flagged picture is",
    "preview_every": "Preview every … steps",
    "lora": "LoRA",
    "lora_scale": "LoRA scale",
    "lora_2": "Second LoRA",
    "lora_2_scale": "Second LoRA scale",
    "loras": "LoRA",
    "embeddings": "Textual inversions",
    "image": "Picture",
    "images": "Pictures to look at",
    "mask": "Mask",
    "mask_feather": "Soft edge",
    "mask_crop": "Only around the mask",
    "depth": "Depth map",
    "strength": "Strength",
    "noise_level": "Noise level",
    "image_weights": "Picture weights",
    "prior_steps": "Prior steps",
    "prior_guidance_scale": "Prior guidance",
    "x_axis": "X axis",
    "y_axis": "Y axis",
    "z_axis": "Z axis",
}
"""What a field is called on the page, which errors repeat."""

MODES = {
    "text": "Text to image",
    "image": "Image to image",
    "inpaint": "Inpainting",
    "vary": "Variations",
    "upscale": "Upscaling",
    "grid": "Grid",
}
TABS = {**MODES, "text": "Text", "image": "Image", "inpaint": "Inpaint", "upscale": "Upscale"}
"""The same in a word each, so that all of them fit on a telephone."""
NEEDS = {
    "text": "a text-to-image model (sd-v1, sd-v2, unCLIP with a prior)",
    "image": "a model that can start from a picture (sd-v1, sd-v2, depth)",
    "inpaint": "a text-to-image or an inpainting model",
    "vary": "a model that looks at pictures (image-variations, unCLIP)",
    "upscale": "an x4-upscaler model",
}
AUTO, CUSTOM = "Automatic", "Choose"


def label(field: str) -> str:
    """A field's name on the page, from the name it has in a request."""
    plain = field.split("[")[0]
    return LABELS.get(plain, field)


# -- to a request ----------------------------------------------------------------------------------


def body(mode: str, values: Mapping[str, Any], model: Mapping[str, Any]) -> Body:
    """The request of a filled-in form.

    Args:
        mode: one of :data:`MODES`, except the grid.
        model: what the server says of the chosen one.

    Raises:
        InvalidRequest: names the field at fault; what only the server can know it says later.
    """
    unfit(mode, model)
    made: Body = {"model": values["model"], "prompt": values["prompt"].strip()}
    plain = ("negative_prompt", "guidance_scale", "sampler", "schedule", "clip_skip")
    for name in (*plain, "guidance_rescale", "safety"):
        if values.get(name) not in (None, "", 0, AUTO):
            made[name] = values[name]
    for name in ("count", "steps", "preview_every"):
        if values.get(name) is not None:
            made[name] = int(values[name])
    if "clip_skip" in made:
        made["clip_skip"] = int(made["clip_skip"])
    if values.get("eta") is not None:
        made["eta"] = float(values["eta"])
    if values.get("weighting", "none") != "none":
        made["weighting"] = values["weighting"]
    seed = whole_or_none(values.get("seed"), "seed")
    if seed is not None and seed >= 0:
        made["seed"] = seed
    if values.get("size") == CUSTOM:
        made["width"], made["height"] = int(values["width"]), int(values["height"])
    loras = [
        [values[name], float(values.get(f"{name}_scale") or 0.0)]
        for name in ("lora", "lora_2")
        if values.get(name)
    ]
    if loras:
        made["loras"] = loras
    if values.get("embeddings"):
        made["embeddings"] = list(values["embeddings"])
    if not model.get("reads_text", True):
        _without_text(made, model)
    _PICTURES[mode](made, values, model)
    return made


def unfit(mode: str, model: Mapping[str, Any]) -> None:
    """Refuse a mode that the model does not have.

    Raises:
        InvalidRequest: says what has.
    """
    modes = model.get("modes")
    if modes is not None and mode not in modes:
        problem = f"{model['name']} ({model['family']}) cannot do {MODES[mode].lower()}."
        raise InvalidRequest("model", problem, f"It needs {NEEDS[mode]}.")


def whole_or_none(text: Any, field: str) -> int | None:
    """A whole number as it was typed; None where nothing was.

    Raises:
        InvalidRequest: it is none.
    """
    if text is None or not str(text).strip():
        return None
    try:
        return int(str(text).strip())
    except ValueError:
        raise InvalidRequest(
            field, f"{text!r} is not a whole number.", "Empty is random."
        ) from None


def _without_text(made: Body, model: Mapping[str, Any]) -> None:
    if made.pop("prompt", ""):
        problem = f"{model['name']} makes pictures like other pictures and reads no text."
        raise InvalidRequest("prompt", problem, "Empty it, or choose another model.")
    made.pop("negative_prompt", None)


def _text(made: Body, values: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    if not made["prompt"]:
        raise InvalidRequest("prompt", "is empty.", "Say what the picture shows.")
    if model.get("prior"):
        for name, kind in (("prior_steps", int), ("prior_guidance_scale", float)):
            if values.get(name):
                made[name] = kind(values[name])


def _image(made: Body, values: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    made["strength"] = float(values["image_strength"])
    if model.get("depth") and values.get("depth"):
        made["depth"] = encoded(values["depth"], "depth")
        if not values.get("image"):
            del made["strength"]
            return
    made["image"] = encoded(values.get("image"), "image")


def _inpaint(made: Body, values: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    drawn = values.get("drawing") or {}
    picture, mask = drawn.get("background"), drawn_mask(drawn)
    if picture is None:
        raise InvalidRequest("image", "is missing.", "Put a picture under the brush.")
    made["image"] = encoded(picture, "image")
    if values.get("mask"):
        made["mask"] = encoded(values["mask"], "mask")
    elif mask is None:
        raise InvalidRequest("mask", "is empty.", "Paint over what is to be made anew.")
    else:
        made["mask"] = encoded(mask, "mask")
    made["strength"] = float(values["inpaint_strength"])
    if values.get("mask_feather"):
        made["mask_feather"] = int(values["mask_feather"])
    if values.get("mask_around"):
        made["mask_crop"] = int(values.get("mask_crop") or 0)


def _vary(made: Body, values: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    given = [name for name in (values.get("look"), values.get("look_2")) if name]
    if not given:
        raise InvalidRequest("images", "are missing.", "Choose a picture to make others like.")
    if len(given) == 1:
        made["image"] = encoded(given[0], "image")
    else:
        share = float(values.get("look_share", 0.5))
        made["images"] = [encoded(each, "images") for each in given]
        made["image_weights"] = [1 - share, share]
    if model.get("noise_level") is not None:
        made["noise_level"] = int(values.get("vary_noise") or 0)


def _upscale(made: Body, values: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    made["image"] = encoded(values.get("small"), "image")
    if values.get("upscale_noise") is not None:
        made["noise_level"] = int(values["upscale_noise"])


_PICTURES: dict[str, Callable[[Body, Mapping[str, Any], Mapping[str, Any]], None]] = {
    "text": _text,
    "image": _image,
    "inpaint": _inpaint,
    "vary": _vary,
    "upscale": _upscale,
}


def encoded(picture: str | Path | Image.Image | None, field: str) -> str:
    """A picture as base64: a file as it is, so that its digest is that of the file.

    Raises:
        InvalidRequest: there is none.
    """
    if picture is None:
        raise InvalidRequest(field, "is missing.", "Choose a picture.")
    if isinstance(picture, Image.Image):
        out = io.BytesIO()
        picture.save(out, "PNG")
        return base64.b64encode(out.getvalue()).decode()
    try:
        return base64.b64encode(Path(picture).read_bytes()).decode()
    except OSError as error:
        raise InvalidRequest(field, f"cannot be read: {error.strerror}.") from None


def drawn_mask(drawn: Mapping[str, Any]) -> Image.Image | None:
    """White where anything was painted; None where nothing was."""
    mask: Image.Image | None = None
    for layer in drawn.get("layers") or []:
        if layer is None:
            continue
        alpha = layer.convert("RGBA").getchannel("A").point([0] + [255] * 255)
        mask = alpha if mask is None else ImageChops.lighter(mask, alpha)
    return None if mask is None or mask.getbbox() is None else mask


# -- back from a picture ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Filled:
    """What a picture's settings fill in.

    Args:
        mode: the tab they belong to.
        values: by the form's names; what is missing stays.
        notes: what could not be taken over.
    """

    mode: str
    values: Values = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def filled(
    request: Mapping[str, Any],
    model: str | None = None,
    family: str | None = None,
    *,
    served: Sequence[str] = (),
    loras: Sequence[str] = (),
) -> Filled:
    """The form that makes a request again.

    Args:
        request: a :class:`~safelight.request.GenerateRequest` as JSON.
        model, family: of the model that made it, where that is known.
        served, loras: what there is here.
    """
    mode, notes = _mode(request, family), []
    values: Values = {
        "prompt": request.get("prompt") or "",
        "negative_prompt": request.get("negative_prompt") or "",
        "count": 1,
        "seed": "" if request.get("seed") is None else str(request["seed"]),
        "weighting": request.get("weighting") or "none",
        "sampler": request.get("sampler") or "",
        "schedule": request.get("schedule") or "",
        "guidance_rescale": request.get("guidance_rescale") or 0.0,
        "clip_skip": request.get("clip_skip") or 0,
        "eta": request.get("eta"),
        "safety": request.get("safety") if request.get("safety") != "off" else "",
        "embeddings": [name for name, _ in request.get("embeddings") or []],
        "mask_feather": request.get("mask_feather") or 0,
        "mask_around": request.get("mask_crop") is not None,
        "mask_crop": request.get("mask_crop") or 32,
        "size": AUTO,
    }
    for name in ("steps", "guidance_scale", "prior_steps", "prior_guidance_scale"):
        if request.get(name) is not None:
            values[name] = request[name]
    if request.get("width") and request.get("height"):
        values |= {"size": CUSTOM, "width": request["width"], "height": request["height"]}
    if request.get("strength") is not None:
        values["inpaint_strength" if mode == "inpaint" else "image_strength"] = request["strength"]
    if request.get("noise_level") is not None:
        values["upscale_noise" if mode == "upscale" else "vary_noise"] = request["noise_level"]
    if model in served:
        values["model"] = model
    elif model:
        notes.append(f"It was made by {model}, which is not served here.")
    notes += _put_loras(values, request.get("loras") or [], loras)
    if mode != "text":
        notes.append("The picture that it started from is not in the file: choose it again.")
    return Filled(mode, values, tuple(notes))


def _mode(request: Mapping[str, Any], family: str | None) -> str:
    if request.get("mask"):
        return "inpaint"
    if family == "x4-upscaler":
        return "upscale"
    if family in ("image-variations", "unclip") and not request.get("prior_steps"):
        return "vary"
    return "image" if request.get("image") or request.get("depth") else "text"


def _put_loras(values: Values, used: Sequence[Any], known: Sequence[str]) -> list[str]:
    notes = []
    values |= {"lora": "", "lora_scale": 1.0, "lora_2": "", "lora_2_scale": 1.0}
    for name, (lora, scale) in zip(("lora", "lora_2"), used, strict=False):
        if lora in known:
            values |= {name: lora, f"{name}_scale": scale}
        else:
            notes.append(f"The LoRA {lora} is not here.")
    if len(used) > 2:
        notes.append(f"It used {len(used)} LoRAs; the form has two.")
    return notes
