"""The tiny decoder over channels-last activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from safelight.nets.layers import Upsample
from safelight.nets.tiny_decoder import TinyBlock, TinyDecoder
from safelight.runtime.layers import Conv, Up
from safelight.runtime.plan import Plan


class FusedTinyDecoder:
    """The same function as :class:`safelight.nets.tiny_decoder.TinyDecoder`."""

    def __init__(self, decoder: TinyDecoder, plan: Plan) -> None:
        self._clamped = decoder.clamped
        self._steps: list[Callable[[Tensor], Tensor]] = []
        layers = list(decoder.layers)
        for before, layer in zip([None, *layers[:-1]], layers, strict=True):
            if isinstance(layer, TinyBlock):
                self._steps.append(_Block(layer, plan))
            elif isinstance(layer, nn.Conv2d) and isinstance(before, nn.Upsample):
                self._steps.append(_doubling(layer, plan))
            elif isinstance(layer, nn.Conv2d):
                self._steps.append(Conv(layer, plan))
            elif isinstance(layer, nn.ReLU):
                self._steps.append(torch.relu_)

    def __call__(self, latents: Tensor) -> Tensor:
        """Scaled latents ``(N, C, h, w)`` to pixels."""
        h = self._clamped(latents).contiguous(memory_format=torch.channels_last)
        for step in self._steps:
            h = step(h)
        return h * 2 - 1


class _Block:
    def __init__(self, block: TinyBlock, plan: Plan) -> None:
        self._convs = [Conv(part, plan) for part in block.conv if isinstance(part, nn.Conv2d)]

    def __call__(self, x: Tensor) -> Tensor:
        h = torch.relu_(self._convs[0](x))
        h = torch.relu_(self._convs[1](h))
        return torch.relu_(self._convs[2](h, other=x))


def _doubling(conv: nn.Conv2d, plan: Plan) -> Up:
    with torch.device("meta"):
        shell = Upsample(1)
    shell.conv = conv
    return Up(shell, plan)
