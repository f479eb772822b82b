"""Samplers as generators: the solver asks, whoever drives it answers.

    solver = solve("dpm++2m", noise, schedule, grid)
    ask = next(solver)
    try:
        while True:
            ask = solver.send(network(ask.x, ask.timestep))
    except StopIteration as end:
        latents = end.value

A solver holds no network and no counter; its history is in local variables; its randomness comes
from the ``noise`` it was given. Cancelling, previews and progress belong to the driver.

**Start.** ``x`` is unit normal for text-to-image, in the shape of one picture or a batch. For
image-to-image it is :func:`add_noise` of the image, on a grid of
:func:`safelight.diffusion.grid.strength`. Both are VP latents; ``grid.init_scale`` carries the one
convention that differs.

**End.** The final sample in VP scale at the grid's last level: x0 where that is 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safelight.diffusion import prediction
from safelight.diffusion.grid import DEFAULT_SPACING, FAMILIES, Family, Grid
from safelight.diffusion.noise import Noise
from safelight.diffusion.schedule import Schedule, rates
from safelight.diffusion.solvers.base import Ask, Solver
from safelight.diffusion.solvers.dpm import dpmpp
from safelight.diffusion.solvers.first_order import ddim, ddpm, lcm
from safelight.diffusion.solvers.pndm import call_list, pndm
from safelight.diffusion.solvers.sigma_space import euler, euler_ancestral, heun, lms
from safelight.diffusion.solvers.unipc import unipc
from safelight.errors import InvalidRequest

__all__ = ["SOLVERS", "Ask", "Info", "Solver", "add_noise", "calls", "solve"]


@dataclass(frozen=True)
class Info:
    """What a caller must know about a solver before running it.

    Args:
        function: the generator function.
        stochastic: needs a noise source with its default options.
        options: what it presets over its function's defaults.
        brownian: profits from consistent noise between step counts (SDE solvers).
    """

    name: str
    function: Callable[..., Solver]
    stochastic: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    brownian: bool = False

    @property
    def family(self) -> Family:
        """Which grids it takes."""
        return FAMILIES[self.name]

    @property
    def default_spacing(self) -> str:
        """The spacing its reference implementation defaults to."""
        return DEFAULT_SPACING[self.family]

    @property
    def accepts(self) -> tuple[str, ...]:
        """Names of its options."""
        fixed = {name for name, _ in self.options}
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in fixed)


SOLVERS: dict[str, Info] = {
    info.name: info
    for info in (
        Info("ddim", ddim),
        Info("ddpm", ddpm, stochastic=True),
        Info("pndm", pndm),
        Info("lcm", lcm, stochastic=True),
        Info("dpm++2m", dpmpp, options=(("order", 2), ("sde", False))),
        Info(
            "dpm++2m-sde",
            dpmpp,
            stochastic=True,
            options=(("order", 2), ("sde", True)),
            brownian=True,
        ),
        Info("dpm++3m", dpmpp, options=(("order", 3), ("sde", False))),
        Info(
            "dpm++3m-sde",
            dpmpp,
            stochastic=True,
            options=(("order", 3), ("sde", True)),
            brownian=True,
        ),
        Info("unipc", unipc),
        Info("euler", euler),
        Info("euler-a", euler_ancestral, stochastic=True, brownian=True),
        Info("heun", heun),
        Info("lms", lms),
    )
}


def _info(name: str) -> Info:
    if name not in SOLVERS:
        raise InvalidRequest("sampler", f"no solver {name!r}.", f"One of {' '.join(SOLVERS)}")
    return SOLVERS[name]


def solve(
    name: str,
    x: Tensor,
    schedule: Schedule,
    grid: Grid,
    *,
    noise: Noise | None = None,
    **options: Any,
) -> Solver:
    """Start a solver. Nothing is computed before the first ``next``.

    Args:
        name: a key of :data:`SOLVERS`.
        x: VP latents to start from (see above), any floating dtype; arithmetic is in float32 or
            better, questions are asked in ``x``'s dtype and the result has the working dtype.
        grid: made for this sampler's family.
        noise: for stochastic solvers; called as ``noise(sigma_from, sigma_to)``, it returns unit
            normal noise of ``x``'s shape.
        options: the solver function's own (``SOLVERS[name].accepts``).

    Raises:
        InvalidRequest: an unknown name or option, a grid of another family, or no noise where some
            is needed.
    """
    info = _info(name)
    if grid.family != info.family:
        raise InvalidRequest(
            "sampler",
            f"{name} cannot run on a grid made for {grid.family} samplers.",
            f"Make it with timesteps(..., sampler={name!r}).",
        )
    unknown = [option for option in options if option not in info.accepts]
    if unknown:
        raise InvalidRequest(
            "sampler", f"{name} has no option {unknown[0]!r}.", f"It has {', '.join(info.accepts)}."
        )
    if info.stochastic and noise is None and options.get("eta", 1.0) > 0:
        raise InvalidRequest("noise", f"{name} is stochastic and needs a noise source.")
    return info.function(x, schedule, grid, noise, **dict(info.options), **options)


def calls(name: str, grid: Grid, **options: Any) -> int:
    """How often a run asks the network (before guidance): N; PNDM N + 1; Heun 2 N - 1.

    Args:
        options: those given to :func:`solve`; few matter.
    """
    function = _info(name).function
    if function is heun:
        return 2 * len(grid) - (grid.targets[-1] == 0)
    if function is pndm:
        return len(call_list(grid, options.get("restart", "reference")))
    return len(grid)


def add_noise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """An image brought to noise level ``sigma``, in VP scale: ``sqrt(ā) x0 + sqrt(1 - ā) noise``.

    Args:
        x0, noise: the same shape.
        sigma: ``grid.start_sigma``.

    Returns:
        shape of ``x0``, float32 or wider.
    """
    a, s = rates(sigma)
    return a * prediction.working(x0) + s * prediction.working(noise)
