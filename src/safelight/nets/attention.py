"""Attention and the transformer blocks of the UNet.

Attention: Vaswani et al. 2017 (1706.03762), equation 1. GEGLU: Shazeer 2020 (2002.05202).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int,
    float32_scores: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Multi-head scaled dot-product attention.

    Args:
        q: ``(N, L, heads * d)``; ``k`` and ``v``: ``(N, S, heads * d)``.
        float32_scores: compute scores and softmax in float32 (SD 2.1 overflows in float16).
        mask: added to the scores, ``(N, 1, L, S)`` or of a shape that broadcasts to it.

    Returns:
        ``(N, L, heads * d)`` in the dtype of ``v``.
    """
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    if float32_scores and v.dtype != torch.float32:
        mask = None if mask is None else mask.float()
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(v.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask)
    return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self- or cross-attention.

    Args:
        context_width: width of the tokens that keys and values read; None for ``x`` itself.
        bias: of q, k and v; the UNet's have none, the prior's do.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        context_width: int | None = None,
        upcast: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.upcast = heads, upcast
        source = width if context_width is None else context_width
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(source, width, bias=bias)
        self.to_v = nn.Linear(source, width, bias=bias)
        # A list, because the published files count the dropout behind it as ".1".
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """``x`` (N, L, width); ``context`` (N, S, context_width); ``mask`` as in :func:`attend`."""
        source = x if context is None else context
        out = attend(
            self.to_q(x),
            self.to_k(source),
            self.to_v(source),
            heads=self.heads,
            float32_scores=self.upcast,
            mask=mask,
        )
        return self.to_out[0](out)


class GEGLU(nn.Module):
    """Value times the exact GELU of a gate, both from one linear layer."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back. ``net.1`` is the published files' dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; each pre-normed, residual."""

    def __init__(
        self, width: int, heads: int, context_width: int, *, only_cross: bool, upcast: bool
    ) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(
            width, heads, context_width=context_width if only_cross else None, upcast=upcast
        )
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width=context_width, upcast=upcast)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.only_cross else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the cells of a feature map (``Transformer2DModel``).

    v1 projects in and out with 1x1 convolutions, v2 with linear layers: the same mathematics,
    but their weights differ in rank, and files must load unchanged.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_width: int,
        *,
        groups: int,
        linear_projection: bool,
        only_cross: bool,
        upcast: bool,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        if linear_projection:
            self.proj_in: nn.Module = nn.Linear(channels, channels)
            self.proj_out: nn.Module = nn.Linear(channels, channels)
        else:
            self.proj_in = nn.Conv2d(channels, channels, 1)
            self.proj_out = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, heads, context_width, only_cross=only_cross, upcast=upcast)]
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """``x`` (N, C, H, W); ``context`` (N, S, context_width)."""
        size = x.shape[-2:]
        h = self.norm(x)
        if self.linear_projection:
            h = self.proj_in(h.flatten(2).transpose(1, 2))
        else:
            h = self.proj_in(h).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear_projection:
            h = self.proj_out(h).transpose(1, 2).unflatten(2, size)
        else:
            h = self.proj_out(h.transpose(1, 2).unflatten(2, size))
        return x + h
