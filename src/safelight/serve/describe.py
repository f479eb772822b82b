"""What a server's models are and can, for whoever builds a form."""

from __future__ import annotations

import json
from typing import Any

from safelight import cards, names
from safelight.errors import SafelightError
from safelight.generate.able import LOOKS, STARTS
from safelight.request import GenerateRequest
from safelight.serve.house import House
from safelight.shipped import FAMILY
from safelight.spec import ModelSpec
from safelight.store.registry import Registry

LIMITS = ("max_pixels", "max_steps", "max_count", "max_prompt", "max_body", "queue_seconds")


def server(house: House) -> dict[str, Any]:
    """Models, samplers, schedules, adapters and limits. Loads nothing."""
    s = house.settings
    return {
        "models": list(s.models),
        "details": {name: model(house, name) for name in s.models},
        "samplers": [sampler.name for sampler in names.SAMPLERS],
        "schedules": [schedule.name for schedule in names.SCHEDULES],
        "loras": sorted(Registry(s.lora_dir).names()),
        "embeddings": sorted(Registry(s.embedding_dir).names()),
        "limits": {name: getattr(s, name) for name in LIMITS},
        "fields": sorted(GenerateRequest.model_fields),
    }


def model(house: House, name: str, *, load: bool = False) -> dict[str, Any]:
    """One model: its size, its defaults and what it can. Of one that is neither shipped nor loaded
    little is known; ``load`` changes that.

    Raises:
        ModelNotFound: it is not served. With ``load``, all errors of loading.
    """
    name = house.name(name)
    if load:
        house.worker(name)
    worker = house.loaded().get(name)
    found: dict[str, Any] = {"name": name, "loaded": worker is not None, "family": None}
    if worker is not None:
        real = worker.generator.model
        found |= spec(real.spec) | {"checker": real.checker is not None, "notes": list(real.notes)}
        card = real.card
        found["card"] = cards.shipped(name) if card is None else cards.markdown(card)
        return found
    found["card"], file = cards.shipped(name), FAMILY / name / "model.json"
    if found["card"] is not None and file.is_file():
        try:
            read = ModelSpec.model_validate(json.loads(file.read_text())["spec"])
        except (ValueError, KeyError, SafelightError):
            return found
        found |= spec(read) | {"checker": house.settings.safety_checker is not None}
    return found


def spec(spec: ModelSpec) -> dict[str, Any]:
    """What a form must know of a model: plain values, see :mod:`safelight.generate.able`."""
    reads = spec.text is not None and spec.family != "image-variations"
    looks = spec.family in LOOKS and spec.vision is not None
    text = spec.family in ("sd-v1", "sd-v2") or (spec.family == "unclip" and spec.prior is not None)
    modes = {
        "text": text and reads,
        "image": spec.family in STARTS and spec.family != "inpaint",
        "inpaint": spec.family in ("sd-v1", "sd-v2", "inpaint"),
        "vary": looks,
        "upscale": spec.family == "x4-upscaler",
    }
    return {
        "family": spec.family,
        "modes": [mode for mode, able in modes.items() if able],
        "native_size": spec.native_size,
        "multiple": max(8, spec.vae.factor),
        "steps": spec.steps,
        "guidance_scale": spec.guidance_scale,
        "sampler": spec.schedule.sampler,
        "reads_text": reads,
        "prior": spec.prior is not None,
        "depth": spec.family == "depth",
        "noise_level": spec.noise_level,
        "max_noise_level": spec.max_noise_level if spec.noise_level is not None else None,
        "words": len(spec.words),
    }
