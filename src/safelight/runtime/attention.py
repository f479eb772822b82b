"""Attention and transformer blocks over ``(N, L, C)`` rows.

Each class is made from a module of :mod:`safelight.nets.attention` and computes what that
computes. Residuals are added inside, where they cost one pass less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from safelight.nets.attention import Attention, FeedForward, SpatialTransformer, TransformerBlock
from safelight.nets.vae import SpatialAttention
from safelight.runtime.caching import Stand
from safelight.runtime.layers import Norm, parts_of
from safelight.runtime.plan import Plan, pack_linear, packed_linear_gelu, packed_linear_with
from safelight.runtime.stored import whole


class Read(NamedTuple):
    """What a cross-attention keeps of contexts: keys and values, or a folded pair."""

    first: Tensor
    """``(B, heads, S, d)`` keys; folded ``(B, C, heads * S)``."""
    second: Tensor
    """``(B, heads, S, d)`` values; folded ``(B, heads * S, C)``."""
    rows: int = 1
    """Rows that read these: equally many, and next to each other, for each of the B contexts."""


_FOLD = 2**17
"""Most elements of one folded matrix: below, saved calls outweigh what it costs to read."""
_TINY = 1e-30
"""Least share of a token: far below float32's last bit of the largest, far above the denormal
numbers that processors multiply a hundred times slower."""
_INNER = 2**19
"""Most elements of a feed-forward's widest activation at a time: they stay in cache, and the
allocator hands the same memory out again instead of asking the system for new pages."""


class SelfAttention:
    """Query, key and value in one product; in three, where joining the weights would cost more
    memory than it saves time."""

    def __init__(self, attention: Attention | SpatialAttention, plan: Plan) -> None:
        parts = (attention.to_q, attention.to_k, attention.to_v)
        self._heads = attention.heads if isinstance(attention, Attention) else 1
        self._weights = [part.weight.detach() for part in parts]
        whole_ones = parts[0].weight.dtype == torch.float32
        self._apart = whole_ones and parts[0].weight.numel() > plan.kept
        if whole_ones and not self._apart:
            self._weights = [torch.cat(self._weights)]
        biases: list[Tensor] = [part.bias.detach() for part in parts if part.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._out = parts_of(attention.to_out)[0]

    def __call__(self, x: Tensor, normed: Tensor) -> Tensor:
        """``x`` plus attention over ``normed``."""
        n, length, width = normed.shape
        if self._apart:
            biases = (None,) * 3 if self._bias is None else self._bias.chunk(3)
            query, key, value = (
                F.linear(normed, *part).view(n, length, self._heads, -1).transpose(1, 2)
                for part in zip(self._weights, biases, strict=True)
            )
        else:
            qkv = F.linear(normed, whole(*self._weights), self._bias)
            qkv = qkv.view(n, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
            query, key, value = qkv.unbind(0)
        out = F.scaled_dot_product_attention(query, key, value)
        out = out.transpose(1, 2).reshape(n, length, width)
        return F.linear(out, whole(self._out.weight), self._out.bias).add_(x)


class CrossAttention:
    """Keys and values come from :meth:`read`, once for every context."""

    def __init__(self, attention: Attention, plan: Plan) -> None:
        self._part, self._heads, self._fold = attention, attention.heads, plan.folded
        self._out = parts_of(attention.to_out)[0]

    def read(self, tokens: Tensor) -> Read:
        """Keys and values of a context ``(S, context_width)``, as a batch of one.

        Scores are ``x Wq Kᵀ / √d``, one head's share of the output is ``P V Wo``. Where heads
        and tokens are few, ``Wq Kᵀ / √d`` and ``V Wo`` are made here, so that two small products
        and a softmax remain. The output's bias goes into the second, a share a head: each row of
        ``P`` sums to one.
        """
        part, heads = self._part, self._heads
        key, value = (
            F.linear(tokens, whole(source.weight)).unflatten(-1, (heads, -1)).transpose(0, 1)
            for source in (part.to_k, part.to_v)
        )
        if not self._fold or heads * len(tokens) * part.to_q.weight.shape[1] > _FOLD:
            return Read(key[None].contiguous(), value[None].contiguous())
        out, into = self._out, part.to_q.weight.float().unflatten(0, (heads, -1))
        first = torch.einsum("hdc,hsd->chs", into, key) * key.shape[-1] ** -0.5
        second = torch.einsum("hsd,chd->hsc", value, out.weight.float().unflatten(1, (heads, -1)))
        second = second + out.bias / heads
        return Read(first.flatten(1)[None].contiguous(), second.flatten(0, 1)[None].contiguous())

    def __call__(self, x: Tensor, normed: Tensor, reads: Sequence[Read] | Stand) -> Tensor:
        """``x`` plus attention of ``normed`` to what was read.

        Args:
            reads: for all rows of ``x``, in order; or who answers instead.
        """
        if isinstance(reads, Stand):
            return reads.attend(self, x, normed)
        if len(reads) == 1:
            return self._attend(x, normed, reads[0])
        counts = [read.rows for read in reads]
        parts = zip(x.split(counts), normed.split(counts), reads, strict=True)
        return torch.cat([self._attend(*part) for part in parts])

    def _attend(self, x: Tensor, normed: Tensor, read: Read) -> Tensor:
        shape, (first, second, _) = x.shape, read
        # Rows that read one context are more queries to it: larger products.
        x, normed = (t.reshape(len(first), -1, t.shape[-1]) for t in (x, normed))
        return self._ask(x, normed, first, second).view(shape)

    def _ask(self, x: Tensor, normed: Tensor, first: Tensor, second: Tensor) -> Tensor:
        n, length, width = normed.shape
        if first.ndim == 3:
            scores = torch.bmm(normed, first).view(n, length, self._heads, -1)
            shares = scores.softmax(-1).clamp_(min=_TINY).view(n, length, -1)
            return torch.baddbmm(x, shares, second)
        query = F.linear(normed, whole(self._part.to_q.weight))
        query = query.view(n, length, self._heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, first, second)
        out = out.transpose(1, 2).reshape(n, length, width)
        return F.linear(out, whole(self._out.weight), self._out.bias).add_(x)


class GatedForward:
    """GEGLU with value and gate as two products, so that both lie in order.

    oneDNN applies GELU and gate where it writes the products; without it they are further passes
    over memory, which block by block stay in cache.
    """

    def __init__(self, forward: FeedForward, plan: Plan) -> None:
        gated, _, last = parts_of(forward.net)
        first = gated.proj
        self._value, self._gate = first.weight.detach().chunk(2)
        self._value_bias, self._gate_bias = first.bias.detach().chunk(2)
        self._last, self._last_bias = last.weight.detach(), last.bias
        # Measured: nothing with many rows; a tenth with few, where weights are many, which is a
        # hundredth of a step for 0.6 GB.
        self._packed = plan.packed and last.weight.numel() <= plan.kept
        if self._packed:
            self._value, self._gate, self._last = (
                pack_linear(weight) for weight in (self._value, self._gate, self._last)
            )

    def __call__(self, x: Tensor, normed: Tensor) -> Tensor:
        """``x`` plus the feed-forward of ``normed``."""
        rows, rest = (t.reshape(-1, t.shape[-1]) for t in (normed, x))
        size = max(512, _INNER // len(self._gate_bias))
        run = self._by_onednn if self._packed else self._by_blas
        if len(rows) <= size:
            return run(rows, rest).view(x.shape)
        parts = zip(rows.split(size), rest.split(size), strict=True)
        return torch.cat([run(*part) for part in parts]).view(x.shape)

    def _by_onednn(self, rows: Tensor, rest: Tensor) -> Tensor:
        gate = packed_linear_gelu(rows, self._gate, self._gate_bias)
        inner = packed_linear_with(rows, gate, self._value, self._value_bias, "mul")
        return packed_linear_with(inner, rest, self._last, self._last_bias, "add")

    def _by_blas(self, rows: Tensor, rest: Tensor) -> Tensor:
        gate = F.gelu(F.linear(rows, whole(self._gate), self._gate_bias))
        inner = F.linear(rows, whole(self._value), self._value_bias).mul_(gate)
        return F.linear(inner, whole(self._last), self._last_bias).add_(rest)


class Block:
    """One transformer block."""

    def __init__(self, block: TransformerBlock, plan: Plan) -> None:
        self._norms = [
            (norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            for norm in (block.norm1, block.norm2, block.norm3)
        ]
        self._own = None if block.only_cross else SelfAttention(block.attn1, plan)
        crosses = [block.attn1, block.attn2] if block.only_cross else [block.attn2]
        self.crosses = [CrossAttention(attention, plan) for attention in crosses]
        self._forward = GatedForward(block.ff, plan)

    def own(self, x: Tensor) -> Tensor:
        """The half that reads no context; nothing where both attentions do."""
        return x if self._own is None else self._own(x, F.layer_norm(x, *self._norms[0]))

    def rest(self, x: Tensor, reads: Iterator[Sequence[Read] | Stand]) -> Tensor:
        """Everything from the first cross-attention on."""
        first = len(self._norms) - 1 - len(self.crosses)
        for cross, norm in zip(self.crosses, self._norms[first:], strict=False):
            x = cross(x, F.layer_norm(x, *norm), next(reads))
        return self._forward(x, F.layer_norm(x, *self._norms[2]))


class Transformer:
    """Transformer blocks over the cells of a feature map."""

    def __init__(self, part: SpatialTransformer, plan: Plan) -> None:
        self._norm = Norm(part.norm, plan, silu=False)
        # A 1x1 convolution is a linear layer over cells.
        around: list[Any] = [part.proj_in, part.proj_out]
        self._into, self._out = ((part.weight.detach().flatten(1), part.bias) for part in around)
        self._blocks = [Block(block, plan) for block in parts_of(part.transformer_blocks)]
        self.crosses = [cross for block in self._blocks for cross in block.crosses]

    def __call__(
        self,
        x: Tensor,
        reads: Iterator[Sequence[Read] | Stand],
        spread: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """``x`` (N, C, H, W).

        Args:
            reads: what its cross-attentions read, in order.
            spread: from here on there are more rows: copies them out, at the first
                cross-attention.
        """
        weight, bias = self._into
        h = F.linear(rows_of(self._norm(x)), whole(weight), bias)
        for block in self._blocks:
            h = block.own(h)
            if spread is not None:
                h, x, spread = spread(h), spread(x), None
            h = block.rest(h, reads)
        weight, bias = self._out
        return map_of(F.linear(h, whole(weight), bias), x).add_(x)


class CellAttention:
    """The autoencoder's self-attention over all cells."""

    def __init__(self, part: SpatialAttention, plan: Plan) -> None:
        self._norm, self._own = Norm(part.group_norm, plan, silu=False), SelfAttention(part, plan)

    def __call__(self, x: Tensor) -> Tensor:
        return map_of(self._own(rows_of(x), rows_of(self._norm(x))), x)


def rows_of(x: Tensor) -> Tensor:
    """``(N, C, H, W)`` to ``(N, H * W, C)``: a view of channels-last memory."""
    n, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, height * width, channels)


def map_of(rows: Tensor, like: Tensor) -> Tensor:
    """The way back, to the shape of ``like``."""
    n, channels, height, width = like.shape
    return rows.view(n, height, width, channels).permute(0, 3, 1, 2)
