"""3x3 convolutions by the C kernel, with a quarter of the multiplications (``winograd.c``)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.runtime.kernels import library


def level() -> int:
    """What this processor does best: 2 AVX-512, 1 AVX2, 0 neither; -1 without kernels."""
    lib = library()
    return -1 if lib is None else lib.sl_winograd_level()


_PACKED, _PLAIN, _HALF = range(3)


@dataclass(frozen=True)
class Weights:
    """Weights of a convolution: as they are, or transformed, of 4 times their size (2.8 times
    where ``doubled``)."""

    values: Tensor
    inputs: int
    outputs: int
    doubled: bool
    """Nearest 2x comes before the convolution."""
    level: int
    kind: int


def plain(weight: Tensor, *, doubled: bool = False, at: int | None = None) -> Weights:
    """Weights ``(O, I, 3, 3)`` in float32 or float16, which :func:`convolve` transforms each time
    as it goes. They are used where they lie, and take no more memory.

    Args:
        at: as for :func:`transform`.
    """
    kinds = {torch.float32: _PLAIN, torch.float16: _HALF}
    outputs, inputs = weight.shape[:2]
    at = level() if at is None else at
    return Weights(weight.detach().contiguous(), inputs, outputs, doubled, at, kinds[weight.dtype])


def transform(weight: Tensor, *, doubled: bool = False, at: int | None = None) -> Weights:
    """Weights ``(O, I, 3, 3)`` in float32, ready for :func:`convolve`.

    Args:
        at: of which instruction set, as :func:`level` counts; by default this processor's best.
    """
    lib, at = _library(), level() if at is None else at
    outputs, inputs = weight.shape[:2]
    weight = weight.detach().contiguous()
    values = torch.empty(lib.sl_winograd_packed(inputs, outputs, doubled, at))
    lib.sl_winograd_pack(
        *(weight.data_ptr(), values.data_ptr(), inputs, outputs),
        *(doubled, at, torch.get_num_threads()),
    )
    return Weights(values, inputs, outputs, doubled, at, _PACKED)


def convolve(
    x: Tensor,
    weights: Weights,
    bias: Tensor | None = None,
    *,
    affine: Tensor | None = None,
    silu: bool = False,
    other: Tensor | None = None,
    over: bool = False,
) -> Tensor:
    """The 3x3 convolution of ``x``, stride 1, padding 1, and what comes around it.

    Args:
        x: ``(N, I, H, W)`` in float32; laid out channels-last if it is not.
        bias: ``(O,)``, or one a row ``(N, O)``.
        affine: ``(N, 2, I)``, what ``x`` is first multiplied by and what is added
            (:func:`safelight.runtime.kernels.norm.affine`).
        silu: whether SiLU follows that.
        other: added to the result, of its shape.
        over: the result may be written over ``other``.

    Returns:
        ``(N, O, H, W)``, or twice as high and wide, channels-last.
    """
    lib, threads = _library(), torch.get_num_threads()
    x = x.contiguous(memory_format=torch.channels_last)
    rows, _, height, width = x.shape
    if weights.doubled:
        height, width = 2 * height, 2 * width
    shape = (rows, weights.outputs, height, width)
    if other is not None:
        other = other.contiguous(memory_format=torch.channels_last)
    y = other if over and other is not None else None
    if y is None:
        y = torch.empty(shape, memory_format=torch.channels_last)
    if bias is not None:
        bias = bias.contiguous()
    sizes = (rows, height, width, weights.inputs, weights.outputs)
    how = (weights.doubled, weights.kind, weights.level, threads)
    work = torch.empty(lib.sl_winograd_work(*sizes, *how))
    lib.sl_winograd(
        *(None if t is None else t.data_ptr() for t in (x, weights.values, affine, bias, other)),
        *(y.data_ptr(), work.data_ptr(), *sizes),
        *(weights.outputs if bias is not None and bias.ndim == 2 else 0, silu, *how),
    )
    return y


def _library() -> ctypes.CDLL:
    lib = library()
    assert lib is not None, "ask level() first"
    return lib
