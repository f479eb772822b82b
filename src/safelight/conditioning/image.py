"""Pictures as a model reads them: as latents to start from, and as CLIP embeddings.

Rombach et al. 2022, section 3.1 (the autoencoder's posterior); Pinkney 2022, image variations (one
CLIP picture embedding, projected and not normalised, is the only token; zeros are its
unconditional twin).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from safelight.conditioning.slots import Conditioning
from safelight.nets.vae import Posterior
from safelight.spec import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from safelight.model import Model


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture as ``(1, 3, H, W)`` in [-1, 1]."""
    values = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32).copy())
    return (values / 127.5 - 1).permute(2, 0, 1)[None].contiguous()


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """``image`` in a size, squeezed where its shape is another one."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def posterior(model: Model, pixels: Tensor) -> Posterior:
    """What the autoencoder sees in ``(1, 3, H, W)`` pixels in [-1, 1], in float32."""
    weight = next(model.vae.parameters())
    seen = model.runtime.encode(pixels.to(weight.device, weight.dtype))
    return Posterior(seen.mean.float(), seen.logvar.float())


def to_latents(model: Model, seen: Posterior, noise: Tensor) -> Tensor:
    """A sample of the posterior, scaled: ``(1, C, h, w)``, float32."""
    return seen.sample(noise.to(seen.mean)) * model.spec.vae.scaling_factor


def clip_pixels(image: Image.Image, side: int, fit: str = "crop") -> Tensor:
    """A picture as CLIP reads it.

    Args:
        side: of CLIP's pictures.
        fit: ``crop`` scales the shorter side (bicubic, antialiased, in 8 bits) and takes the
            middle, as the published folders' processor does; ``square`` squeezes all of it,
            bicubic without antialiasing, as the variations' card asks for because training did.

    Returns:
        ``(1, 3, side, side)``, normalised.
    """
    if fit == "square":
        pixels = to_pixels(image) / 2 + 0.5
        pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=False)
    else:
        short = min(image.size)
        width, height = (int(side * length / short) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        pixels = to_pixels(image.crop((left, top, left + side, top + side))) / 2 + 0.5
    mean, std = (torch.tensor(row)[None, :, None, None] for row in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


@torch.inference_mode()
def embed(
    model: Model,
    images: Sequence[Image.Image],
    weights: Sequence[float] | None = None,
    fit: str = "crop",
) -> Tensor:
    """Pictures as one CLIP embedding, their weighted mean: ``(D,)``, float32, not normalised.

    Args:
        weights: one a picture; only their shares of the sum matter. None: equal.
    """
    assert model.vision is not None
    side = model.vision.spec.image_size
    # One at a time: company must not move the last bit.
    stacked = torch.cat([embed_pixels(model, clip_pixels(each, side, fit)) for each in images])
    shares = torch.tensor(list(weights or [1.0] * len(images)), device=stacked.device)
    return (stacked * (shares / shares.sum())[:, None]).sum(0)


@torch.inference_mode()
def embed_pixels(model: Model, pixels: Tensor) -> Tensor:
    """CLIP embeddings ``(B, D)``, float32, not normalised, of prepared pixels ``(B, 3, S, S)``."""
    assert model.vision is not None
    weight = next(model.vision.parameters())
    embedding = model.vision(pixels.to(weight.device, weight.dtype)).embedding
    assert embedding is not None
    return embedding.float()


def variations(embedding: Tensor, dtype: torch.dtype) -> list[Conditioning]:
    """Unconditional and picture: one token each."""
    token = embedding.to(dtype)[None]
    return [Conditioning(torch.zeros_like(token)), Conditioning(token)]
