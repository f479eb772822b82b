"""``--lora FILE:0.8`` and its kin, as the commands read them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safelight.errors import InvalidRequest
from safelight.request import GenerateRequest
from safelight.store.registry import ENDINGS, Registry


def scaled(texts: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """``FILE``, ``FILE:0.8`` and names, to (name, scale)."""
    return tuple(_scaled(text) for text in texts)


def _scaled(text: str) -> tuple[str, float]:
    name, colon, tail = text.rpartition(":")
    try:
        return (name, float(tail)) if colon else (text, 1.0)
    except ValueError:
        if "\\" in tail or "/" in tail or tail.endswith(ENDINGS):
            return text, 1.0  # C:\\style.safetensors
        raise InvalidRequest("lora", f"{tail!r} is not a number.", "Write FILE:0.8.") from None


def worded(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """``FILE``, ``FILE:WORD`` and names, to (name, word)."""
    return tuple(_worded(text) for text in texts)


def _worded(text: str) -> tuple[str, str]:
    name, colon, tail = text.rpartition(":")
    if not colon or "\\" in tail or "/" in tail or tail.endswith(ENDINGS):
        return text, ""
    return name, tail


def folders(
    lora_dir: Sequence[Path] | None,
    embedding_dir: Sequence[Path] | None,
    request: GenerateRequest | None = None,
) -> dict[str, Registry]:
    """Registries for :func:`safelight.generate.load`; a name that is in none fails here, early."""
    loras = Registry(lora_dir)
    embeddings = Registry(embedding_dir, kind="embedding", option="--embedding-dir")
    if request is not None:
        for name, _ in request.loras:
            loras.find(name, "lora")
        for name, _ in request.embeddings:
            embeddings.find(name, "embedding")
    return {"lora_dir": loras, "embedding_dir": embeddings}
