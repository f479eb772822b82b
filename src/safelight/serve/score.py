"""AzureML's score script: ``init()`` once, then ``run(raw_data)`` for every request.

    from safelight.serve.score import init, run

AzureML finds both by name in a module, and so the model is kept here between the calls.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from safelight.errors import InvalidRequest, SafelightError
from safelight.generate import Generator
from safelight.safety import ONLINE
from safelight.serve import scoring

log = logging.getLogger(__name__)
_held: list[Generator] = []
MOST = 64
"""Prompts of one request; more belong to a batch endpoint."""


def init() -> None:
    """Load the model that the environment names; see :func:`scoring.from_azure`."""
    _held[:] = [scoring.from_azure(ONLINE)]


def run(raw_data: str | bytes | dict[str, Any]) -> Any:
    """Answer the card's sample request in the card's form.

    Args:
        raw_data: the body as AzureML hands it over: text, or what it was parsed into.

    Returns:
        rows, ready to become JSON; or, on AzureML's server, a response with the status 400 and
        ``{"message", "field"}`` where the request is wrong.

    Raises:
        InvalidRequest: the same, anywhere else.
        SafelightError: a picture could not be made.
    """
    if not _held:
        raise SafelightError("init() comes first.")
    try:
        requests = scoring.read(_body(raw_data))
        if len(requests) > MOST:
            problem = f"holds {len(requests)} prompts, over {MOST}."
            raise InvalidRequest("input_data.data", problem, "Use a batch endpoint.")
        results = _held[0].generate(request=requests)
    except InvalidRequest as error:
        return _refused(error)
    return scoring.rows(requests, results)


def _body(raw: str | bytes | dict[str, Any]) -> dict[str, Any]:
    if isinstance(raw, dict):
        return raw
    try:
        body = json.loads(raw)
    except (ValueError, TypeError, RecursionError):
        raise InvalidRequest("body", "is not JSON.") from None
    if not isinstance(body, dict):
        raise InvalidRequest("body", "is not a JSON object.")
    return body


def _refused(error: InvalidRequest) -> Any:
    try:
        from azureml_inference_server_http.api.aml_response import (  # pyright: ignore
            AMLResponse,
        )
    except ModuleNotFoundError:
        raise error from None
    return AMLResponse({"message": str(error), "field": error.field}, 400, json_str=True)
