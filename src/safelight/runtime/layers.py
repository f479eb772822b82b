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
from safelight.runtime.kernels.norm import affine as norm_affine
from safelight.runtime.kernels.norm import group_norm as compiled_norm
from safelight.runtime.kernels.winograd import Weights, convolve, plain, transform
from safelight.runtime.plan import (
    Plan,
    by_winograd,
    pack,
    pack_upsampling,
    packed_conv,
    packed_conv_add,
    packed_upsampling,
)
from safelight.runtime.stored import whole

_FEW = 2**18
"""Elements up to which PyTorch's own GroupNorm, which is one call, is no slower."""
_CELLS = 1024
"""Cells from which PyTorch's channels-last GroupNorm has a vectorised way of its own."""

_WORTHWHILE = 64
"""Cells of one picture from which Winograd is no slower. The batch has no say, so that a picture's
numbers do not hang on its company."""

_NEAREST = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


class Conv:
    """A convolution whose weights are laid out once."""

    def __init__(self, conv: nn.Conv2d, plan: Plan) -> None:
        self.bias = conv.bias
        self._stride, self._padding = (int(conv.stride[0]), int(conv.stride[1])), _padding(conv)
        self._packed, self._source = plan.packed, conv.weight
        self._halved = conv.weight.dtype != torch.float32
        self._transformed = by_kernel(conv, plan) if by_winograd(conv, plan) else None
        late = self._halved or self._transformed is not None
        self._weight = None if late else self._laid_out()

    def _laid_out(self) -> Tensor:
        if self._packed:
            return pack(self._source, self._stride, self._padding)
        return self._source.detach().contiguous(memory_format=torch.channels_last)

    def __call__(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        other: Tensor | None = None,
        over: bool = False,
    ) -> Tensor:
        """Convolve.

        Args:
            bias: in place of the layer's own: ``(O,)``, or one a row ``(N, O)``.
            norm: of ``x``, comes first.
            other: added to the result.
            over: the result may be written over it.
        """
        bias = self.bias if bias is None else bias
        # Few cells make small products, which do not repay the transforms.
        if self._transformed is not None and x.shape[2] * x.shape[3] >= _WORTHWHILE:
            x = x.contiguous(memory_format=torch.channels_last)
            affine, silu = (None, False) if norm is None else norm.affine(x)
            return convolve(
                x, self._transformed, bias, affine=affine, silu=silu, other=other, over=over
            )
        x = x if norm is None else norm(x)
        if bias is not None and bias.ndim == 2:
            h = self._direct(x, None).add_(bias[:, :, None, None])
            return h if other is None else h.add_(other)
        if other is None:
            return self._direct(x, bias)
        if not self._packed:
            return self._direct(x, bias).add_(other)
        return packed_conv_add(x, other, self._late(), bias, self._stride, self._padding)

    def _direct(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._packed:
            return packed_conv(x, self._late(), bias, self._stride, self._padding)
        return F.conv2d(x, self._late(), bias, self._stride, self._padding)

    def _late(self) -> Tensor:
        """The plain weights, of a layer that may never need them."""
        if self._halved:
            return whole(self._source)
        if self._weight is None:
            self._weight = self._laid_out()
        return self._weight


def by_kernel(conv: nn.Conv2d, plan: Plan, *, doubled: bool = False) -> Weights:
    """A convolution's weights for the C kernel: transformed and kept, or where they lie."""
    outputs, inputs = conv.weight.shape[:2]
    kept = outputs * inputs <= plan.kept and conv.weight.dtype == torch.float32
    return (transform if kept else plain)(conv.weight, doubled=doubled)


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

    def affine(self, x: Tensor) -> tuple[Tensor, bool]:
        """What to multiply channels-last ``x`` by and to add, and whether SiLU follows."""
        return norm_affine(x, self._weight, self._bias, self._groups, self._eps), self._silu

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
        return F.linear(vector, whole(self._projection.weight), self._time_bias)

    def __call__(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """``time``: of :meth:`time`, one for all rows ``(1, C)`` or one a row ``(N, C)``."""
        if time is not None and len(time) == 1:
            time = time[0]
        h = self._conv1(x, time, norm=self._norm1)
        if self._shortcut is not None:
            weight, bias = self._shortcut
            x = F.linear(x.permute(0, 2, 3, 1), whole(weight), bias).permute(0, 3, 1, 2)
        return self._conv2(h, norm=self._norm2, other=x, over=self._shortcut is not None)


class Down:
    """The strided convolution, with either network's padding."""

    def __init__(self, block: Downsample, plan: Plan) -> None:
        self._symmetric, self._conv = block.symmetric, Conv(block.conv, plan)

    def __call__(self, x: Tensor) -> Tensor:
        x = x if self._symmetric else F.pad(x, (0, 1, 0, 1))
        return self._conv(x)


class Up:
    """Nearest 2x and a 3x3 convolution in one.

    By Winograd it leaves 25 products of 144 (``kernels/winograd.c``). Otherwise it is a transposed
    convolution: of the nine products behind an output pixel, those that read the same input pixel
    are one product with the sum of their weights: kernel 4, stride 2, padding 1, ``w4 = M w3 Mᵀ``.
    Both hold at the borders too. Odd sizes, which are not a doubling, go the plain way.
    """

    def __init__(self, block: Upsample, plan: Plan) -> None:
        self._block, self._bias, self._packed = block, block.conv.bias, plan.packed
        self._kernel: Tensor | None = None
        self._transformed: Weights | None = None
        if by_winograd(block.conv, plan):
            self._transformed = by_kernel(block.conv, plan, doubled=True)
        elif plan.transposed:
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
        if doubled and self._transformed is not None:
            return convolve(x, self._transformed, self._bias)
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
