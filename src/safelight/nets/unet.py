"""The conditional UNet: one class, by spec, for every system of the family.

Rombach et al. 2022 (2112.10752), section 3.3. Key names are those of the published
``UNet2DConditionModel`` folders, so a published file loads without renaming.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.attention import SpatialTransformer
from safelight.nets.layers import (
    Downsample,
    ResnetBlock,
    TimestepMLP,
    Upsample,
    embedding,
    sinusoid,
)
from safelight.spec import UNetSpec


class DownBlock(nn.Module):
    """Residual layers (each with a transformer where the level has attention), then stride 2."""

    def __init__(self, spec: UNetSpec, level: int) -> None:
        super().__init__()
        width = spec.channels[level]
        widths_in = [spec.channels[max(level - 1, 0)]] + [width] * (spec.layers_per_block - 1)
        self.resnets = nn.ModuleList([_resnet(spec, w, width) for w in widths_in])
        self.attentions = _attentions(spec, level, spec.layers_per_block)
        last = level == len(spec.channels) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample(width, symmetric=True)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """Appends every layer's output to ``skips``."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions is not None:
                x = self.attentions[i](x, context)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """Residual, transformer, residual at the coarsest level."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        width = spec.channels[-1]
        self.resnets = nn.ModuleList([_resnet(spec, width, width) for _ in range(2)])
        self.attentions = nn.ModuleList([_transformer(spec, len(spec.channels) - 1, mid=True)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """Residual layers that each read one skip connection, then upsampling."""

    def __init__(self, spec: UNetSpec, level: int, skip_widths: list[int]) -> None:
        super().__init__()
        width = spec.channels[level]
        below = spec.channels[min(level + 1, len(spec.channels) - 1)]
        layers = spec.layers_per_block + 1
        widths_in = [below] + [width] * (layers - 1)
        self.resnets = nn.ModuleList(
            [_resnet(spec, w + skip_widths.pop(), width) for w in widths_in]
        )
        self.attentions = _attentions(spec, level, layers)
        self.upsamplers = nn.ModuleList([Upsample(width)]) if level > 0 else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """Pops its layers' skip connections from ``skips``."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if self.attentions is not None:
                x = self.attentions[i](x, context)
        if self.upsamplers is not None:
            height, width = skips[-1].shape[-2:]
            x = self.upsamplers[0](x, (height, width))
        return x


class UNet(nn.Module):
    """The noise predictor.

    Predicts, from noisy latents at a timestep and a context, whatever the model's schedule
    says it predicts (noise, velocity or the clean latents).
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        first, last = spec.channels[0], spec.channels[-1]
        self.conv_in = nn.Conv2d(spec.in_channels, first, 3, padding=1)
        self.time_embedding = TimestepMLP(first, spec.time_width, spec.guidance_embedding_size)
        if spec.class_embedding == "table":
            self.class_embedding = embedding(spec.class_embedding_size, spec.time_width)
        elif spec.class_embedding == "projection":
            self.class_embedding = TimestepMLP(spec.class_embedding_size, spec.time_width)
        else:
            self.class_embedding = None

        self.down_blocks = nn.ModuleList([DownBlock(spec, i) for i in range(len(spec.channels))])
        skip_widths = [first]
        for level, width in enumerate(spec.channels):
            skip_widths += [width] * spec.layers_per_block
            skip_widths += [width] if level < len(spec.channels) - 1 else []
        assert last == skip_widths[-1]
        self.mid_block = MidBlock(spec)
        self.up_blocks = nn.ModuleList(
            [UpBlock(spec, i, skip_widths) for i in reversed(range(len(spec.channels)))]
        )
        self.conv_norm_out = nn.GroupNorm(spec.norm_groups, first, spec.norm_eps)
        self.conv_out = nn.Conv2d(first, spec.out_channels, 3, padding=1)

    def time_vector(
        self,
        timestep: Tensor,
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The time embedding plus class and guidance embeddings, through SiLU.

        Every residual block starts with that SiLU, so it is taken once here.

        Args:
            timestep: ``(N,)``, may be fractional.
            vector: ``(N,)`` integer labels (table) or ``(N, class_embedding_size)`` vectors.
            guidance: ``(N, guidance_embedding_size)``.

        Returns:
            ``(N, time_width)``.
        """
        dtype = self.conv_in.weight.dtype
        h = sinusoid(timestep, self.spec.channels[0]).to(dtype)
        time = self.time_embedding(h, None if guidance is None else guidance.to(dtype))
        if self.class_embedding is not None:
            if vector is None:
                raise ValueError("this UNet is conditioned on a class vector, but none was given")
            if self.spec.class_embedding == "projection":
                vector = vector.to(dtype)
            time = time + self.class_embedding(vector)
        return F.silu(time)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            x: ``(N, in_channels, H, W)`` noisy latents, extra planes concatenated behind them.
            timestep: ``(N,)`` or a scalar tensor, 0 to 999, may be fractional.
            context: ``(N, S, context_width)`` text or image tokens.
            vector, guidance: see :meth:`time_vector`.

        Returns:
            ``(N, out_channels, H, W)``.
        """
        time = self.time_vector(timestep.reshape(-1).expand(x.shape[0]), vector, guidance)
        h = self.conv_in(x)
        skips = [h]
        for block in self.down_blocks:
            h = block(h, time, context, skips)
        h = self.mid_block(h, time, context)
        for block in self.up_blocks:
            h = block(h, time, context, skips)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def _resnet(spec: UNetSpec, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(
        in_channels,
        out_channels,
        time_width=spec.time_width,
        groups=spec.norm_groups,
        eps=spec.norm_eps,
    )


def _transformer(spec: UNetSpec, level: int, *, mid: bool = False) -> SpatialTransformer:
    return SpatialTransformer(
        spec.channels[level],
        spec.heads[level],
        spec.context_width,
        groups=spec.norm_groups,
        linear_projection=spec.linear_projection,
        only_cross=spec.only_cross_attention[level] and not mid,
        upcast=spec.upcast_attention,
    )


def _attentions(spec: UNetSpec, level: int, count: int) -> nn.ModuleList | None:
    if not spec.attention[level]:
        return None
    return nn.ModuleList([_transformer(spec, level) for _ in range(count)])
