"""AzureML's online scoring, as the SD v1-5 card's samples call it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request

from safelight.errors import InvalidRequest
from safelight.request import GenerateRequest, Outcome
from safelight.serve import wire
from safelight.serve.dialects import house_of, json_body, shown, submitted, unknown, waited

router = APIRouter(tags=["azureml"])


@router.post("/score")
async def score(request: Request) -> list[dict[str, Any]]:
    """One picture a prompt: JPEG in base64, black where it was flagged."""
    house = house_of(request)
    requests = read(await json_body(request))
    limit = house.settings.max_count
    if len(requests) > limit:
        raise InvalidRequest("input_data.data", f"holds {len(requests)} prompts, over {limit}.")
    results = shown(await waited(request, await submitted(request, requests)))
    return [
        {
            "prompt": asked.prompt,
            "generated_image": "" if result.image is None else wire.encoded(result, "JPEG"),
            "nsfw_content_detected": bool(result.nsfw) or result.outcome is Outcome.rejected,
        }
        for asked, result in zip(requests, results, strict=True)
    ]


def read(body: Mapping[str, Any]) -> list[GenerateRequest]:
    """Requests from the sample's form; ``data`` may hold strings or rows of one string.

    Raises:
        InvalidRequest: naming what is wrong, by its path in the body.
    """
    unknown(body, {"input_data", "params"})
    data = body.get("input_data")
    if not isinstance(data, Mapping):
        raise InvalidRequest("input_data", "is missing.", "See the model card's sample request.")
    unknown(data, {"columns", "data", "index", "parameters"})
    columns = data.get("columns", ["prompt"])
    if columns != ["prompt"]:
        raise InvalidRequest("input_data.columns", f"must be ['prompt'], not {columns!r}.")
    rows = data.get("data")
    if not isinstance(rows, list) or not rows:
        raise InvalidRequest("input_data.data", "must be a list of prompts.")
    parameters = data.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise InvalidRequest("input_data.parameters", "must be an object.")
    unknown(parameters, {"num_inference_steps", "guidance_scale"})
    requests = []
    for place, row in enumerate(rows):
        prompt = row[0] if isinstance(row, list) and len(row) == 1 else row
        if not isinstance(prompt, str):
            raise InvalidRequest(f"input_data.data[{place}]", "must be a prompt.")
        requests.append(GenerateRequest.from_kwargs(prompt=prompt, **parameters))
    return requests


def error(message: str, field: str) -> dict[str, Any]:
    """As a scoring endpoint answers."""
    return {"message": message, "field": field or None}
