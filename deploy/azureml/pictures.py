"""The pictures of an endpoint's answer, as files: python pictures.py answer.json"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path


def main(path: str) -> None:
    """Write ``picture-0.jpg`` and so on beside the answer."""
    answer = json.loads(Path(path).read_text(encoding="utf-8"))
    if isinstance(answer, str):  # `az ml … invoke` quotes it once more
        answer = json.loads(answer)
    for place, row in enumerate(answer or []):
        flagged = " (flagged: black)" if row["nsfw_content_detected"] else ""
        if not row["generated_image"]:
            print(f"{place}: removed by content safety")
            continue
        target = Path(path).with_name(f"picture-{place}.jpg")
        target.write_bytes(base64.b64decode(row["generated_image"]))
        print(f"{target}{flagged}")


if __name__ == "__main__":
    main(sys.argv[1])
