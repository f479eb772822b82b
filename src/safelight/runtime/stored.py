"""Weights held in float16 and used in float32: half the memory, and the arithmetic of before.

:func:`store` changes a network's large weights in place, and has each part that holds one read it
as float32 at each call. The fused layers do the same through :func:`whole`. What is small (norms,
biases, the first and last convolutions) stays in float32, so that it still says in which format
the network computes.
"""

from __future__ import annotations

import math
import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.store.pages import release

_SHORT = 16
"""Inputs or outputs up to which weights are too few to matter."""
_local = threading.local()


def whole(*weights: Tensor) -> Tensor:
    """Weights in float32, below each other where they are several: the very tensor where it is
    one in float32, else this thread's buffer, which the next call writes over."""
    first = weights[0]
    if len(weights) == 1 and first.dtype == torch.float32:
        return first.detach()
    shape = (sum(len(each) for each in weights), *first.shape[1:])
    out = _buffer(math.prod(shape)).view(shape)
    at = 0
    for each in weights:
        out[at : at + len(each)].copy_(each.detach())
        at += len(each)
    return out


def _buffer(count: int) -> Tensor:
    held: Tensor | None = getattr(_local, "buffer", None)
    if held is None or len(held) < count:
        _local.buffer = None
        with torch.inference_mode(False):
            held = torch.empty(count)
        _local.buffer = held
    return held[:count]


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, whole(self.weight), self.bias)


class _Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, whole(self.weight), self.bias)


class _Embedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight).float()


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    nn.Conv2d: _Conv2d,
    nn.Embedding: _Embedding,
}


@torch.no_grad()
def store(module: nn.Module) -> None:
    """Hold a network's large weights in float16, the others in float32.

    Weights that lie in a mapped float16 file stay there. A tensor with numbers that float16 has
    not is left in float32.
    """
    for part in module.modules():
        large = type(part) in _KINDS and min(part.weight.shape[:2]) > _SHORT  # type: ignore[union-attr]
        for name, parameter in part.named_parameters(recurse=False):
            half = large and name == "weight"
            new = parameter.detach().to(torch.float16 if half else torch.float32)
            if half and parameter.dtype.itemsize != 2 and not bool(torch.isfinite(new).all()):
                new, half = parameter.detach().float(), False
            if new.dtype != parameter.dtype:
                release(parameter)
                setattr(part, name, nn.Parameter(new, requires_grad=False))
            if half:
                part.__class__ = _KINDS[type(part)]


def is_stored(module: nn.Module) -> bool:
    """Whether :func:`store` was here."""
    return any(type(part) in _KINDS.values() for part in module.modules())
