"""DPM-Solver++, multistep: 2M, 3M and their SDE variants.

Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models".
The x0-prediction is integrated exactly against the linear part, in ``lambda = -log sigma``.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from safelight.diffusion.grid import Grid
from safelight.diffusion.noise import Noise
from safelight.diffusion.schedule import Schedule, rates
from safelight.diffusion.solvers.base import Solver, begin, draw, read_x0

SHORT = 15
"""Below this many steps the reference lowers the order at the end."""


def dpmpp(
    x: Tensor,
    schedule: Schedule,
    grid: Grid,
    noise: Noise | None = None,
    *,
    order: Literal[1, 2, 3] = 2,
    sde: bool = False,
    variant: Literal["midpoint", "heun"] = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    bend: Literal["authors", "taylor", "diffusers"] = "authors",
) -> Solver:
    """Multistep DPM-Solver++ (Algorithm 2 and its third-order form) or its SDE (Eq. 18 on).

    Args:
        order: 2 for 2M, 3 for 3M; the first steps are of lower order.
        sde: add noise at each step. The sigma of the noise source is the level.
        variant: how the second order weighs the difference of predictions (``solver_type``).
        lower_order_final: under 15 steps, end with orders 2 and 1. A step to sigma 0 is always
            of order 1: nothing else is finite there.
        euler_at_final: end with order 1 at any number of steps.
        bend: weight of the second derivative in the third order. ``authors``: that of the authors'
            code and of k-diffusion. It is half of what the Taylor expansion gives (``taylor``,
            which is of third order where the others are of second). ``diffusers``: the same as
            ``authors``, but with diffusers' wrong sign in the SDE (near -1 instead of near 0).
    """
    x, ask = begin(x, schedule, grid, len(grid))
    total = len(grid.timesteps)
    short = total < SHORT and lower_order_final
    history: list[tuple[float, Tensor]] = []  # (sigma, x0), newest last
    for call, i in enumerate(range(grid.begin, total)):
        sigma, target = grid.sigmas[i], grid.targets[i]
        pred = yield ask(x, grid.timesteps[i], sigma, call)
        history = [*history, (sigma, read_x0(pred, x, sigma, schedule.prediction_type))][-order:]
        now = len(history)
        if i == total - 1 and (short or euler_at_final or target == 0):
            now = 1
        elif i == total - 2 and short:
            now = min(now, 2)
        if target == sigma:  # karras down to the smallest sigma: the last step stands still
            continue
        x = _step(x, history[-now:], target, sde, variant, noise, bend)
    return x


def _step(
    x: Tensor,
    history: list[tuple[float, Tensor]],
    target: float,
    sde: bool,
    variant: str,
    noise: Noise | None,
    bend: str,
) -> Tensor:
    """From the newest sigma in ``history`` to ``target``, of order ``len(history)``."""
    sigma, d0 = history[-1]
    (_, s), (a_next, s_next) = rates(sigma), rates(target)
    if target == 0:  # h is infinite: the limit of either first-order form
        return d0
    h = math.log(sigma / target)  # lambda_t - lambda_s
    if sde:  # twice the drift, and noise
        h, decay, weight = 2 * h, math.exp(-h), -math.expm1(-2 * h)
    else:
        decay, weight = 1.0, -math.expm1(-h)
    # Here `weight` is 1 - e^{-h}, with the SDE's doubled h.
    x = (s_next / s * decay) * x + (a_next * weight) * d0
    # Weights of the first and second derivative: integrals of the Taylor terms (Eq. 12). The
    # midpoint variant takes 1/2 of `weight`, the same to this order.
    first = a_next * (1 - weight / h)
    if len(history) == 2:
        sigma1, d1 = history[-2]
        step = math.log(sigma / target)
        r0 = math.log(sigma1 / sigma) / step
        slope = (d0 - d1) / r0
        x = x + (0.5 * a_next * weight if variant == "midpoint" else first) * slope
    elif len(history) == 3:
        (sigma2, d2), (sigma1, d1) = history[0], history[1]
        step = math.log(sigma / target)
        r0 = math.log(sigma1 / sigma) / step
        r1 = math.log(sigma2 / sigma1) / step
        near, far = (d0 - d1) / r0, (d1 - d2) / r1
        slope = near + r0 / (r0 + r1) * (near - far)
        second = 0.5 - (h - weight) / h**2
        if bend == "taylor":
            second *= 2  # the integral of e^{u-h} (u/h)^2
        elif bend == "diffusers" and sde:
            second -= 1
        x = x + first * slope + (a_next * second / (r0 + r1)) * (near - far)
    if sde:
        x = x + (s_next * math.sqrt(weight)) * draw(noise, sigma, target, x)
    return x
