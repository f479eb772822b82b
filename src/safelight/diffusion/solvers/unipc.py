"""UniPC: a predictor, and a corrector that costs no call of its own.

Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
Models", Algorithms 5 to 8, in the x0-prediction form.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from torch import Tensor

from safelight.diffusion.grid import Grid
from safelight.diffusion.noise import Noise
from safelight.diffusion.schedule import Schedule, rates
from safelight.diffusion.solvers.base import Solver, begin, read_x0


def unipc(
    x: Tensor,
    schedule: Schedule,
    grid: Grid,
    noise: Noise | None = None,
    *,
    order: int = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    lower_order_final: bool = True,
    corrector: bool = True,
) -> Solver:
    """UniPC of ``order`` with B(h) of the paper's Table 1.

    Args:
        variant: ``bh1`` is B(h) = h, ``bh2`` is B(h) = e^h - 1.
        lower_order_final: lower the order over the last steps; a step to sigma 0 is always of
            order 1.
        corrector: off, this is UniP alone.
    """
    x, ask = begin(x, schedule, grid, len(grid))
    total = len(grid.timesteps)
    history: list[tuple[float, Tensor]] = []  # (sigma, x0), newest last
    before: Tensor | None = None
    used = 1
    for call, i in enumerate(range(grid.begin, total)):
        sigma, target = grid.sigmas[i], grid.targets[i]
        pred = yield ask(x, grid.timesteps[i], sigma, call)
        # The correction moves the sample but not the prediction made from it.
        x0 = read_x0(pred, x, sigma, schedule.prediction_type)
        if before is not None and corrector:
            x = _update(before, history[-used:], sigma, variant, x0)
        history = [*history, (sigma, x0)][-order:]
        used = min(order, total - i) if lower_order_final else order
        used = 1 if target == 0 else min(used, len(history))
        before = x
        x = _update(x, history[-used:], target, variant, None)
    return x


def _update(
    x: Tensor,
    history: list[tuple[float, Tensor]],
    target: float,
    variant: str,
    arrived: Tensor | None,
) -> Tensor:
    """From the newest level of ``history`` to ``target``.

    ``arrived`` is the prediction at ``target`` itself: with it this is UniC, without it UniP.
    """
    sigma, m0 = history[-1]
    if target == 0:
        return m0
    if target == sigma:
        return x
    (_, s), (a_next, s_next) = rates(sigma), rates(target)
    h = math.log(sigma / target)
    phi = math.expm1(-h)
    b_h = -h if variant == "bh1" else phi
    ratios = [math.log(sigma / level) / h for level, _ in reversed(history[:-1])]
    differences = [(m - m0) / r for (_, m), r in zip(reversed(history[:-1]), ratios, strict=True)]
    if arrived is not None:
        ratios.append(1.0)
        differences.append(arrived - m0)
    x = (s_next / s) * x - (a_next * phi) * m0
    for rho, difference in zip(_rhos(ratios, h, b_h), differences, strict=True):
        x = x - (a_next * b_h * rho) * difference
    return x


def _rhos(ratios: list[float], h: float, b_h: float) -> list[float]:
    """Solve ``R rho = b`` (Eq. 9 and 10, with -h for x0-prediction)."""
    n = len(ratios)
    if n == 0:
        return []
    if n == 1:  # the paper's and the reference's simplification, for UniP-2 and UniC-1
        return [0.5]
    b, phi = [], math.expm1(-h) / -h - 1
    for i in range(1, n + 1):
        b.append(phi * math.factorial(i) / b_h)
        phi = phi / -h - 1 / math.factorial(i + 1)
    rows = np.vander(np.asarray(ratios), n, increasing=True).T
    return [float(r) for r in np.linalg.solve(rows, np.asarray(b))]
