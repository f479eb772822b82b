"""The autoencoder over channels-last activations, made from :class:`safelight.nets.vae.VAE`."""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
import torch.nn.functional as F
from torch import Tensor

from safelight.nets.vae import VAE, Posterior
from safelight.runtime.attention import CellAttention
from safelight.runtime.layers import Conv, Down, Norm, Resnet, Up, parts_of
from safelight.runtime.plan import Plan


class FusedDecoder:
    """The same function as :meth:`safelight.nets.vae.VAE.decode`."""

    def __init__(self, vae: VAE, plan: Plan) -> None:
        decoder, self._post, self._scale = vae.decoder, vae.post_quant_conv, vae.spec.scaling_factor
        self._conv_in, self._conv_out = Conv(decoder.conv_in, plan), Conv(decoder.conv_out, plan)
        middle = decoder.mid_block
        first, last = (Resnet(part, plan) for part in parts_of(middle.resnets))
        attention = CellAttention(parts_of(middle.attentions)[0], plan)
        steps: list[Callable[[Tensor], Tensor]] = [first, attention, last]
        for block in parts_of(decoder.up_blocks):
            steps += [Resnet(part, plan) for part in parts_of(block.resnets)]
            steps += [Up(part, plan) for part in parts_of(block.upsamplers)]
        self._steps, self._norm_out = steps, Norm(decoder.conv_norm_out, plan)

    def __call__(self, latents: Tensor) -> Tensor:
        """Scaled latents ``(N, latent_channels, h, w)`` to pixels ``(N, 3, f*h, f*w)``."""
        pieces = self.decoding(latents)
        while True:
            try:
                next(pieces)
            except StopIteration as stop:
                return stop.value

    def decoding(self, latents: Tensor) -> Generator[None, None, Tensor]:
        """The same, yielding between layers."""
        h = F.conv2d(latents / self._scale, self._post.weight, self._post.bias)
        h = self._conv_in(h.contiguous(memory_format=torch.channels_last))
        for step in self._steps:
            h = step(h)
            yield
        return self._conv_out(h, norm=self._norm_out)


class FusedEncoder:
    """The same function as :meth:`safelight.nets.vae.VAE.encode`."""

    def __init__(self, vae: VAE, plan: Plan) -> None:
        encoder, self._quant = vae.encoder, vae.quant_conv
        self._conv_in, self._conv_out = Conv(encoder.conv_in, plan), Conv(encoder.conv_out, plan)
        steps: list[Callable[[Tensor], Tensor]] = []
        for block in parts_of(encoder.down_blocks):
            steps += [Resnet(part, plan) for part in parts_of(block.resnets)]
            steps += [Down(part, plan) for part in parts_of(block.downsamplers)]
        middle = encoder.mid_block
        first, last = (Resnet(part, plan) for part in parts_of(middle.resnets))
        attention = CellAttention(parts_of(middle.attentions)[0], plan)
        self._steps = [*steps, first, attention, last]
        self._norm_out = Norm(encoder.conv_norm_out, plan)

    def __call__(self, pixels: Tensor) -> Posterior:
        """Pixels ``(N, 3, f*h, f*w)`` to the posterior over latents, not scaled."""
        h = self._conv_in(pixels.contiguous(memory_format=torch.channels_last))
        for step in self._steps:
            h = step(h)
        h = self._conv_out(h, norm=self._norm_out)
        moments = F.conv2d(h, self._quant.weight, self._quant.bias)
        mean, logvar = moments.contiguous().chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))
