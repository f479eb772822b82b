"""Moderation by Azure AI Content Safety, before and after generation.

    export CONTENT_SAFETY_ENDPOINT=https://NAME.cognitiveservices.azure.com
    export CONTENT_SAFETY_KEY=...
    python examples/azure_content_safety.py "a red cube on top of a blue sphere"

Prompts and pictures leave this machine. Another service is another class with the two methods of
:class:`safelight.safety.azure.AzureContentSafety`.
"""

from __future__ import annotations

import sys

import safelight
from safelight.safety import ONLINE
from safelight.safety.azure import from_environment


def main() -> None:
    """Generate with moderation, and say what happened."""
    model = safelight.load("tiny", moderation=from_environment(ONLINE))
    (result,) = model.generate(sys.argv[1])
    print(result.outcome, result.message)
    if result.image is not None:
        safelight.save(result, "picture.png")


if __name__ == "__main__":
    main()
