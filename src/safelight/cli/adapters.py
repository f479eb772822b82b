"""``--lora FILE:0.8`` and its kin, as the commands read them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safelight.request import GenerateRequest
from safelight.store.registry import Registry, scaled, worded

__all__ = ["folders", "scaled", "worded"]


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
