"""Gradient checkpointing: activations are computed again on the way back instead of kept.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from safelight.nets.attention import SpatialTransformer
from safelight.nets.clip import Layer
from safelight.nets.layers import ResnetBlock
from safelight.nets.prior import PriorBlock

_UNITS = (ResnetBlock, SpatialTransformer, Layer, PriorBlock)


def forget_activations(module: nn.Module) -> int:
    """Have every residual block and transformer keep its inputs only.

    Results and gradients stay what they are: the same arithmetic, done twice. Names do too.

    Returns:
        how many parts this is about.
    """
    found = [part for part in module.modules() if isinstance(part, _UNITS)]
    for part in found:
        # Bound, so that a copy of the network calls the copy's part and not this one.
        part.forward = MethodType(_again(part.forward.__func__), part)  # type: ignore[attr-defined]
    return len(found)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def forgetful(part: nn.Module, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(part, *inputs, **named)
        # Nothing here draws random numbers, so there is no generator's state to restore.
        return checkpoint(
            forward, part, *inputs, use_reentrant=False, preserve_rng_state=False, **named
        )

    return forgetful
