"""AzureML's online scoring, as the SD v1-5 card's samples call it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from safelight.errors import InvalidRequest
from safelight.serve import scoring
from safelight.serve.dialects import house_of, json_body, schemas, submitted, waited

router = APIRouter(tags=["azureml"])

_BODY = schemas.object_of(
    {
        "input_data": schemas.object_of(
            {
                "columns": {"const": ["prompt"], "description": "What `data` holds."},
                "data": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "anyOf": [
                            {"type": "string", "minLength": 1},
                            {
                                "type": "array",
                                "items": {"type": "string"},
                                "minItems": 1,
                                "maxItems": 1,
                            },
                        ]
                    },
                    "description": "Prompts, or rows of one prompt.",
                },
                "index": {"type": "array", "description": "Numbers the prompts; not used."},
                "parameters": schemas.object_of(
                    {
                        "num_inference_steps": schemas.number("integer", 1, 512),
                        "guidance_scale": schemas.number("number", 0, 1000),
                    }
                ),
            },
            required=("data",),
        )
    },
    required=("input_data",),
)
_ERROR = schemas.object_of(
    {"message": {"type": "string"}, "field": {"type": ["string", "null"]}},
    required=("message", "field"),
)
_SMALL = {
    "input_data": {
        "columns": ["prompt"],
        "data": ["a red cube on top of a blue sphere"],
        "index": [0],
        "parameters": {"num_inference_steps": 8},
    }
}


@router.post(
    "/score",
    summary="Score prompts",
    openapi_extra=schemas.body(_BODY, {"card": scoring.SAMPLE, "small": _SMALL}),
    responses=schemas.errors(_ERROR),
)
async def score(request: Request) -> Any:
    """One picture a prompt: JPEG in base64, black where it was flagged."""
    house = house_of(request)
    requests = scoring.read(await json_body(request))
    limit = house.settings.max_count
    if len(requests) > limit:
        raise InvalidRequest("input_data.data", f"holds {len(requests)} prompts, over {limit}.")
    results = await waited(request, await submitted(request, requests))
    return scoring.rows(requests, results)


def error(message: str, field: str) -> dict[str, Any]:
    """As a scoring endpoint answers."""
    return {"message": message, "field": field or None}
