"""The pieces, where a whole network would hide a fault."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from safelight.nets.attention import Attention, FeedForward
from safelight.nets.layers import Upsample
from safelight.runtime.attention import CrossAttention, GatedForward, Read
from safelight.runtime.layers import Norm, Up
from safelight.runtime.plan import PLAIN, Plan, everything, packing_works


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 32, 6, 5), (2, 32, 40, 40), (12, 96, 16, 16)])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("plan", [everything(), PLAIN], ids=["everything", "no kernels"])
def test_norm_on_every_way_it_goes(shape: tuple[int, ...], silu: bool, plan: Plan) -> None:
    norm = nn.GroupNorm(8, shape[1], eps=1e-5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(shape) * 3 + 5 * torch.randn(shape[1])[:, None, None]
    x[:, ::4] *= 1e-3  # where eps shows
    expected = norm.double()(x.double()).float()
    expected = F.silu(expected) if silu else expected
    norm.float()
    found = Norm(norm, plan, silu=silu)(x.contiguous(memory_format=torch.channels_last))
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 2e-5


@torch.no_grad()
def test_norm_lets_nan_through_in_its_own_row_only() -> None:
    norm = Norm(nn.GroupNorm(8, 96), everything())
    x = torch.randn(12, 96, 16, 16).contiguous(memory_format=torch.channels_last)
    x[3, 0, 0, 0] = float("nan")
    finite = norm(x).flatten(1).isfinite().all(1)
    assert finite.tolist() == [k != 3 for k in range(12)]


@torch.no_grad()
@pytest.mark.parametrize("size", [None, (10, 14), (9, 13), (10, 13)])
def test_upsampling_with_borders_and_odd_sizes(size: tuple[int, int] | None) -> None:
    block = Upsample(6)
    x = torch.randn(2, 6, 5, 7)
    expected = block(x, size)
    for plan in (Plan(packed=packing_works()), Plan(packed=False)):
        found = Up(block, plan)(x, size)
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) < 1e-5
    assert torch.equal(Up(block, PLAIN)(x, size), expected)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_cross_attention_folded_and_not(tokens: int) -> None:
    attention = Attention(32, 4, context_width=20)
    x, normed, context = torch.randn(3, 10, 32), torch.randn(3, 10, 32), torch.randn(tokens, 20)
    expected = x + attention(normed, context.expand(3, -1, -1))
    for plan in (Plan(), Plan(folded=False)):
        cross = CrossAttention(attention, plan)
        read = cross.read(context)
        assert read.first.ndim == (3 if plan.folded else 4)
        once = [read._replace(rows=3)]
        each = [Read(torch.cat([read.first] * 3), torch.cat([read.second] * 3), 3)]
        apart = [read._replace(rows=2), read]
        for reads in (once, each, apart):
            assert float((cross(x, normed, reads) - expected).abs().max()) < 1e-5


@torch.no_grad()
def test_large_contexts_are_not_folded() -> None:
    cross = CrossAttention(Attention(320, 8, context_width=768), Plan())
    assert cross.read(torch.zeros(77, 768)).first.ndim == 4


@torch.no_grad()
@pytest.mark.parametrize("rows", [5, 512, 513, 1500])
def test_feed_forward_in_blocks(rows: int) -> None:
    forward = FeedForward(16)
    x, normed = torch.randn(1, rows, 16), torch.randn(1, rows, 16)
    expected = x + forward(normed)
    for plan in (Plan(packed=packing_works()), Plan(packed=False)):
        found = GatedForward(forward, plan)(x, normed)
        assert float((found - expected).abs().max()) < 1e-5
