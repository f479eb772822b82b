"""AzureML's scoring contract, as the SD v1-5 card has it: what a request and an answer look like.

Shared by the HTTP route (:mod:`safelight.serve.dialects.azureml`), the score script
(:mod:`safelight.serve.score`) and the batch entry (:mod:`safelight.serve.score_batch`), so that a
prompt is answered alike by all three. No FastAPI here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safelight.errors import InvalidRequest, ModelNotFound, SafelightError
from safelight.generate import Generator, load
from safelight.model import Model
from safelight.names import DEFAULT_MODEL
from safelight.request import GenerateRequest, ImageResult, Outcome
from safelight.safety import Moderation
from safelight.safety.azure import ENDPOINT, KEY, from_environment
from safelight.serve import wire

PARAMETERS = ("num_inference_steps", "guidance_scale")
"""All that the card supports, with its defaults 50 and 7.5 (the model's own here)."""
SAMPLE: dict[str, Any] = {
    "input_data": {
        "columns": ["prompt"],
        "data": [
            "a photograph of an astronaut riding a horse",
            "lion holding hunted deer in grass fields",
        ],
        "index": [0, 1],
        "parameters": {"num_inference_steps": 50, "guidance_scale": 7.5},
    }
}
"""The card's sample input."""


def read(body: Mapping[str, Any]) -> list[GenerateRequest]:
    """Requests from the sample's form; ``data`` may hold strings or rows of one string.

    Raises:
        InvalidRequest: naming what is wrong, by its path in the body.
    """
    _known(body, ("input_data",))
    data = body.get("input_data")
    if not isinstance(data, Mapping):
        raise InvalidRequest("input_data", "is missing.", "See the model card's sample request.")
    _known(data, ("columns", "data", "index", "parameters"))
    columns = data.get("columns", ["prompt"])
    if columns != ["prompt"]:
        raise InvalidRequest("input_data.columns", f"must be ['prompt'], not {columns!r}.")
    rows = data.get("data")
    if not isinstance(rows, list) or not rows:
        raise InvalidRequest("input_data.data", "must be a list of prompts.")
    index = data.get("index")
    if index is not None and (not isinstance(index, list) or len(index) != len(rows)):
        raise InvalidRequest("input_data.index", "must number the prompts, one by one.")
    parameters = data.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise InvalidRequest("input_data.parameters", "must be an object.")
    _known(parameters, PARAMETERS)
    requests = []
    for place, row in enumerate(rows):
        prompt = row[0] if isinstance(row, list) and len(row) == 1 else row
        if not isinstance(prompt, str):
            raise InvalidRequest(f"input_data.data[{place}]", "must be a prompt.")
        requests.append(asked(f"input_data.data[{place}]", prompt, parameters))
    return requests


def asked(where: str, prompt: str, parameters: Mapping[str, Any], **more: Any) -> GenerateRequest:
    """A request for one prompt.

    Args:
        where: of the prompt, for messages.
        parameters: of :data:`PARAMETERS`.
        more: further fields of the request.

    Raises:
        InvalidRequest: naming the parameter as the caller wrote it.
    """
    try:
        return GenerateRequest.from_kwargs(prompt=prompt, **parameters, **more)
    except InvalidRequest as error:
        if error.field != "prompt":
            raise
        raise InvalidRequest("prompt", f"({where}) {error.problem}", error.fix) from None


def _known(fields: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in fields:
        if name not in known:
            raise InvalidRequest(str(name), "is not supported.", f"Known: {', '.join(known)}.")


def rows(
    requests: Sequence[GenerateRequest], results: Sequence[ImageResult]
) -> list[Any] | dict[str, Any]:
    """The card's answer: a row a prompt, in order.

    A flagged picture is wholly black. One that content safety removed is an empty string; where
    every prompt was removed the answer is ``{}``. Both are as the published scripts have it.

    Raises:
        SafelightError: a picture could not be made.
    """
    made = [row(request.prompt, result) for request, result in zip(requests, results, strict=True)]
    refused = [any(m.item == "prompt" and m.removed for m in r.moderation) for r in results]
    return {} if made and all(refused) else made


def row(prompt: str, result: ImageResult) -> dict[str, Any]:
    """One row of the answer: JPEG in base64."""
    encoded = "" if missing(result) else wire.encoded(result, "JPEG")
    return {
        "prompt": prompt,
        "generated_image": encoded,
        "nsfw_content_detected": detected(result),
    }


def missing(result: ImageResult) -> bool:
    """Whether the picture was removed.

    Raises:
        SafelightError: it is not there for another reason, which asking again will not change.
    """
    if result.image is None and result.outcome is not Outcome.rejected:
        raise SafelightError(f"{result.outcome}: {result.message}")
    return result.image is None


def detected(result: ImageResult) -> bool:
    """``nsfw_content_detected``: flagged by the checker, or removed."""
    return bool(result.nsfw) or result.outcome is Outcome.rejected


# -- a model for scoring --------------------------------------------------------------------------


def checked(model: Model, *, without_checker: bool) -> None:
    """Refuse to answer ``nsfw_content_detected`` for a model at which nobody looks.

    Raises:
        InvalidRequest: the model has no safety checker and nobody said that it may have none.
    """
    if model.checker is None and not without_checker:
        raise InvalidRequest(
            "safety_checker",
            f"{model.spec.name} has none, and AzureML's answer says of every picture whether"
            " it was flagged.",
            "Attach one: --safety-checker PATH (SAFELIGHT_SAFETY_CHECKER). Or say that pictures"
            " are not checked: --without-checker (SAFELIGHT_WITHOUT_CHECKER=1).",
        )


def from_azure(threshold: int) -> Generator:
    """The model that the environment names, for :func:`init` of a score script.

    ``AZUREML_MODEL_DIR`` holds it; ``SAFELIGHT_MODEL`` names it instead (a shipped name, a path,
    or a folder inside). ``SAFELIGHT_DEVICE``, ``SAFELIGHT_DTYPE``, ``SAFELIGHT_SAFETY_CHECKER`` and
    ``SAFELIGHT_WITHOUT_CHECKER`` are options of ``safelight serve``; ``CONTENT_SAFETY_ENDPOINT``
    and ``CONTENT_SAFETY_KEY`` switch moderation on.

    Args:
        threshold: of moderation, where the environment gives none.

    Raises:
        ModelNotFound, WeightsError, InvalidRequest: with what to do about it.
    """
    given = {name: os.environ.get(name, "").strip() or None for name in (ENDPOINT, KEY)}
    moderation: Moderation | None = from_environment(threshold) if any(given.values()) else None
    option = {
        name: os.environ.get(f"SAFELIGHT_{name.upper()}", "").strip() or None
        for name in ("model", "device", "dtype", "safety_checker", "without_checker")
    }
    generator = load(
        _model(option["model"]),
        option["device"],
        option["dtype"],
        moderation=moderation,
        safety_checker=option["safety_checker"],
        local_only=True,
    )
    without = option["without_checker"] not in (None, "0", "false")
    checked(generator.model, without_checker=without)
    return generator


def _model(name: str | None) -> str | Path:
    folder = os.environ.get("AZUREML_MODEL_DIR", "").strip()
    if not folder:
        return name or DEFAULT_MODEL
    if name is None:
        return find_model(Path(folder))
    inside = Path(folder) / name
    return inside if inside.exists() else name


def find_model(folder: Path) -> Path:
    """The one model in a folder that AzureML mounted, where it may lie some folders down.

    Raises:
        ModelNotFound: there is none, or several.
    """
    found = sorted({path.parent for path in folder.rglob("model_index.json")})
    if not found:
        endings = (".safetensors", ".ckpt")
        found = sorted(path for path in folder.rglob("*") if path.suffix in endings)
    if len(found) == 1:
        return found[0]
    told = ", ".join(str(path.relative_to(folder)) for path in found[:5]) or "no model_index.json"
    raise ModelNotFound(
        f"AZUREML_MODEL_DIR {folder} should hold one model, and holds {told}."
        " Name it: SAFELIGHT_MODEL, a path inside."
    )
