"""Azure AI Content Safety as a :class:`~safelight.safety.moderation.Moderator`, by its REST API.

The standard library alone; another service is another class with these two methods. Prompts and
pictures leave this machine.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from PIL import Image

from safelight.errors import InvalidRequest, SafelightError
from safelight.safety.moderation import Moderation

VERSION = "2024-09-01"
NAMES = {"Hate": "hate", "SelfHarm": "self_harm", "Sexual": "sexual", "Violence": "violence"}
"""The service's categories, and ours."""
CHARACTERS = 10_000
"""Most in one text that the service reads; a longer prompt is asked about in parts."""
SMALLEST, LARGEST = 50, 2048
"""Sides of the pictures that the service looks at; others are resized to be looked at."""

ENDPOINT, KEY, THRESHOLD = (
    "CONTENT_SAFETY_ENDPOINT",
    "CONTENT_SAFETY_KEY",
    "CONTENT_SAFETY_THRESHOLD",
)
"""Names that the published samples give the settings in the environment."""


class AzureContentSafety:
    """The service's two questions. Errors are raised: :class:`Moderation` removes the item then.

    Args:
        endpoint: ``https://NAME.cognitiveservices.azure.com``. Plain http only to this machine:
            the key travels in a header.
        timeout: seconds for one question, waiting for a busy service included.
    """

    def __init__(self, endpoint: str, key: str, timeout: float = 8.0) -> None:
        parts = urllib.parse.urlsplit(endpoint)
        here = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if parts.scheme != "https" and not (parts.scheme == "http" and here):
            fix = "An https address: the key travels in a header."
            raise InvalidRequest(ENDPOINT, f"is not one that may see a key: {endpoint!r}.", fix)
        if not key.strip():
            raise InvalidRequest(KEY, "is empty.", "The resource's page has two; either does.")
        self.endpoint, self.timeout, self._key = endpoint.rstrip("/"), timeout, key.strip()
        self._opener = urllib.request.build_opener(_NoRedirects)

    def prompt(self, text: str) -> dict[str, int]:
        """Severities 0 to 7 by category, the worst of a long prompt's parts."""
        starts = range(0, max(1, len(text)), CHARACTERS)
        parts = [text[start : start + CHARACTERS] for start in starts]
        answers = [
            self._ask("text", {"text": part, "outputType": "EightSeverityLevels"})
            for part in parts
            if part.strip()
        ]
        return {name: max((a[name] for a in answers), default=0) for name in NAMES.values()}

    def picture(self, image: Image.Image) -> dict[str, int]:
        """Severities 0, 2, 4 or 6 by category: there are no others for pictures."""
        buffer = io.BytesIO()
        _seen(image).save(buffer, format="PNG")
        content = base64.b64encode(buffer.getvalue()).decode()
        return self._ask("image", {"image": {"content": content}})

    def _ask(self, kind: str, body: Mapping[str, Any]) -> dict[str, int]:
        request = urllib.request.Request(
            f"{self.endpoint}/contentsafety/{kind}:analyze?api-version={VERSION}",
            data=json.dumps({"categories": list(NAMES), **body}).encode(),
            headers={"Ocp-Apim-Subscription-Key": self._key, "Content-Type": "application/json"},
        )
        end = time.monotonic() + self.timeout
        while True:
            left = max(0.1, end - time.monotonic())
            try:
                with self._opener.open(request, timeout=left) as response:
                    return severities(json.load(response))
            except urllib.error.HTTPError as error:
                wait = _patience(error)
                if wait is None or time.monotonic() + wait > end:
                    # The body may quote the prompt; the number says what is to be known.
                    raise Unavailable(f"content safety answered {error.code}") from None
                time.sleep(wait)


class Unavailable(SafelightError):
    """The service did not judge."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key elsewhere."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _patience(error: urllib.error.HTTPError) -> float | None:
    """Seconds to wait before asking again; None where asking again is useless."""
    if error.code != 429 and error.code < 500:
        return None
    try:
        return max(0.05, float(error.headers.get("retry-after", "0.5")))
    except ValueError:
        return 0.5


def _seen(image: Image.Image) -> Image.Image:
    """In a size that the service takes, by its own shape as far as that goes."""
    image = image.convert("RGB")
    shrink = min(1.0, LARGEST / max(image.size))
    sides = [min(LARGEST, max(SMALLEST, round(side * shrink))) for side in image.size]
    grow = max(SMALLEST / min(image.size), 1.0)
    if grow > 1 and max(image.size) * grow <= LARGEST:
        sides = [max(SMALLEST, round(side * grow)) for side in image.size]
    if (sides[0], sides[1]) == image.size:
        return image
    return image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)


def severities(answer: Mapping[str, Any]) -> dict[str, int]:
    """The service's ``categoriesAnalysis`` as Safelight's categories."""
    return {NAMES[row["category"]]: row["severity"] for row in answer["categoriesAnalysis"]}


def from_environment(threshold: int, environment: Mapping[str, str] | None = None) -> Moderation:
    """Moderation as :data:`ENDPOINT`, :data:`KEY` and :data:`THRESHOLD` say.

    Args:
        threshold: where the environment gives none: ``ONLINE`` or ``BATCH``.

    Raises:
        InvalidRequest: the first of them that is missing or wrong.
    """
    given = os.environ if environment is None else environment
    for name in (ENDPOINT, KEY):
        if not given.get(name, "").strip():
            raise InvalidRequest(name, "is not set.", "Content safety needs it in the environment.")
    level = given.get(THRESHOLD, "").strip() or str(threshold)
    if not level.isdigit():
        raise InvalidRequest(THRESHOLD, f"must be 0 to 7, not {level!r}.")
    service = AzureContentSafety(given[ENDPOINT].strip(), given[KEY])
    try:
        return Moderation(service, threshold=int(level))
    except InvalidRequest as error:
        raise InvalidRequest(THRESHOLD, error.problem, error.fix) from None
