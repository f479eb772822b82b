"""A server that is not there: it answers as ``/v1/jobs`` does, a step at every look."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from micro_models import MICRO
from safelight import provenance
from safelight.errors import SafelightError
from safelight.request import GenerateRequest, ImageResult, Outcome
from safelight.verdict import Score, Verdict

STEPS = 4


def detail(name: str = "toy", family: str = "sd-v1", **more: Any) -> dict[str, Any]:
    """What ``/v1/capabilities`` says of a model."""
    modes = {
        "sd-v1": ["text", "image", "inpaint"],
        "unclip": ["vary"],
        "image-variations": ["vary"],
        "x4-upscaler": ["upscale"],
        "depth": ["image"],
    }[family]
    noise = {"unclip": (0, 999), "x4-upscaler": (20, 350)}.get(family, (None, None))
    return {
        "name": name,
        "family": family,
        "loaded": True,
        "modes": modes,
        "native_size": 32,
        "multiple": 8,
        "steps": 5,
        "guidance_scale": 3.0,
        "sampler": "pndm",
        "reads_text": family != "image-variations",
        "prior": False,
        "depth": family == "depth",
        "noise_level": noise[0],
        "max_noise_level": noise[1],
        "checker": False,
        "card": f"# Card of {name}",
        **more,
    }


def png(colour: str = "red", size: int = 32) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(out, "PNG")
    return out.getvalue()


class FakeClient:
    """Takes everything; every look is a step. ``flag`` flags what it makes, ``refuse`` raises."""

    def __init__(self, *models: dict[str, Any], **limits: Any) -> None:
        self.models = {each["name"]: each for each in models or (detail(),)}
        self.limits = limits
        self.bodies: list[dict[str, Any]] = []
        self.looks: list[int] = []
        self.cancelled: list[str] = []
        self.flag = False
        self.refuse: Exception | None = None

    def capabilities(self) -> Mapping[str, Any]:
        limits = {"max_pixels": 2048**2, "max_steps": 512, "max_count": 10, "max_prompt": 10000}
        return {
            "models": list(self.models),
            "details": self.models,
            "samplers": ["ddim", "pndm", "euler-a"],
            "schedules": ["leading", "karras"],
            "loras": ["style"],
            "embeddings": ["toad"],
            "limits": {**limits, "max_body": 2**26, "queue_seconds": 600.0, **self.limits},
            "fields": [],
        }

    def model(self, name: str) -> Mapping[str, Any]:
        self.models[name] = detail(name)
        return self.models[name]

    def submit(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.refuse is not None:
            raise self.refuse
        self.bodies.append(dict(body))
        self.looks.append(0)
        return self.told(len(self.bodies) - 1)

    def told(self, at: int) -> dict[str, Any]:
        body, step = self.bodies[at], self.looks[at]
        gone, done = f"job-{at}" in self.cancelled, step >= STEPS
        status = "queued" if step == 0 else "generating"
        if gone or done:
            status = "cancelled" if gone else "completed"
        count = int(body.get("count", 1)) if done and not gone else 0
        seed = int(body.get("seed", 5))
        results = [
            {
                "index": k,
                "seed": seed + k,
                "outcome": "nsfw" if self.flag else "ok",
                "message": "It is black." if self.flag else "",
                "nsfw": True if self.flag else None,
                "notices": ["one word is unknown"],
                "url": "there",
            }
            for k in range(count)
        ]
        return {
            "id": f"job-{at}",
            "status": status,
            "queue_position": 2 if step == 0 else None,
            "progress": min(1.0, step / STEPS),
            "step": step,
            "steps": STEPS,
            "eta_seconds": float(STEPS - step),
            "finished": len(results),
            "results": results,
            "error": None,
        }

    def job(self, name: str) -> Mapping[str, Any]:
        at = int(name.removeprefix("job-"))
        self.looks[at] += 1
        return self.told(at)

    def preview(self, name: str) -> bytes | None:
        return png("grey")

    def picture(self, name: str, index: int) -> bytes:
        """A picture as the server writes it, settings and all."""
        body = dict(self.bodies[int(name.removeprefix("job-"))])
        for known in ("model", "image", "images", "mask", "depth"):
            body.pop(known, None)
        if not body.get("prompt"):
            body["prompt"] = "a picture"
        for known in ("strength", "noise_level", "image_weights", "mask_crop"):
            body.pop(known, None)
        body["seed"] = int(body.get("seed", 5)) + index
        request = GenerateRequest(**{**body, "count": 1}).resolved(MICRO)
        verdict = Verdict(
            policy="black", nsfw=True, scores=(Score(name="a", score=0.1, threshold=0.2),)
        )
        record = {
            "schema": provenance.SCHEMA,
            "kind": provenance.KIND,
            "safelight": "0",
            "request": json.loads(request.canonical()),
            "model": {
                "name": "toy",
                "family": "sd-v1",
                "source": "shipped:toy",
                "digest": "d" * 64,
            },
            "outcome": "ok",
            "message": "",
            "pixels": "p" * 64,
            "safety": verdict.model_dump(mode="json") if self.flag else None,
        }
        image = Image.new("RGB", (32, 32), "black" if self.flag else "blue")
        made = ImageResult(image, request.seed or 0, Outcome.ok, request, metadata=record)
        return provenance.encode(made)

    def cancel(self, name: str) -> None:
        if self.looks[int(name.removeprefix("job-"))] < STEPS and name not in self.cancelled:
            self.cancelled.append(name)


class Broken(SafelightError):
    """A failure on purpose."""
