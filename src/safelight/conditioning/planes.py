"""What is concatenated behind the latents: masks, depth, a small picture to enlarge.

The published models' own inputs: inpainting reads the mask and the masked picture's latents, depth
a map scaled to [-1, 1], the x4 upscaler the small picture with a little noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from safelight.conditioning.image import to_pixels
from safelight.diffusion.prediction import noised
from safelight.diffusion.schedule import Schedule
from safelight.errors import MissingExtra, WeightsError
from safelight.presets import X4_NOISING

if TYPE_CHECKING:
    from safelight.model import Model

ESTIMATOR = "Intel/dpt-hybrid-midas"
"""Makes depth maps where the model's folder has no estimator of its own."""
_ESTIMATOR_SIDE, _ESTIMATOR_STEP = 384, 32


def mask_plane(mask: Image.Image) -> Tensor:
    """A grey picture as ``(1, 1, H, W)`` in [0, 1]; 1 is repainted."""
    return torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)[None, None]


def hard(mask: Tensor) -> Tensor:
    """0 or 1, from 0.5 on."""
    return (mask >= 0.5).to(mask)


def latent_mask(mask: Tensor, factor: int, *, soft: bool) -> Tensor:
    """A mask of pixels as one of latent cells, ``(1, 1, H/f, W/f)``.

    Args:
        soft: each cell the mean of its pixels; else its first pixel, as the reference takes it.
    """
    if soft:
        return F.avg_pool2d(mask, factor)
    return mask[..., ::factor, ::factor].contiguous()


def inpaint_planes(mask: Tensor, masked: Tensor) -> Tensor:
    """Mask ``(1, 1, h, w)`` and the masked picture's latents ``(1, C, h, w)``, as
    ``(1 + C, h, w)``."""
    return torch.cat([mask.to(masked), masked], dim=1)[0]


def depth_plane(depth: Tensor, height: int, width: int) -> Tensor:
    """A depth map ``(H, W)`` in any unit, larger is nearer: ``(1, h, w)`` from -1 to 1.

    A map that is flat has no near and far: zeros.
    """
    small = F.interpolate(depth.float()[None, None], (height, width), mode="bicubic")[0]
    low, high = small.min(), small.max()
    if high - low < 1e-12:
        return torch.zeros_like(small)
    return 2 * (small - low) / (high - low) - 1


def low_resolution(model: Model, pixels: Tensor, level: int, noise: Tensor) -> Tensor:
    """The small picture ``(1, 3, h, w)`` with noise of a level: ``(3, h, w)``."""
    schedule = Schedule.from_spec(model.spec.noising or X4_NOISING)
    return noised(pixels, noise.to(pixels), schedule.abar(level))[0]


@torch.inference_mode()
def estimate_depth(model: Model, image: Image.Image) -> Tensor:
    """A depth map ``(H, W)`` of a picture, by the model's estimator (MiDaS).

    Raises:
        MissingExtra: ``transformers`` is not installed.
        WeightsError: there is no estimator here, and none may be fetched.
    """
    try:
        from transformers import DPTForDepthEstimation
    except ImportError:
        raise MissingExtra("making a depth map from a picture", "depth") from None
    folder = Path(model.source) / "depth_estimator"
    place = str(folder) if folder.is_dir() else ESTIMATOR
    try:
        estimator = DPTForDepthEstimation.from_pretrained(
            place, local_files_only=model.local_only
        ).eval()
    except (OSError, ValueError) as error:
        away = model.local_only and not folder.is_dir()
        problem = "is not here, and the network may not be asked" if away else "cannot be read"
        raise WeightsError(place, f"{problem}: {error}.", "Give a depth map.") from error
    return estimator(pixel_values=depth_pixels(image)).predicted_depth[0].float()


def depth_pixels(image: Image.Image) -> Tensor:
    """DPT's own preparation: scaled by the side that is nearer to 384, in steps of 32, values in
    [-1, 1]."""
    scales = [_ESTIMATOR_SIDE / side for side in image.size[::-1]]  # height first, where equal
    scale, step = min(scales, key=lambda s: abs(1 - s)), _ESTIMATOR_STEP
    width, height = (max(step, round(side * scale / step) * step) for side in image.size)
    return to_pixels(image.resize((width, height), Image.Resampling.BICUBIC))
