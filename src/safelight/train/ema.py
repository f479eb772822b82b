"""Exponential moving average of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """``shadow += (1 - d) (weights - shadow)`` with ``d = min(decay, (1 + n) / (10 + n))``.

    The ramp is that of CompVis' ``LitEma``, which made the published v1 weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take one step towards ``module``'s weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = module.state_dict()
        averaged = [k for k, v in self.shadow.items() if v.is_floating_point()]
        torch._foreach_lerp_(
            [self.shadow[k] for k in averaged], [current[k] for k in averaged], 1 - decay
        )
        for key in self.shadow.keys() - set(averaged):
            self.shadow[key].copy_(current[key])

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return self.shadow

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Continue from saved averages."""
        self.updates = updates
        for key, value in state.items():
            self.shadow[key].copy_(value)
