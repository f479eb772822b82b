"""Exponential moving averages of weights, classic and power-function."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from safelight.train.sharding import mine, shared_out


def classic_decay(updates: int, decay: float) -> float:
    """``min(decay, (1 + n) / (10 + n))``: the ramp of CompVis' ``LitEma``, which made the
    published v1 weights."""
    return min(decay, (1 + updates) / (10 + updates))


def power_exponent(width: float) -> float:
    """The exponent gamma of an averaging profile ``(t / T) ** gamma`` with a relative width.

    Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models"
    (2312.02696), section 3.1: ``width² = (g + 1) / ((g + 2)² (g + 3))``, solved for g.

    Args:
        width: standard deviation of the profile as a share of the run, 0.05 or 0.10 there.
    """
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def power_decay(updates: int, exponent: float) -> float:
    """``(1 - 1 / n) ** (gamma + 1)`` at update ``n`` (Karras et al. 2024, equation 2)."""
    return (1 - 1 / updates) ** (exponent + 1)


class EMA:
    """``shadow += (1 - d) (weights - shadow)`` after every step.

    The average of a sharded module is sharded like it: each process averages its part.

    Args:
        decay: of the classic average.
        width: relative width of a power-function profile; where given, ``decay`` plays no part.
            Its memory grows with the run, so that no length has to be chosen for it.
    """

    def __init__(self, module: nn.Module, decay: float, *, width: float | None = None) -> None:
        self.decay, self.updates = decay, 0
        self.exponent = None if width is None else power_exponent(width)
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    def _decay(self) -> float:
        if self.exponent is None:
            return classic_decay(self.updates, self.decay)
        return power_decay(self.updates, self.exponent)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take one step towards ``module``'s weights."""
        self.updates += 1
        decay = self._decay()
        assert math.isfinite(decay)
        current = module.state_dict()
        averaged = [k for k, v in self.shadow.items() if v.is_floating_point()]
        torch._foreach_lerp_(
            [mine(self.shadow[k]) for k in averaged],
            [mine(current[k]) for k in averaged],
            1 - decay,
        )
        for key in self.shadow.keys() - set(averaged):
            self.shadow[key].copy_(current[key])

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return self.shadow

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Continue from saved averages, whole ones."""
        self.updates = updates
        for key, value in state.items():
            self.shadow[key].copy_(shared_out(value, self.shadow[key]))
