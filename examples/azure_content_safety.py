"""Moderation by Azure AI Content Safety, before and after generation.

    export CONTENT_SAFETY_ENDPOINT=https://NAME.cognitiveservices.azure.com
    export CONTENT_SAFETY_KEY=...
    python examples/azure_content_safety.py "a red cube on top of a blue sphere"

Prompts and pictures leave this machine. The service asks for pictures of at least 50 pixels a side.
Only the standard library is used; another service is another class with these two methods.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import urllib.request
from collections.abc import Mapping
from typing import Any

from PIL import Image

import safelight
from safelight.safety import ONLINE, Moderation

VERSION = "2024-09-01"
NAMES = {"Hate": "hate", "SelfHarm": "self_harm", "Sexual": "sexual", "Violence": "violence"}


class AzureContentSafety:
    """The service's two questions. Errors are raised: :class:`Moderation` removes the item then."""

    def __init__(self, endpoint: str, key: str, timeout: float = 8.0) -> None:
        if not endpoint.startswith("https://"):
            raise ValueError("the endpoint must be an https address: the key travels in a header")
        self.endpoint, self.timeout = endpoint.rstrip("/"), timeout
        self._key = key

    def prompt(self, text: str) -> dict[str, int]:
        # Eight severities for text; a text may have 10,000 characters.
        parts = [text[start : start + 10_000] for start in range(0, len(text), 10_000)]
        answers = [
            self._ask("text", {"text": part, "outputType": "EightSeverityLevels"}) for part in parts
        ]
        return {name: max(answer[name] for answer in answers) for name in answers[0]}

    def picture(self, image: Image.Image) -> dict[str, int]:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        content = base64.b64encode(buffer.getvalue()).decode()
        # Four severities (0, 2, 4, 6) are all there are for pictures.
        return self._ask("image", {"image": {"content": content}})

    def _ask(self, kind: str, body: Mapping[str, Any]) -> dict[str, int]:
        request = urllib.request.Request(
            f"{self.endpoint}/contentsafety/{kind}:analyze?api-version={VERSION}",
            data=json.dumps({"categories": list(NAMES), **body}).encode(),
            headers={"Ocp-Apim-Subscription-Key": self._key, "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            return severities(json.load(response))


def severities(answer: Mapping[str, Any]) -> dict[str, int]:
    """The service's ``categoriesAnalysis`` as Safelight's categories."""
    return {NAMES[row["category"]]: row["severity"] for row in answer["categoriesAnalysis"]}


def main() -> None:
    """Generate with moderation, and say what happened."""
    service = AzureContentSafety(
        os.environ["CONTENT_SAFETY_ENDPOINT"], os.environ["CONTENT_SAFETY_KEY"]
    )
    model = safelight.load("tiny", moderation=Moderation(service, threshold=ONLINE))
    (result,) = model.generate(sys.argv[1])
    print(result.outcome, result.message)
    if result.image is not None:
        safelight.save(result, "picture.png")


if __name__ == "__main__":
    main()
