"""GroupNorm with the SiLU behind it, differentiable, by the C kernel."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from safelight.runtime.kernels import library

_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def available(x: Tensor) -> bool:
    """Whether :func:`group_norm` can take this tensor."""
    return x.device.type == "cpu" and x.dtype in _KINDS and library() is not None


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool
) -> Tensor:
    """``GroupNorm(x)``, or its SiLU: Wu and He 2018 (1803.08494), equation 1.

    Args:
        x: ``(N, C, H, W)`` in float32 or bfloat16; laid out channels-last if it is not.
        weight, bias: ``(C,)`` in float32.

    Returns:
        like ``x``, channels-last.
    """
    if not torch.is_grad_enabled():
        x = x.contiguous(memory_format=torch.channels_last)
        return _forward(x, weight, bias, groups, eps, silu)[0]
    return _GroupNorm.apply(x, weight, bias, groups, eps, silu)  # type: ignore[no-any-return]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """The result, and mean and inverse deviation ``(N, groups, 2)``; ``x`` channels-last."""
    n, channels, height, width = x.shape
    y, statistics = torch.empty_like(x), torch.empty(n, groups, 2)
    lib = _library()
    work = torch.empty(lib.sl_norm_work(n, height * width, channels))
    getattr(lib, f"sl_{_KINDS[x.dtype]}_norm_forward")(
        *(t.data_ptr() for t in (x, y, weight, bias, statistics, work)),
        *(n, height * width, channels, groups, eps, silu, torch.get_num_threads()),
    )
    return y, statistics


def affine(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """What GroupNorm multiplies ``x`` by and what it adds, ``(N, 2, C)``, for who reads ``x`` next.

    Args:
        x: ``(N, C, H, W)`` in float32, channels-last.
    """
    n, channels, height, width = x.shape
    lib = _library()
    result, statistics = torch.empty(n, 2, channels), torch.empty(n, groups, 2)
    work = torch.empty(lib.sl_norm_work(n, height * width, channels))
    lib.sl_f32_norm_affine(
        *(t.data_ptr() for t in (x, weight, bias, statistics, result, work)),
        *(n, height * width, channels, groups, eps, torch.get_num_threads()),
    )
    return result


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *how: Any) -> Tensor:
        groups, eps, silu = how
        x = x.contiguous(memory_format=torch.channels_last)
        y, statistics = _forward(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.how = groups, silu
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, statistics = ctx.saved_tensors
        groups, silu = ctx.how
        dy = gradients[0].to(x.dtype).contiguous(memory_format=torch.channels_last)
        n, channels, height, width = x.shape
        dx, dweight, dbias = (torch.empty_like(t) for t in (x, weight, bias))
        lib = _library()
        work = torch.empty(lib.sl_norm_work(n, height * width, channels))
        tensors = (x, dy, dx, weight, bias, statistics, dweight, dbias, work)
        getattr(lib, f"sl_{_KINDS[x.dtype]}_norm_backward")(
            *(t.data_ptr() for t in tensors),
            *(n, height * width, channels, groups, silu, torch.get_num_threads()),
        )
        return dx, dweight, dbias, None, None, None


def _library() -> ctypes.CDLL:
    lib = library()
    assert lib is not None, "ask available() first"
    return lib
