"""Trained parts, read from the folders that training writes, and the features they give.

A run's folder holds a spec and its weights (``vision.json``, ``vision.safetensors``); shipped
models are loaded by :mod:`safelight.model` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from safelight.evaluate.judge import resized
from safelight.nets.clip import TextTower, VisionTower
from safelight.nets.vae import VAE, to_uint8
from safelight.parts import clip_normalised
from safelight.text.tokenizer import Tokenizer

Pictures = np.ndarray
"""uint8 ``(N, H, W, 3)``."""
Features = Callable[[Pictures], np.ndarray]
"""Pictures to float ``(N, D)``."""


def clip_features(tower: VisionTower, *, projected: bool = False, batch: int = 64) -> Features:
    """The features that a vision tower gives.

    Args:
        projected: the image embedding; else the pooled state before the projection.
        batch: pictures at a time.

    Returns:
        a function from pictures of any size to float32 ``(N, D)``.
    """
    weight = next(tower.parameters())

    @torch.inference_mode()
    def features(pictures: Pictures) -> np.ndarray:
        parts = []
        for start in range(0, len(pictures), batch):
            pixels = resized(pictures[start : start + batch], tower.spec.image_size)
            out = tower(clip_normalised(pixels).to(weight))
            parts.append((out.embedding if projected else out.pooled).float().cpu().numpy())
        width = tower.spec.projection_width if projected else tower.spec.width
        return np.concatenate(parts) if parts else np.empty((0, width), np.float32)

    return features


def autoencode(vae: VAE, batch: int = 32) -> Callable[[Pictures], Pictures]:
    """Pictures there and back through the autoencoder: the ceiling of anything it decodes."""

    weight = next(vae.parameters())

    @torch.inference_mode()
    def there_and_back(pictures: Pictures) -> Pictures:
        parts = []
        for start in range(0, len(pictures), batch):
            x = torch.from_numpy(np.ascontiguousarray(pictures[start : start + batch]))
            x = x.permute(0, 3, 1, 2).float() / 127.5 - 1.0
            latents = vae.encode(x.to(weight)).mean * vae.spec.scaling_factor
            parts.append(to_uint8(vae.decode(latents)).cpu().numpy())
        return np.concatenate(parts)

    return there_and_back


def batched(pictures: Pictures, size: int = 256) -> Iterable[Pictures]:
    """Consecutive parts of a set, read from the disk one at a time where it is mapped."""
    for start in range(0, len(pictures), size):
        yield np.array(pictures[start : start + size])


def context(tower: TextTower, tokenizer: Tokenizer, prompts: list[str]) -> Tensor:
    """Unpooled text states ``(N, L, width)``."""
    with torch.inference_mode():
        return tower(torch.tensor(tokenizer.tokens(prompts))).states
