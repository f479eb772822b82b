"""Euler, Euler ancestral, Heun and LMS, in k-diffusion's sigma space.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
Algorithms 1 and 2; ancestral steps as in k-diffusion; LMS (Adams-Bashforth in sigma) as by
K. Crowson, 2022. State is ``y = x0 + sigma eps``; the network sees ``y / sqrt(sigma^2 + 1)``.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from torch import Tensor

from safelight.diffusion.grid import Grid
from safelight.diffusion.noise import Noise
from safelight.diffusion.schedule import Schedule
from safelight.diffusion.solvers.base import Asker, Solver, begin, draw, read_x0


def _begin(x: Tensor, schedule: Schedule, grid: Grid, calls: int) -> tuple[Tensor, Asker]:
    x, ask = begin(x, schedule, grid, calls)
    return x * math.hypot(1, grid.start_sigma), ask


def _end(y: Tensor, grid: Grid) -> Tensor:
    """Back to VP scale: nothing to do at sigma 0."""
    return y / math.hypot(1, grid.targets[-1])


def _x0(pred: Tensor, y: Tensor, sigma: float, kind: str) -> Tensor:
    return read_x0(pred, y / math.hypot(1, sigma), sigma, kind)


def _toward(y: Tensor, x0: Tensor, sigma: float, target: float) -> Tensor:
    """The Euler step ``y + (target - sigma) (y - x0) / sigma``, written as a mean of its ends: no
    large numbers cancel when sigma is 4096 (zero terminal SNR)."""
    ratio = target / sigma
    return ratio * y + (1 - ratio) * x0


def euler(
    x: Tensor,
    schedule: Schedule,
    grid: Grid,
    noise: Noise | None = None,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    churn: Literal["reference", "paper"] = "reference",
) -> Solver:
    """Karras et al. 2022, Algorithm 2 without its second-order correction.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: how much noise is added before each step, and where.
        churn: ``paper`` adds it before the network looks. ``reference`` (diffusers) adds it
            afterwards: the prediction is that of the sample without it, and a v-prediction is read
            at the level without it.
    """
    y, ask = _begin(x, schedule, grid, len(grid))
    kind = schedule.prediction_type
    most = min(s_churn / len(grid.timesteps), math.sqrt(2) - 1)
    for call, i in enumerate(range(grid.begin, len(grid.timesteps))):
        t, sigma, target = grid.timesteps[i], grid.sigmas[i], grid.targets[i]
        gamma = most if s_tmin <= sigma <= s_tmax else 0.0
        hat = sigma * (1 + gamma)
        if gamma > 0:
            churned = y + s_noise * math.sqrt(hat**2 - sigma**2) * draw(noise, sigma, hat, y)
        else:
            churned = y
        if gamma > 0 and churn == "paper":
            y, sigma, t = churned, hat, schedule.timestep(hat)
        pred = yield ask(y / math.hypot(1, sigma), t, sigma, call)
        # With the reference's late churn, eps is read at the new level and v at the old one.
        x0 = _x0(pred, churned, hat, kind) if kind == "epsilon" else _x0(pred, churned, sigma, kind)
        y = _toward(churned, x0, hat, target)
    return _end(y, grid)


def euler_ancestral(
    x: Tensor,
    schedule: Schedule,
    grid: Grid,
    noise: Noise | None = None,
    *,
    eta: float = 1.0,
) -> Solver:
    """An Euler step a little too far, and fresh noise back up.

    Args:
        eta: share of the ancestral noise; 0 is plain Euler.
    """
    y, ask = _begin(x, schedule, grid, len(grid))
    for call, i in enumerate(range(grid.begin, len(grid.timesteps))):
        sigma, target = grid.sigmas[i], grid.targets[i]
        pred = yield ask(y / math.hypot(1, sigma), grid.timesteps[i], sigma, call)
        x0 = _x0(pred, y, sigma, schedule.prediction_type)
        # target^2 = up^2 + down^2, with up the standard deviation of DDPM's posterior.
        up = min(target, eta * target * math.sqrt(max(0.0, 1 - (target / sigma) ** 2)))
        down = math.sqrt(target**2 - up**2)
        y = _toward(y, x0, sigma, down)
        if up > 0:
            y = y + up * draw(noise, sigma, target, y)
    return _end(y, grid)


def heun(x: Tensor, schedule: Schedule, grid: Grid, noise: Noise | None = None) -> Solver:
    """Karras et al. 2022, Algorithm 1: two calls a step, one for the step to sigma 0."""
    last = grid.targets[-1] == 0
    y, ask = _begin(x, schedule, grid, 2 * len(grid) - last)
    kind, call = schedule.prediction_type, 0
    for i in range(grid.begin, len(grid.timesteps)):
        sigma, target = grid.sigmas[i], grid.targets[i]
        pred = yield ask(y / math.hypot(1, sigma), grid.timesteps[i], sigma, call)
        call += 1
        slope = (y - _x0(pred, y, sigma, kind)) / sigma
        ahead = y + (target - sigma) * slope
        if target > 0:
            t = grid.timesteps[i + 1] if i + 1 < len(grid.timesteps) else schedule.timestep(target)
            pred = yield ask(ahead / math.hypot(1, target), t, target, call)
            call += 1
            slope = (slope + (ahead - _x0(pred, ahead, target, kind)) / target) / 2
            ahead = y + (target - sigma) * slope
        y = ahead
    return _end(y, grid)


def lms(
    x: Tensor,
    schedule: Schedule,
    grid: Grid,
    noise: Noise | None = None,
    *,
    order: int = 4,
    warmup: Literal["reference", "exact"] = "reference",
) -> Solver:
    """Linear multistep: the integral of the polynomial through the last ``order`` slopes.

    Args:
        warmup: for runs that start inside the grid. ``reference`` (diffusers) weighs the first
            steps as if earlier slopes were there and leaves out those that are not; ``exact``
            starts at order 1.
    """
    y, ask = _begin(x, schedule, grid, len(grid))
    slopes: list[Tensor] = []  # newest first
    for call, i in enumerate(range(grid.begin, len(grid.timesteps))):
        sigma, target = grid.sigmas[i], grid.targets[i]
        pred = yield ask(y / math.hypot(1, sigma), grid.timesteps[i], sigma, call)
        slopes = [(y - _x0(pred, y, sigma, schedule.prediction_type)) / sigma, *slopes][:order]
        known = min(i + 1, order) if warmup == "reference" else len(slopes)
        weights = _lagrange([grid.sigmas[i - k] for k in range(known)], sigma, target)
        for weight, slope in zip(weights, slopes, strict=False):
            y = y + weight * slope
    return _end(y, grid)


def _lagrange(nodes: list[float], low: float, high: float) -> list[float]:
    """Integrals over [low, high] of the Lagrange basis polynomials on ``nodes``."""
    weights = []
    for k, node in enumerate(nodes):
        others = [n for j, n in enumerate(nodes) if j != k]
        # In units around `low`: sigmas span three decades, and powers of them more.
        basis = np.poly1d([n - low for n in others], r=True) / np.prod([node - n for n in others])
        weights.append(float(basis.integ()(high - low)))
    return weights
