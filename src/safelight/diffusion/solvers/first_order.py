"""DDIM, DDPM and LCM: one prediction, one step, no history.

Song et al. 2021, "Denoising Diffusion Implicit Models"; Ho et al. 2020, "Denoising Diffusion
Probabilistic Models"; Luo et al. 2023, "Latent Consistency Models".
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from safelight.diffusion.grid import Grid
from safelight.diffusion.noise import Noise
from safelight.diffusion.schedule import Schedule, rates
from safelight.diffusion.solvers.base import Solver, begin, draw, read_eps, read_x0


def ddim(
    x: Tensor,
    schedule: Schedule,
    grid: Grid,
    noise: Noise | None = None,
    *,
    eta: float = 0.0,
    clip: float | None = None,
    clipped_eps: bool = False,
) -> Solver:
    """Song et al. 2021, Eq. 12.

    Args:
        eta: 0 deterministic, 1 as noisy as DDPM.
        clip: clamp x0 to ±clip (pixel-space models and priors; never for latents).
        clipped_eps: derive eps again from the clamped x0.
    """
    x, ask = begin(x, schedule, grid, len(grid))
    kind = schedule.prediction_type
    for call, i in enumerate(range(grid.begin, len(grid.timesteps))):
        sigma, target = grid.sigmas[i], grid.targets[i]
        pred = yield ask(x, grid.timesteps[i], sigma, call)
        x0 = read_x0(pred, x, sigma, kind)
        eps = read_eps(pred, x, sigma, kind)
        a, s = rates(sigma)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
            if clipped_eps:
                eps = (x - a * x0) / s
        a_next, s_next = rates(target)
        # Eq. 16: the share of the noise that is fresh. Never more than there is to replace: where
        # DDIM's fixed jump lands above the present level there is none.
        variance = eta**2 * (s_next / s) ** 2 * max(0.0, 1 - (a / a_next) ** 2)
        x = a_next * x0 + math.sqrt(max(0.0, s_next**2 - variance)) * eps
        if variance > 0:
            x = x + math.sqrt(variance) * draw(noise, sigma, target, x)
    return x


def ddpm(
    x: Tensor,
    schedule: Schedule,
    grid: Grid,
    noise: Noise | None = None,
    *,
    variance: Literal["fixed_small", "fixed_small_log", "fixed_large"] = "fixed_small",
    clip: float | None = None,
) -> Solver:
    """Ho et al. 2020, Eq. 6 and 7, between any two levels.

    Args:
        variance: of the added noise: the posterior's (``fixed_small``; ``fixed_small_log`` is the
            same number by way of its logarithm) or the step's whole beta (``fixed_large``).
        clip: clamp x0 to ±clip (the unCLIP prior uses 5).
    """
    x, ask = begin(x, schedule, grid, len(grid))
    for call, i in enumerate(range(grid.begin, len(grid.timesteps))):
        sigma, target = grid.sigmas[i], grid.targets[i]
        pred = yield ask(x, grid.timesteps[i], sigma, call)
        x0 = read_x0(pred, x, sigma, schedule.prediction_type)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        (a, s), (a_next, s_next) = rates(sigma), rates(target)
        alpha = (a / a_next) ** 2
        beta = 1 - alpha
        # Eq. 7, the posterior's mean and variance.
        x = (a_next * beta / s**2) * x0 + (math.sqrt(alpha) * s_next**2 / s**2) * x
        if grid.timesteps[i] > 0:  # at t = 0 the reference adds none
            var = beta if variance == "fixed_large" else max(beta * s_next**2 / s**2, 1e-20)
            x = x + math.sqrt(var) * draw(noise, sigma, target, x)
    return x


def lcm(
    x: Tensor,
    schedule: Schedule,
    grid: Grid,
    noise: Noise | None = None,
    *,
    clip: float | None = None,
    sigma_data: float = 0.5,
    timestep_scaling: float = 10.0,
) -> Solver:
    """Luo et al. 2023, Algorithm 2: jump to the end, noise again to the next level.

    Args:
        sigma_data, timestep_scaling: of the boundary condition c_skip, c_out that the student was
            distilled with.
    """
    x, ask = begin(x, schedule, grid, len(grid))
    for call, i in enumerate(range(grid.begin, len(grid.timesteps))):
        t, sigma = grid.timesteps[i], grid.sigmas[i]
        pred = yield ask(x, t, sigma, call)
        x0 = read_x0(pred, x, sigma, schedule.prediction_type)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        scaled = t * timestep_scaling
        c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
        c_out = scaled / math.hypot(scaled, sigma_data)
        x = c_out * x0 + c_skip * x
        if i + 1 < len(grid.timesteps):
            a, s = rates(grid.targets[i])
            x = a * x + s * draw(noise, sigma, grid.targets[i], x)
    return x
