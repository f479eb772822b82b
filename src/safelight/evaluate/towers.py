"""Trained parts, read from the folders that training writes, and the features they give.

A run's folder holds a spec and its weights (``vision.json``, ``vision.safetensors``); shipped
models are loaded by :mod:`safelight.model` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from safelight.errors import WeightsError
from safelight.evaluate.judge import resized
from safelight.nets.clip import TextTower, VisionTower
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE, to_uint8
from safelight.spec import Record, ScheduleSpec, TextSpec, UNetSpec, VAESpec, VisionSpec
from safelight.store.weights import load_into, read_weights
from safelight.text.tokenizer import Tokenizer

# Normalisation of every published CLIP's pictures (Radford et al. 2021, the authors' code).
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)

Spec = TypeVar("Spec", bound=Record)
Module = TypeVar("Module", bound=nn.Module)

Pictures = np.ndarray
"""uint8 ``(N, H, W, 3)``."""
Features = Callable[[Pictures], np.ndarray]
"""Pictures to float ``(N, D)``."""


def load_text(folder: Path) -> tuple[TextTower, Tokenizer]:
    """Text tower and tokenizer of a CLIP's folder."""
    tower = TextTower(_spec(folder / "text.json", TextSpec))
    return _filled(tower, folder / "text.safetensors"), Tokenizer.from_folder(folder / "tokenizer")


def load_vision(folder: Path) -> VisionTower:
    """Vision tower of a CLIP's folder."""
    tower = VisionTower(_spec(folder / "vision.json", VisionSpec))
    return _filled(tower, folder / "vision.safetensors")


def load_vae(folder: Path) -> VAE:
    """Autoencoder of a run's folder."""
    return _filled(VAE(_spec(folder / "vae.json", VAESpec)), folder / "vae.safetensors")


def load_unet(folder: Path) -> tuple[UNet, ScheduleSpec]:
    """UNet and schedule of a run's folder."""
    unet = _filled(UNet(_spec(folder / "unet.json", UNetSpec)), folder / "unet.safetensors")
    return unet, _spec(folder / "schedule.json", ScheduleSpec)


def clip_features(tower: VisionTower, *, projected: bool = False, batch: int = 64) -> Features:
    """The features that a vision tower gives.

    Args:
        projected: the image embedding; else the pooled state before the projection.
        batch: pictures at a time.

    Returns:
        a function from pictures of any size to float32 ``(N, D)``.
    """
    mean, std = (torch.tensor(v)[:, None, None] for v in (_MEAN, _STD))
    weight = next(tower.parameters())

    @torch.inference_mode()
    def features(pictures: Pictures) -> np.ndarray:
        parts = []
        for start in range(0, len(pictures), batch):
            pixels = resized(pictures[start : start + batch], tower.spec.image_size)
            out = tower(((pixels / 2 + 0.5 - mean) / std).to(weight))
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


def _spec(file: Path, kind: type[Spec]) -> Spec:
    try:
        return kind.model_validate_json(file.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(file, f"is no {kind.__name__}: {error}") from error


def _filled(module: Module, file: Path) -> Module:
    load_into(module, read_weights(file), dtype=torch.float32)
    return module.eval()
