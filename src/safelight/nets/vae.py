"""The KL autoencoder between pixels and latents.

Rombach et al. 2022 (2112.10752), section 3.1; the posterior is that of Kingma and Welling
2013 (1312.6114). Key names are those of the published ``AutoencoderKL`` folders.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.attention import attend
from safelight.nets.layers import Downsample, ResnetBlock, Upsample
from safelight.spec import VAESpec


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents, not yet scaled.

    ``mean`` and ``logvar`` are ``(N, latent_channels, H/f, W/f)``.
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + std * noise``; the noise is the caller's, shaped like ``mean``."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Divergence from the unit Gaussian in nats, ``(N,)`` (Kingma and Welling, appendix B)."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


class SpatialAttention(nn.Module):
    """Single-head self-attention over all cells, with biases, residual."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        h = self.to_out[0](attend(self.to_q(h), self.to_k(h), self.to_v(h), heads=1))
        return x + h.transpose(1, 2).unflatten(2, x.shape[-2:])


class VAEMidBlock(nn.Module):
    """Residual, attention, residual."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        width = spec.channels[-1]
        self.resnets = nn.ModuleList([_resnet(spec, width, width) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialAttention(width, spec.norm_groups, spec.norm_eps)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class EncoderBlock(nn.Module):
    """Residual layers, then (except at the last level) stride 2."""

    def __init__(self, spec: VAESpec, in_width: int, width: int, *, last: bool) -> None:
        super().__init__()
        widths_in = [in_width] + [width] * (spec.layers_per_block - 1)
        self.resnets = nn.ModuleList([_resnet(spec, w, width) for w in widths_in])
        self.downsamplers = None if last else nn.ModuleList([Downsample(width, symmetric=False)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class DecoderBlock(nn.Module):
    """Residual layers, then (except at the last level) upsampling."""

    def __init__(self, spec: VAESpec, in_width: int, width: int, *, last: bool) -> None:
        super().__init__()
        widths_in = [in_width] + [width] * spec.layers_per_block
        self.resnets = nn.ModuleList([_resnet(spec, w, width) for w in widths_in])
        self.upsamplers = None if last else nn.ModuleList([Upsample(width)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class Encoder(nn.Module):
    """Pixels ``(N, 3, H, W)`` in [-1, 1] to moments ``(N, 2 * latent_channels, H/f, W/f)``."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        widths = spec.channels
        self.conv_in = nn.Conv2d(spec.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                EncoderBlock(spec, widths[max(i - 1, 0)], w, last=i == len(widths) - 1)
                for i, w in enumerate(widths)
            ]
        )
        self.mid_block = VAEMidBlock(spec)
        self.conv_norm_out = nn.GroupNorm(spec.norm_groups, widths[-1], spec.norm_eps)
        self.conv_out = nn.Conv2d(widths[-1], 2 * spec.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        h = self.mid_block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class Decoder(nn.Module):
    """Latents ``(N, latent_channels, h, w)`` to pixels ``(N, 3, f*h, f*w)``, about [-1, 1]."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        widths = spec.channels[::-1]
        self.conv_in = nn.Conv2d(spec.latent_channels, widths[0], 3, padding=1)
        self.mid_block = VAEMidBlock(spec)
        self.up_blocks = nn.ModuleList(
            [
                DecoderBlock(spec, widths[max(i - 1, 0)], w, last=i == len(widths) - 1)
                for i, w in enumerate(widths)
            ]
        )
        self.conv_norm_out = nn.GroupNorm(spec.norm_groups, widths[-1], spec.norm_eps)
        self.conv_out = nn.Conv2d(widths[-1], spec.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self._pixels(h)

    def decoding(self, z: Tensor) -> Generator[None, None, Tensor]:
        """The same in pieces: yields between blocks, returns the pixels."""
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            yield
            h = block(h)
        return self._pixels(h)

    def _pixels(self, h: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class VAE(nn.Module):
    """Encoder, decoder and the two 1x1 convolutions around the latents."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.quant_conv = nn.Conv2d(2 * spec.latent_channels, 2 * spec.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(spec.latent_channels, spec.latent_channels, 1)

    def encode(self, pixels: Tensor) -> Posterior:
        """``pixels`` (N, 3, H, W) in [-1, 1], H and W multiples of ``spec.factor``.

        The posterior is not scaled: latents are ``posterior.sample(n) * spec.scaling_factor``.
        """
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to pixels: divides by ``spec.scaling_factor`` first."""
        return self.decoder(self.post_quant_conv(latents / self.spec.scaling_factor))

    def decoding(self, latents: Tensor) -> Generator[None, None, Tensor]:
        """:meth:`decode` in pieces: yields between them, returns the pixels."""
        return self.decoder.decoding(self.post_quant_conv(latents / self.spec.scaling_factor))

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """Reconstruction and posterior, for training; ``noise`` as in :meth:`Posterior.sample`."""
        posterior = self.encode(pixels)
        return self.decoder(self.post_quant_conv(posterior.sample(noise))), posterior


def _resnet(spec: VAESpec, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(
        in_channels, out_channels, time_width=0, groups=spec.norm_groups, eps=spec.norm_eps
    )


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels ``(N, 3, H, W)`` in [-1, 1] to uint8 ``(N, H, W, 3)``, rounded half to even."""
    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255
    return torch.round(scaled).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
