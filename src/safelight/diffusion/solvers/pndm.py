"""PNDM without its Runge-Kutta start: PLMS, the sampler that v1 was published with.

Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds". The reference
(diffusers, ``skip_prk_steps=True``) makes the first step twice: with one prediction, then again
from the same start with the mean of two. Published models depend on it.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from safelight.diffusion import prediction
from safelight.diffusion.grid import Grid
from safelight.diffusion.noise import Noise
from safelight.diffusion.schedule import Schedule, rates
from safelight.diffusion.solvers.base import Solver, begin, read_eps

# Adams-Bashforth, newest first (Eq. 9).
_WEIGHTS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def call_list(grid: Grid, restart: str = "reference") -> list[float]:
    """The timesteps the network is asked at."""
    calls = list(grid.timesteps[grid.begin :])
    if restart == "exact" and grid.begin > 0:
        calls = list(dict.fromkeys(calls))
        calls = [*calls[:2], *calls[1:]]
    return calls


def pndm(
    x: Tensor,
    schedule: Schedule,
    grid: Grid,
    noise: Noise | None = None,
    *,
    v_history: Literal["raw", "eps"] = "raw",
    restart: Literal["reference", "exact"] = "reference",
) -> Solver:
    """PLMS of order 4, with the reference's restart.

    Args:
        v_history: for v-prediction models, what the multistep formula combines: ``raw`` outputs,
            turned into eps afterwards with the present sample (the reference), or ``eps``.
        restart: what happens when a run starts inside the grid (image-to-image). ``reference``
            restarts at the second call whatever it is: the sample then lags one timestep behind
            the network's for the whole run. ``exact`` repeats the second timestep of the run
            actually made, so sample and timestep agree; one call more.
    """
    calls = call_list(grid, restart)
    x, ask = begin(x, schedule, grid, len(calls))
    kind = schedule.prediction_type
    raw = kind == "epsilon" or (kind == "v" and v_history == "raw")
    history: list[Tensor] = []  # newest first
    start = x
    listed = list(dict.fromkeys(grid.timesteps))
    later = dict(zip(listed, [*listed[1:], -1.0], strict=True)) if grid.listed else {}
    earlier = dict(zip(listed[1:], listed, strict=False)) if grid.listed else {}
    for call, t in enumerate(calls):
        sigma = schedule.sigma(t)
        pred = yield ask(x, t, sigma, call)
        pred = prediction.working(pred) if raw else read_eps(pred, x, sigma, kind)
        source, target = t, later.get(t, t - grid.stride)
        if call == 1:  # back to the start, with the mean of two; this prediction is then forgotten
            source, target = earlier.get(t, t + grid.stride), t
            direction = (pred + history[0]) / 2
            x = start
        else:
            history = [pred, *history][:4]
            direction = _WEIGHTS[len(history)][0] * history[0]
            for weight, older in zip(_WEIGHTS[len(history)][1:], history[1:], strict=True):
                direction = direction + weight * older
        x = _transfer(x, direction, source, target, schedule, "v" if kind == "v" and raw else "")
    return x


def _transfer(
    x: Tensor, direction: Tensor, source: float, target: float, schedule: Schedule, kind: str
) -> Tensor:
    """Eq. 11, the DDIM step between two timesteps along ``direction``."""
    a, s = rates(schedule.sigma(source))
    if target >= 0:
        a_next, s_next = rates(schedule.sigma(target))
    else:
        a_next, s_next = (1.0, 0.0) if schedule.final_alpha_one else rates(schedule.sigma(0))
    if kind == "v":
        direction = a * direction + s * x
    scale = (a_next**2 - a**2) / (a**2 * s_next + math.sqrt(a**2 * s**2 * a_next**2))
    return (a_next / a) * x - scale * direction
