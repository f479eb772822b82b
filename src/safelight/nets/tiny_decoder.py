"""A small decoder from latents to pixels, in the layout of TAESD.

Ollin Boer Bohan 2023, "Tiny AutoEncoder for Stable Diffusion": convolutions and ReLU alone, no
norms and no attention. Key names are those of the published ``AutoencoderTiny`` folders
(``decoder.layers.*``); its author's own files count one more, because a clamp comes first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from safelight.spec import TinyDecoderSpec


class TinyBlock(nn.Module):
    """Three convolutions, residual, with ReLU behind each and behind the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class TinyDecoder(nn.Module):
    """Scaled latents to pixels."""

    def __init__(self, spec: TinyDecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        first, last = spec.channels[0], len(spec.blocks) - 1
        layers: list[nn.Module] = [nn.Conv2d(spec.latent_channels, first, 3, padding=1), nn.ReLU()]
        for level, (width, blocks) in enumerate(zip(spec.channels, spec.blocks, strict=True)):
            layers += [TinyBlock(width) for _ in range(blocks)]
            if level < last:
                layers += [nn.Upsample(scale_factor=2.0, mode="nearest")]
                layers += [nn.Conv2d(width, width, 3, padding=1, bias=False)]
            else:
                layers += [nn.Conv2d(width, spec.out_channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def clamped(self, latents: Tensor) -> Tensor:
        """What the first convolution reads: within ±3, smoothly."""
        return torch.tanh(latents * self.spec.scale / 3) * 3

    def forward(self, latents: Tensor) -> Tensor:
        """``latents`` (N, latent_channels, h, w), scaled as the UNet makes them, to pixels
        ``(N, 3, f*h, f*w)``, about [-1, 1]."""
        return self.layers(self.clamped(latents)) * 2 - 1


def plain_keys(names: Mapping[str, object] | list[str]) -> dict[str, str]:
    """From a published file's names to ours; an encoder's are left out.

    Args:
        names: of ``AutoencoderTiny`` (``decoder.layers.0.weight``), of its author's decoder
            (``1.weight``, the clamp being 0), or our own.
    """
    found: dict[str, str] = {}
    for name in names:
        head, _, rest = name.partition(".")
        if head.isdigit():
            found[name] = f"layers.{int(head) - 1}.{rest}"
        elif name.startswith(("decoder.layers.", "layers.")):
            found[name] = name.removeprefix("decoder.")
        elif head != "encoder":
            found[name] = name  # unknown: an error when it is loaded
    return found


def spec_of(shapes: Mapping[str, tuple[int, ...]]) -> TinyDecoderSpec:
    """The decoder that weights of these names (ours) and shapes belong to.

    Raises:
        ValueError: they are no such decoder's.
    """
    try:
        width, latent, *_ = shapes["layers.0.weight"]
        places = sorted({int(name.split(".")[1]) for name in shapes})
        blocks, run = [], 0
        for place in places[1:]:
            if f"layers.{place}.conv.0.weight" in shapes:
                run += 1
            else:
                blocks.append(run)
                run = 0
        out = shapes[f"layers.{places[-1]}.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"these are not the weights of a tiny decoder: {error}") from None
    return TinyDecoderSpec(
        latent_channels=latent,
        out_channels=out,
        channels=(width,) * len(blocks),
        blocks=tuple(blocks),
    )
