"""The convolutional pieces that the UNet and the autoencoder share.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models"
(arXiv:2112.10752), appendix E.2; the residual block is that of Ho et al. 2020 (2006.11239).
All activations are NCHW.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(
    position: Tensor, width: int, *, max_period: float = 10000.0, cos_first: bool = True
) -> Tensor:
    """Sinusoidal embedding of a position or timestep (Vaswani et al. 2017, section 3.5).

    Args:
        position: ``(N,)``, integer or float.
        width: width of the embedding, even.
        cos_first: ``[cos, sin]`` as the UNet wants it (``flip_sin_to_cos``), else ``[sin, cos]``.

    Returns:
        ``(N, width)`` in float32.
    """
    half = width // 2
    # Multiplied, then divided, as the reference does: the other order differs by one rounding,
    # which a timestep near 1000 makes 1e-4 of an angle (unless ``half`` is a power of two).
    exponents = -math.log(max_period) * torch.arange(half, device=position.device).float() / half
    frequencies = torch.exp(exponents)
    angles = position.float()[:, None] * frequencies[None]
    parts = (angles.cos(), angles.sin())
    return torch.cat(parts if cos_first else parts[::-1], dim=-1)


def normal(*shape: int, std: float = 1.0) -> Tensor:
    """Numbers from N(0, std²), as initial weights.

    On the meta device, where a network is built before its weights are read, none are drawn:
    PyTorch would import its compiler for that, which takes as long as importing PyTorch.
    """
    weight = torch.empty(shape)
    return weight if weight.is_meta else weight.normal_(std=std)


def embedding(count: int, width: int) -> nn.Embedding:
    """A table of ``count`` rows of :func:`normal` numbers."""
    return nn.Embedding(count, width, _weight=normal(count, width))


class TimestepMLP(nn.Module):
    """Linear, SiLU, Linear: from a sinusoid (or a class vector) to the time embedding.

    Args:
        condition_width: width of an extra input added before the first layer (the guidance
            embedding of distilled students), 0 for none.
    """

    def __init__(self, in_width: int, width: int, condition_width: int = 0) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)
        self.cond_proj = (
            nn.Linear(condition_width, in_width, bias=False) if condition_width else None
        )

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice; the time embedding is added in between.

    Args:
        time_width: width of the time embedding; 0 for the autoencoder, which has none.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, time_width: int, groups: int, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out_channels) if time_width else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """``x`` (N, C, H, W); ``time`` (N, time_width), already through its SiLU."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """3x3 convolution with stride 2.

    The UNet pads one cell on every side; the autoencoder pads right and bottom only, as the
    original did (``F.pad`` (0, 1, 0, 1)), so its latents are not mirror-symmetric.
    """

    def __init__(self, channels: int, *, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour 2x, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """``size``: the exact height and width to reach when a level was odd."""
        if size is None or size == (2 * x.shape[-2], 2 * x.shape[-1]):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
