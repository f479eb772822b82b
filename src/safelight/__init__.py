"""Safelight: the Stable Diffusion family as one program.

Public names are resolved lazily (PEP 562), so that ``import safelight`` costs nothing and
imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "safelight.generate",
    "save": "safelight.provenance",
    "Generator": "safelight.generate",
    "GenerateRequest": "safelight.request",
    "ImageResult": "safelight.request",
    "Outcome": "safelight.request",
    "SafelightError": "safelight.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'safelight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
