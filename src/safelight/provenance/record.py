"""What a picture says about how it was made: written, and read.

A picture carries two texts: A1111's ``parameters``, which other programs read, and our own JSON,
which is complete. The JSON names the *plan*: everything beside the request and the weights that may
move the last bit of a sum (kernels, threads, torch, device, how many pictures shared a network
call). Both can be left out; the mark that a machine made the picture (:mod:`safelight.store.xmp`)
cannot.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from safelight import __version__, names
from safelight.errors import InvalidRequest
from safelight.request import GenerateRequest, ImageResult, canonical_json
from safelight.store import pictures
from safelight.verdict import Moderated, Verdict

if TYPE_CHECKING:
    from safelight.model import Model
    from safelight.provenance.signing import Signer

SCHEMA = 1
"""Number of the picture's JSON schema."""
KIND = "safelight.picture"
NUMERICS = 1
"""Raised whenever the same request gives another picture on the same plan."""


# -- what is written ----------------------------------------------------------------------------


def plan(model: Model, batch: int | str) -> dict[str, Any]:
    """What decides the last bits of a picture, beside its request and the weights.

    Args:
        batch: how many pictures shared its network calls; ``"mixed"`` where other requests did.
    """
    import torch  # here, so that reading a picture's metadata does not load it

    device = model.device
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    else:
        chip = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "batch": batch,
        "chip": chip,
        "device": device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kernels": list(model.kernels),
        "numerics": NUMERICS,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": str(torch.__version__),
    }


def digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of a mapping's canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def pixel_digest(image: Image.Image) -> str:
    """SHA-256 of size and RGB bytes: the picture before any file format."""
    size = f"{image.width}x{image.height}:".encode()
    return hashlib.sha256(size + image.convert("RGB").tobytes()).hexdigest()


def metadata(
    model: Model,
    request: GenerateRequest,
    image: Image.Image | None,
    *,
    outcome: str,
    message: str = "",
    notices: tuple[str, ...] = (),
    batch: tuple[int, int, bool] = (0, 1, True),
    cheaper: tuple[str, ...] = (),
    safety: Verdict | None = None,
    moderation: tuple[Moderated, ...] = (),
) -> dict[str, Any]:
    """The JSON that a picture carries. Equal pictures have equal metadata: no clock, no names of
    people or folders.

    Args:
        request: this picture's own, resolved.
        batch: (index, size, alike): its place in the micro-batch, and whether that was one
            request's consecutive seeds and nothing else, so that it can be made again.
        cheaper: what was done with less after memory had run out; part of the plan.
        safety: the safety checker's verdict; None where the model has none.
        moderation: what a moderation service said.
    """
    index, size, alike = batch
    made_on = plan(model, size if alike else "mixed")
    if cheaper:
        made_on["cheaper"] = list(cheaper)
    if model.checker is not None:
        made_on["checker"] = model.checker.digest
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "safelight": __version__,
        "request": json.loads(request.canonical()),
        "model": {
            "name": model.spec.name,
            "family": model.spec.family,
            "source": _public_source(model.source),
            "digest": model.digest,
        },
        "plan": made_on,
        "plan_digest": digest(made_on),
        "batch": {"index": index, "size": size, "alike": alike},
        "pixels": pixel_digest(image) if image is not None else None,
        "outcome": str(outcome),
        "message": message,
        "notices": list(notices),
        "safety": None if safety is None else safety.model_dump(mode="json"),
        "moderation": [said.model_dump(mode="json") for said in moderation],
    }


def _public_source(source: str) -> str:
    """Where a model came from, without the folders of the person who made the picture."""
    hub = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\](\w+)", source)
    if hub:
        return "{}/{}@{}".format(*hub.groups())
    path = Path(source)
    return path.name if path.is_absolute() or path.exists() else source


def parameters_text(record: Mapping[str, Any]) -> str:
    """A1111's ``parameters`` text, its keys in its order (``create_infotext``)."""
    request, model = record["request"], record["model"]
    skip = request["clip_skip"]
    strength = request.get("strength")
    options = {
        "Steps": request["steps"],
        "Sampler": names.sampler_label(request["sampler"]),
        "Schedule type": names.schedule_label(request["schedule"]),
        "CFG scale": f"{request['guidance_scale']:g}",
        "Seed": request["seed"],
        "Size": f"{request['width']}x{request['height']}",
        "Model hash": model["digest"][:10] or None,
        "Model": model["name"],
        "Clip skip": skip + 1 if skip else None,
        "RNG": "CPU",
        "Eta": None if request["eta"] is None else f"{request['eta']:g}",
        "Denoising strength": f"{strength:g}" if strength is not None else None,
        "CFG Rescale": f"{request['guidance_rescale']:g}" if request["guidance_rescale"] else None,
        "Version": f"safelight {record['safelight']}",
    }
    line = ", ".join(f"{k}: {_quoted(v)}" for k, v in options.items() if v is not None)
    negative = request["negative_prompt"]
    lines = [request["prompt"], f"Negative prompt: {negative}" if negative else "", line]
    return "\n".join(text for text in lines if text)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def encode(
    result: ImageResult,
    format: str = "PNG",
    *,
    quality: int | None = None,
    metadata: bool = True,
    signer: Signer | None = None,
) -> bytes:
    """A finished picture as a file's bytes: marked as machine-made, with its settings, signed.

    Args:
        format: ``PNG``, ``JPEG`` or ``WEBP``.
        quality: 1 to 100, of JPEG and WebP.
        metadata: False leaves the settings out. The mark stays.
        signer: signs the bytes (:class:`safelight.provenance.Signer`).

    Raises:
        InvalidRequest: there is no picture (see ``result.outcome``), or the format is unknown.
    """
    if result.image is None:
        raise InvalidRequest("result", f"holds no picture: {result.outcome}. {result.message}")
    told = bool(metadata and result.metadata)
    text = parameters_text(result.metadata) if told else ""
    record = canonical_json(result.metadata) if told else ""
    options: dict[str, Any] = {} if quality is None else {"quality": quality}
    data = pictures.encode(result.image, format, text, record, **options)
    return data if signer is None else signer.sign(data, format)


def save(
    result: ImageResult,
    path: str | Path,
    *,
    quality: int | None = None,
    metadata: bool = True,
    signer: Signer | None = None,
) -> Path:
    """Write a finished picture; the ending chooses PNG, JPEG or WebP. See :func:`encode`.

    Raises:
        InvalidRequest: there is no picture (see ``result.outcome``), or the ending is unknown.
    """
    format = pictures.format_of(path)
    data = encode(result, format, quality=quality, metadata=metadata, signer=signer)
    pictures.write(path, data)
    return Path(path)


# -- what is read -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provenance:
    """What a file says about how it was made.

    Args:
        request: to make it again.
        record: our JSON; empty for pictures of other programs.
        parameters: A1111's text; may be empty.
        notes: what could not be taken over.
    """

    request: GenerateRequest
    record: Mapping[str, Any]
    parameters: str = ""
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> str | None:
        """A name to load the model by, where the file says one."""
        model = self.record.get("model", {})
        source = str(model.get("source", ""))
        if source.startswith("shipped:"):
            return source.removeprefix("shipped:")
        return source if source and source != "memory" else None


def read(path: str | Path) -> Provenance:
    """Read a picture's metadata, ours or A1111's.

    Raises:
        InvalidRequest: no such file, not a picture, or one that says nothing.
    """
    found = pictures.read_metadata(path)
    text, ours = found.parameters or "", found.json
    if ours:
        try:
            record = json.loads(ours)
            known = record.get("kind") == KIND
        except (ValueError, AttributeError, RecursionError):
            known, record = False, {}
        if known and record.get("schema") != SCHEMA:
            raise InvalidRequest(
                "picture",
                f"{path} has metadata of schema {record.get('schema')}; this version reads "
                f"{SCHEMA}.",
                "Update safelight.",
            )
        if known:
            return Provenance(GenerateRequest.from_json(record.get("request") or {}), record, text)
    if text:
        return from_parameters(text)
    raise InvalidRequest("picture", f"{path} does not say how it was made.")


_MAX_LINE = 20_000
_OPTION = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def parse_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """A1111's text, taken apart: prompt, negative prompt, options."""
    *lines, last = text.strip().split("\n")
    # Looking for options takes the square of the line's length, and strangers write lines.
    if len(last) > _MAX_LINE or len(_OPTION.findall(last)) < 3:
        lines, last = [*lines, last], ""
    body, _, negative = "\n".join(lines).partition("Negative prompt:")
    options = {}
    for key, value in _OPTION.findall(last):
        if value[:1] == value[-1:] == '"':
            try:
                value = json.loads(value)
            except ValueError:
                value = value.strip('"')
        options[key.strip()] = str(value)
    return body.strip(), negative.strip(), options


def from_parameters(text: str) -> Provenance:
    """The request that A1111's text describes, in its dialect of word weights.

    Raises:
        InvalidRequest: it lacks a prompt, or a value makes no sense.
    """
    prompt, negative, options = parse_parameters(text)
    fields: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative, "weighting": "a1111"}
    width, _, height = options.pop("Size", "").partition("x")
    taken = {
        "steps": (options.pop("Steps", None), int),
        "sampler": (options.pop("Sampler", None), str),
        "schedule": (options.pop("Schedule type", None), str),
        "guidance_scale": (options.pop("CFG scale", None), float),
        "seed": (options.pop("Seed", None), int),
        "width": (width or None, int),
        "height": (height or None, int),
        "eta": (options.pop("Eta", None), float),
        "guidance_rescale": (options.pop("CFG Rescale", None), float),
        "clip_skip": (options.pop("Clip skip", None), lambda v: int(v) - 1),
    }
    for name, (value, read_as) in taken.items():
        if value is not None:
            try:
                fields[name] = read_as(value)
            except ValueError:
                raise InvalidRequest(name, f"{value!r} in the picture is not a number.") from None
    silent = {"Model", "Model hash", "Version", "RNG", "VAE", "VAE hash"}
    notes = [f"{k}: {v} is not taken over" for k, v in options.items() if k not in silent]
    if options.get("RNG", "GPU") != "CPU":
        notes.append("its noise was drawn on a GPU: expect another picture")
    return Provenance(GenerateRequest(**fields), {}, text, tuple(notes))
