"""The UNet as a list of steps over channels-last activations.

Made from a :class:`safelight.nets.unet.UNet`, whose numbers it shares where their layout allows.
What does not change from call to call is asked for once, and handed in by the caller:
:meth:`FusedUNet.time` for a timestep, :meth:`FusedUNet.read` for a context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safelight.nets.unet import DownBlock, UNet, UpBlock
from safelight.runtime.attention import Read, Transformer
from safelight.runtime.caching import Stand
from safelight.runtime.layers import Conv, Down, Norm, Resnet, Up, parts_of
from safelight.runtime.plan import Plan

Times = Sequence[Tensor]
"""For every residual block, in running order, what :meth:`Resnet.time` gave: ``(1 | N, C)``."""
Layer = tuple[Resnet, Transformer | None]


class Route(NamedTuple):
    """The way of a call that leaves the inner layers out."""

    down: int
    """Steps on the way down."""
    up: int
    """The first step on the way up."""
    resnets: list[int]
    """Which times it needs."""
    crosses: list[int]
    """Which reads."""


class FusedUNet:
    """The same function as the UNet it is made of."""

    def __init__(self, unet: UNet, plan: Plan) -> None:
        self._unet, self._plan = unet, plan
        self._conv_in, self._conv_out = Conv(unet.conv_in, plan), Conv(unet.conv_out, plan)
        self._norm_out = Norm(unet.conv_norm_out, plan)
        self._down: list[Layer | Down] = []
        for block in unet.down_blocks:
            assert isinstance(block, DownBlock)
            self._down += self._layers(block)
            self._down += [Down(part, plan) for part in parts_of(block.downsamplers)]
        first, last = (Resnet(part, plan) for part in parts_of(unet.mid_block.resnets))
        transformer = Transformer(parts_of(unet.mid_block.attentions)[0], plan)
        self._middle = (first, transformer, last)
        self._up: list[Layer | Up] = []
        for block in unet.up_blocks:
            assert isinstance(block, UpBlock)
            self._up += self._layers(block)
            self._up += [Up(part, plan) for part in parts_of(block.upsamplers)]

        steps = [*self._down, (first, transformer), (last, None), *self._up]
        layers: list[Layer] = [step for step in steps if isinstance(step, tuple)]
        self._resnets = [resnet for resnet, _ in layers]
        transformers = [found for _, found in layers if found is not None]
        self._crosses = [cross for found in transformers for cross in found.crosses]

    def _layers(self, block: DownBlock | UpBlock) -> list[Layer]:
        resnets = [Resnet(part, self._plan) for part in parts_of(block.resnets)]
        transformers = [Transformer(part, self._plan) for part in parts_of(block.attentions)]
        return list(zip(resnets, transformers or [None] * len(resnets), strict=True))

    def time(
        self, timestep: float, vector: Tensor | None = None, guidance: Tensor | None = None
    ) -> list[Tensor]:
        """A timestep (and one row's class vector and guidance embedding) for every resnet."""
        place = self._unet.conv_in.weight.device
        embedded = self._unet.time_vector(
            torch.tensor([timestep], device=place),
            None if vector is None else vector[None],
            None if guidance is None else guidance[None],
        )
        return [resnet.time(embedded) for resnet in self._resnets]

    def read(self, tokens: Tensor) -> list[Read]:
        """A context ``(S, context_width)`` for every cross-attention."""
        return [cross.read(tokens) for cross in self._crosses]

    def route(self, branch: int) -> Route:
        """The layers outside skip connection ``branch``."""
        layers = [k for k, step in enumerate(self._up) if isinstance(step, tuple)]
        start = layers[len(layers) - 1 - branch]
        outer = [*self._down[:branch], *self._up[start:]]
        chosen = [step for step in outer if isinstance(step, tuple)]
        resnets = [resnet for resnet, _ in chosen]
        crosses = [cross for _, found in chosen if found is not None for cross in found.crosses]
        return Route(
            branch,
            start,
            [k for k, resnet in enumerate(self._resnets) if resnet in resnets],
            [k for k, cross in enumerate(self._crosses) if cross in crosses],
        )

    def __call__(
        self,
        x: Tensor,
        times: Times,
        reads: Sequence[Sequence[Read] | Stand],
        *,
        spread: Callable[[Tensor], Tensor] | None = None,
        first_times: Times | None = None,
        taps: dict[int, Tensor | None] | None = None,
        route: Route | None = None,
        deep: Tensor | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            x: ``(N, in_channels, H, W)`` noisy latents, extra planes behind them.
            times: of :meth:`time`; one for all rows, or stacked, one a row.
            reads: for every cross-attention what :meth:`read` gave, stacked, for all rows in order.
            spread: ``x`` has fewer rows than the result: copies the rows of any tensor out,
                and is called where the context is first read.
            first_times: ``times`` before that, where they are stacked.
            taps: by skip connection, filled with what the layer that reads it is handed.
            route, deep: of :meth:`route`: compute the outer layers alone, with that as the inner
                ones' result; ``times`` and ``reads`` are those of the route.

        Returns:
            ``(N, out_channels, H, W)``, channels-last.
        """
        h = self._conv_in(x.contiguous(memory_format=torch.channels_last))
        context, skips, done = iter(reads), [h], 0
        current = times if first_times is None else first_times

        def layer(h: Tensor, resnet: Resnet, transformer: Transformer | None) -> Tensor:
            nonlocal spread, current, skips, done
            h, done = resnet(h, current[done]), done + 1
            if transformer is None:
                return h
            h = transformer(h, context, spread)
            if spread is not None:
                skips = [spread(skip) for skip in skips]
                spread, current = None, times
            return h

        for step in self._down[: None if route is None else route.down]:
            h = step(h) if isinstance(step, Down) else layer(h, *step)
            skips.append(h)
        if deep is None:
            h = layer(h, *self._middle[:2])
            h = layer(h, self._middle[2], None)
        else:
            h = deep.contiguous(memory_format=torch.channels_last)
        for step in self._up[0 if route is None else route.up :]:
            if isinstance(step, Up):
                height, width = skips[-1].shape[-2:]
                h = step(h, (height, width))
                continue
            if taps is not None and len(skips) - 1 in taps:
                taps[len(skips) - 1] = h
            h = layer(torch.cat([h, skips.pop()], dim=1), *step)
        return self._conv_out(h, norm=self._norm_out)
