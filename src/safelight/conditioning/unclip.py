"""unCLIP: a noised picture embedding, and how much noise, as the UNet's class vector.

Ramesh et al. 2022, section 2.1; the augmentation is that of Stability's ``noise_augmentor``. The
embedding is normalised by the model's statistics, noised on a squared-cosine schedule, brought
back, and followed by the sinusoid of the noise level. The unconditional twin is all zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.diffusion.prediction import noised
from safelight.diffusion.schedule import Schedule
from safelight.nets.layers import sinusoid
from safelight.presets import NOISE_AUGMENTATION

if TYPE_CHECKING:
    from safelight.model import Model


def class_vector(model: Model, embedding: Tensor, level: int, noise: Tensor) -> Tensor:
    """The class vector of a picture embedding.

    Args:
        embedding: ``(D,)``, not normalised.
        level: 0..999. 0 is not free of noise: 0.0064 of it stays.
        noise: unit normal, ``(D,)``.

    Returns:
        ``(2 D,)``: the noised embedding, then the level.
    """
    schedule = Schedule.from_spec(model.spec.noising or NOISE_AUGMENTATION)
    mean, std = statistics(model, embedding)
    noise = noise.to(embedding)
    z = noised((embedding - mean) / std, noise, schedule.abar(level))
    told = sinusoid(torch.tensor([level], device=embedding.device), len(embedding))[0]
    return torch.cat([z * std + mean, told])


def statistics(model: Model, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread ``(D,)`` of the embeddings that the model was trained on."""
    if model.normaliser is None:
        return torch.zeros_like(like), torch.ones_like(like)
    mean, std = (row.flatten().to(like) for row in model.normaliser)
    return mean, std
