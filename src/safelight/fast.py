"""Presets of the fast modes: what ``fast=1``, ``2`` and ``3`` stand for. No torch.

A preset is a table of request fields. It fills in those that were not given, where the model has a
use for them, and is gone before anything runs: a picture's metadata names the fields. What each
costs in quality is measured (docs/fast.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelight.spec import ModelSpec

if TYPE_CHECKING:
    from safelight.request import GenerateRequest

PRESETS: dict[int, dict[str, Any]] = {
    1: {"steps": 15, "sampler": "dpm++2m", "guidance_until": 0.8},
    2: {
        **{"steps": 10, "sampler": "dpm++2m", "schedule": "ays"},
        **{"guidance_until": 0.7, "decoder": "tiny"},
    },
    3: {
        **{"steps": 8, "sampler": "dpm++2m", "schedule": "ays"},
        **{"guidance_until": 0.5, "decoder": "tiny", "block_cache": 2},
    },
}
"""By strength: nearly free, a little dearer, the strongest that a model does without a student."""


def expanded(request: GenerateRequest, spec: ModelSpec) -> dict[str, Any]:
    """The fields that a request's preset fills in on a model.

    A student (a model with guidance built in, of few steps) is fast already: its own steps and
    sampler stay, and there is no guidance to drop.
    """
    wanted = dict(PRESETS[request.fast]) if request.fast else {}
    if spec.unet.guidance_embedding_size:
        for name in ("steps", "sampler", "schedule", "guidance_until", "block_cache"):
            wanted.pop(name, None)
    if request.sampler is not None or request.schedule is not None:
        # Steps are spaced for a sampler: whoever names either has both.
        wanted.pop("sampler", None)
        wanted.pop("schedule", None)
    if wanted.get("schedule") and spec.schedule.fitted:
        wanted["schedule"] = "fitted"
    elif spec.schedule.steps != 1000:  # where the published steps mean nothing
        wanted.pop("schedule", None)
    if spec.tiny_decoder is None:
        wanted.pop("decoder", None)
    return {name: value for name, value in wanted.items() if getattr(request, name) is None}
