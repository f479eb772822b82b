"""When memory runs out: telling it, letting go of what is held, and doing with less.

The cheaper plan is one branch of one picture a network call, and a decoder that sees the picture
in tiles. The first changes rounding only; the second changes the picture a little, since norms and
attention see a tile instead of the whole.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TOLD = "memory ran out, and the picture was made on a cheaper plan"
AGAIN = (
    "memory ran out, and again on a cheaper plan. "
    "Try a smaller picture, or dtype bfloat16 (float16 on a GPU)."
)
_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: each allocator says it in its own way."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in _SIGNS)


def relieve(error: BaseException) -> None:
    """Let go of what a failed computation holds: its frames keep its tensors alive."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def decode_in_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, factor: int) -> Tensor:
    """Decode tiles of half the side, which overlap by a quarter and are blended there.

    Args:
        decode: latents ``(1, C, h, w)`` to pixels ``(1, 3, f*h, f*w)``.
        factor: pixels a cell.

    Returns:
        pixels ``(1, 3, f*h, f*w)`` in float32 on the CPU, where only one tile is ever large.
    """
    height, width = latents.shape[-2:]
    total = torch.zeros(1, 3, height * factor, width * factor)
    weight = torch.zeros(1, 1, height * factor, width * factor)
    for top, bottom in _spans(height):
        for left, right in _spans(width):
            part = decode(latents[..., top:bottom, left:right]).float().cpu()
            window = _ramp(bottom - top, factor)[:, None] * _ramp(right - left, factor)
            place = (
                ...,
                slice(top * factor, bottom * factor),
                slice(left * factor, right * factor),
            )
            total[place] += part * window
            weight[place] += window
    return total / weight


def _spans(side: int) -> Iterator[tuple[int, int]]:
    """Overlapping spans that cover ``side`` cells."""
    tile = max(4, -(-side // 2))
    stride = tile - tile // 4
    start = 0
    while start + tile < side:
        yield start, start + tile
        start += stride
    yield max(0, side - tile), side


def _ramp(cells: int, factor: int) -> Tensor:
    """Weights of a tile's pixels along one side: rising over a quarter at both ends."""
    count = cells * factor
    edge = max(1, count // 4)
    steps = torch.arange(count, dtype=torch.float32) + 1
    return torch.minimum(steps, steps.flip(0)).clamp(max=edge) / edge
