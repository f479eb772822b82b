"""Gradient checkpointing on a network that is copied: the copy is its own."""

from __future__ import annotations

import copy

import pytest
import torch

from safelight.nets.unet import UNet
from safelight.runtime.training import hasten
from safelight.spec import UNetSpec
from safelight.train.remember import forget_activations


@pytest.mark.parametrize("hastened", [False, True])
def test_a_copy_runs_with_its_own_weights(hastened: bool) -> None:
    """The loop shows and validates a copy with averaged weights."""
    spec = UNetSpec(
        channels=(8, 16),
        attention=(True, True),
        heads=(2, 2),
        only_cross_attention=(False, False),
        layers_per_block=1,
        context_width=8,
        norm_groups=4,
    )
    torch.manual_seed(0)
    unet, other = UNet(spec), UNet(spec)
    if hastened:
        hasten(unet)
    forget_activations(unet)
    twin = copy.deepcopy(unet)
    twin.load_state_dict(other.state_dict())
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(twin(*inputs), other(*inputs), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(twin(*inputs), unet(*inputs), atol=1e-3)
    twin(*inputs).sum().backward()
    assert all(p.grad is None for p in unet.parameters())
    assert all(p.grad is not None for p in twin.parameters())
