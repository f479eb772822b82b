"""A hosted space: the web page of Safelight with its shipped models.

The host runs this file and sends visitors to port 7860. ``SAFELIGHT_MODELS`` names other models
(shipped names, hub ids, folders), separated by commas; ``SAFELIGHT_CHECKER`` a safety checker for
all of them; ``SAFELIGHT_API_KEY`` a key to sign in with.
"""

from __future__ import annotations

import os

import uvicorn

from safelight.cli import ui
from safelight.serve.app import create_app
from safelight.serve.house import Settings

ui.need()


def names(variable: str) -> tuple[str, ...]:
    """What a variable lists."""
    found = (name.strip() for name in os.environ.get(variable, "").split(","))
    return tuple(name for name in found if name)


# Small limits: strangers share this machine.
settings = Settings(
    models=names("SAFELIGHT_MODELS") or tuple(ui.everything()),
    safety_checker=os.environ.get("SAFELIGHT_CHECKER") or None,
    api_keys=names("SAFELIGHT_API_KEY"),
    max_pixels=1024 * 1024,
    max_steps=150,
    max_count=4,
    max_prompt=2000,
    max_body=16 * 2**20,
    queue_seconds=300,
)
app = ui.with_page(create_app(settings))

if __name__ == "__main__":
    uvicorn.run(
        app,
        host=os.environ.get("HOST", "0.0.0.0"),
        port=int(os.environ.get("PORT", "7860")),
        log_level="warning",
        proxy_headers=True,
        forwarded_allow_ips="*",
        timeout_graceful_shutdown=3,
    )
