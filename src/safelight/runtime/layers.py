"""Convolutions, norms and residual blocks over channels-last activations.

Activations are ``(N, C, H, W)`` in channels-last memory, so that the cells of a feature map are
already the rows that attention and linear layers want. Each class is made from a module of
:mod:`safelight.nets.layers` and computes what that computes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.layers import Downsample, ResnetBlock, Upsample
from safelight.runtime.kernels.norm import group_norm as compiled_norm
from safelight.runtime.plan import (
    Plan,
    pack,
    pack_upsampling,
    packed_conv,
    packed_conv_add,
    packed_upsampling,
)

_FEW = 2**18
"""Elements up to which PyTorch's own GroupNorm, which is one call, is no slower."""
_CELLS = 1024
"""Cells from which PyTorch's channels-last GroupNorm has a vectorised way of its own."""

_NEAREST = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


class Conv:
    """A convolution whose weights are laid out once."""

    def __init__(self, conv: nn.Conv2d, plan: Plan) -> None:
        self.bias = conv.bias
        self._stride, self._padding = (int(conv.stride[0]), int(conv.stride[1])), _padding(conv)
        self._packed = plan.packed
        if plan.packed:
            self._weight = pack(conv.weight, self._stride, self._padding)
        else:
            self._weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``bias``: usually ``self.bias``, or ``(O,)`` with something else added to it."""
        if self._packed:
            return packed_conv(x, self._weight, bias, self._stride, self._padding)
        return F.conv2d(x, self._weight, bias, self._stride, self._padding)

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """The convolution of ``x``, with its bias, plus ``other``."""
        if self._packed:
            return packed_conv_add(x, other, self._weight, self.bias, self._stride, self._padding)
        return self(x, self.bias).add_(other)


class Norm:
    """GroupNorm, and the SiLU behind it where there is one."""

    def __init__(self, norm: nn.GroupNorm, plan: Plan, *, silu: bool = True) -> None:
        self._groups, self._eps, self._silu = norm.num_groups, norm.eps, silu
        self._compiled = plan.compiled
        self._weight, self._bias = norm.weight, norm.bias
        self._shape = (norm.num_groups, norm.num_channels // norm.num_groups)

    def __call__(self, x: Tensor) -> Tensor:
        if self._compiled and x.numel() > _FEW:
            return compiled_norm(
                x, self._weight, self._bias, self._groups, self._eps, silu=self._silu
            )
        if x.numel() <= _FEW or x.shape[2] * x.shape[3] >= _CELLS:
            h = F.group_norm(x, self._groups, self._weight, self._bias, self._eps)
        else:
            h = self._by_channels(x)
        return F.silu(h, inplace=True) if self._silu else h

    def _by_channels(self, x: Tensor) -> Tensor:
        """Channel sums first, then groups: every pass over memory is in order.

        Variance is E[x²] - E[x]², as in PyTorch's own kernel for this layout.
        """
        n, _, height, width = x.shape
        groups, share = self._shape
        cells = x.permute(0, 2, 3, 1).reshape(n, height * width, -1)
        work = cells * cells
        sums = torch.stack((cells.sum(1), work.sum(1))).view(2, n, groups, share)
        mean, square = (sums.sum(-1, keepdim=True) / (share * height * width)).unbind(0)
        deviation = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0)
        scale = deviation.add_(self._eps).rsqrt_() * self._weight.view(groups, share)
        shift = torch.addcmul(self._bias.view(groups, share), mean, scale, value=-1)
        out = torch.addcmul(shift.view(n, 1, -1), cells, scale.view(n, 1, -1), out=work)
        return out.view(n, height, width, -1).permute(0, 3, 1, 2)


class Resnet:
    """A residual block. The time embedding comes projected, with ``conv1``'s bias in it."""

    def __init__(self, block: ResnetBlock, plan: Plan) -> None:
        self._norm1, self._norm2 = Norm(block.norm1, plan), Norm(block.norm2, plan)
        self._conv1, self._conv2 = Conv(block.conv1, plan), Conv(block.conv2, plan)
        # A 1x1 convolution is a linear layer over cells, which BLAS does better: oneDNN's packed
        # one was measured between equal and thirty times slower (2560 channels, 8x8).
        shortcut = block.conv_shortcut
        self._shortcut = None
        if shortcut is not None:
            self._shortcut = shortcut.weight.detach().flatten(1), shortcut.bias
        self._projection = block.time_emb_proj
        if block.time_emb_proj is not None:
            assert block.conv1.bias is not None
            self._time_bias = (block.time_emb_proj.bias + block.conv1.bias).detach()

    def time(self, vector: Tensor) -> Tensor:
        """What a time vector ``(1, time_width)`` adds behind ``conv1``: ``(1, C)``."""
        assert self._projection is not None
        return F.linear(vector, self._projection.weight, self._time_bias)

    def __call__(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """``time``: of :meth:`time`, one for all rows ``(1, C)`` or one a row ``(N, C)``."""
        h = self._norm1(x)
        if time is None:
            h = self._conv1(h, self._conv1.bias)
        elif len(time) == 1:
            h = self._conv1(h, time[0])
        else:
            h = self._conv1(h, None).add_(time[:, :, None, None])
        if self._shortcut is not None:
            x = F.linear(x.permute(0, 2, 3, 1), *self._shortcut).permute(0, 3, 1, 2)
        return self._conv2.add(self._norm2(h), x)


class Down:
    """The strided convolution, with either network's padding."""

    def __init__(self, block: Downsample, plan: Plan) -> None:
        self._symmetric, self._conv = block.symmetric, Conv(block.conv, plan)

    def __call__(self, x: Tensor) -> Tensor:
        x = x if self._symmetric else F.pad(x, (0, 1, 0, 1))
        return self._conv(x, self._conv.bias)


class Up:
    """Nearest 2x and a 3x3 convolution as one transposed convolution.

    Of the nine products behind an output pixel, those that read the same input pixel are one
    product with the sum of their weights: kernel 4, stride 2, padding 1, ``w4 = M w3 Mᵀ``. It
    holds at the borders too. Odd sizes, which are not a doubling, go the plain way.
    """

    def __init__(self, block: Upsample, plan: Plan) -> None:
        self._block, self._bias, self._packed = block, block.conv.bias, plan.packed
        self._kernel: Tensor | None = None
        if plan.transposed:
            weight = block.conv.weight.detach()
            m = torch.tensor(_NEAREST, dtype=weight.dtype, device=weight.device)
            kernel = torch.einsum("ai,oxij,bj->xoab", m, weight, m).contiguous()
            # Unpacked, oneDNN reorders the weights at each call: three times the work at 4x4.
            if plan.packed:
                self._kernel = pack_upsampling(kernel)
            else:
                self._kernel = kernel.contiguous(memory_format=torch.channels_last)

    def __call__(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """``size``: as for :class:`safelight.nets.layers.Upsample`."""
        doubled = size is None or size == (2 * x.shape[-2], 2 * x.shape[-1])
        if self._kernel is None or not doubled:
            return self._block(x, size)
        if self._packed:
            return packed_upsampling(x, self._kernel, self._bias)
        return F.conv_transpose2d(x, self._kernel, self._bias, stride=2, padding=1)


def parts_of(modules: nn.ModuleList | None) -> list[Any]:
    """What a module list holds, whose type does not say."""
    return [] if modules is None else list(modules)


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    height, width = conv.padding
    return int(height), int(width)
